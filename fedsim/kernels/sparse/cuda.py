"""Sparse layers on CUDA, in Triton: what `cpu` and `padding` do on the CPU, from the same offsets, on images (C, H, W, B).

A program holds one strip of one row of one output, and adds to it the run of images that every kept weight meets. The gradient with
respect to the images is the same walk, over the padded gradient of the output. That with respect to the weights is a walk of its own,
one program per kept weight: in one sweep with the other, as on the CPU, every strip would add to the sums of all kept weights, which
takes atomics, whose order and so whose bits differ from run to run, or as many partial sums as strips. This module imports Triton:
it is imported for tensors on CUDA alone, and by Triton's interpreter, which takes tensors on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim.kernels.sparse.chwn_layout import empty_chwn
from fedsim.kernels.sparse.dense_gradient import phases_of
from fedsim.kernels.sparse.pattern import Pattern, Region, Sweep

BLOCK = 512  # most values of a strip
PROGRAMS = 4096  # that fill a GPU several times over


class Rows(NamedTuple):
    """Rows of neighbours in the tensor that is read, in values."""

    start: int
    rows: int
    length: int
    pitch: int  # from one row to the next

    def joined(self) -> Rows:
        """One row, where nothing lies between them."""
        return Rows(self.start, 1, self.rows * self.length, self.rows * self.length) if self.pitch == self.length else self


@triton.jit
def _gather(x, offsets, values, begins, bias, out, outputs, start, rows, strips, run, pitch, EVEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[o, r, c] = bias[o] + Σ_j values[j] · x[start + offsets[j] + r · pitch + c] over begins[o] <= j < begins[o + 1].

    A row has `strips` of BLOCK. start, run and pitch count in EVEN values, and offsets are multiples of it, so that one load can take
    as many. Outputs of the same strip run side by side, for they read the same images.
    """
    o, strip = tl.program_id(0) % outputs, tl.program_id(0) // outputs
    row, c = strip // strips, strip % strips * BLOCK + tl.arange(0, BLOCK)
    inside = c < run * EVEN
    there = x + (start + row * pitch) * EVEN + c
    sums = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + o)
    for j in tl.range(tl.load(begins + o), tl.load(begins + o + 1), loop_unroll_factor=4):
        met = tl.load(there + tl.multiple_of(tl.load(offsets + j), EVEN), mask=inside, other=0.0)
        sums += tl.load(values + j) * met
    tl.store(out + (o * rows + row) * run * EVEN + c, sums, mask=inside)


@triton.jit
def _dots(x, g, offsets, owners, found, kept, rows, strips, run, pitch, share, EVEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """found[s, j] = Σ_(r, c) x[offsets[j] + r · pitch + c] · g[owners[j], r, c] over the s-th `share` of the strips."""
    j, part = tl.program_id(0), tl.program_id(1)
    met = x + tl.multiple_of(tl.load(offsets + j), EVEN)
    mine = g + tl.load(owners + j) * rows * run * EVEN
    sums = tl.zeros((BLOCK,), tl.float32)
    for strip in tl.range(part * share, tl.minimum((part + 1) * share, rows * strips), loop_unroll_factor=4):
        row, c = strip // strips, strip % strips * BLOCK + tl.arange(0, BLOCK)
        inside = c < run * EVEN
        seen = tl.load(met + row * pitch * EVEN + c, mask=inside, other=0.0)
        sums += seen * tl.load(mine + row * run * EVEN + c, mask=inside, other=0.0)
    tl.store(found + part * kept + j, tl.sum(sums))


def forward(images: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """(B, O, H', W') in CHWN layout, of images (I, H, W, B)."""
    sweep, count = pattern.sweep(*images.shape[1:]), images.shape[-1]
    whole, out = empty_chwn(images, (count, pattern.outputs, *sweep.out))
    start = values.new_zeros(pattern.outputs) if bias is None else bias
    _launch_gather(phases_of(images, pattern), _read(sweep, count), sweep.forward, values, pattern.begins, start, out)
    return whole


def backward(images: Tensor, values: Tensor, g: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Gradients with respect to images (I, H, W, B) and values (nnz,), of g (O, H', W', B)."""
    sweep = pattern.sweep(*images.shape[1:])
    by_values = _launch_dots(phases_of(images, pattern), g, _read(sweep, images.shape[-1]), sweep.forward, pattern)
    return _by_images(images, values, g, pattern, sweep), by_values


def _read(sweep: Sweep, count: int) -> Rows:
    """What the forward pass reads of the phases, relative to an offset."""
    return Rows(0, sweep.out[0], sweep.out[1] * count, sweep.plane[1] * count).joined()


def _by_images(images: Tensor, values: Tensor, g: Tensor, pattern: Pattern, sweep: Sweep) -> Tensor:
    """(I, H, W, B): region by region, each the positions of the image that one phase of a stride holds."""
    padded = g
    if sweep.gradient != sweep.out:
        padded = g.new_zeros(len(g), *sweep.gradient, g.shape[-1])
        (top, left), (height, width) = sweep.before, sweep.out
        padded[:, top : top + height, left : left + width] = g
    ordered, none = values[pattern.order], values.new_zeros(pattern.inputs)
    into = torch.zeros_like(images)
    for region in sweep.regions:
        place = _place(into, region, pattern)
        part = torch.empty_like(place, memory_format=torch.contiguous_format)
        begins = pattern.begins_back[region.phase]
        _launch_gather(padded, _around(region, sweep, images.shape[-1]), sweep.backward, ordered, begins, none, part)
        if part.shape == images.shape:
            return part
        place.copy_(part)
    return into


def _place(into: Tensor, region: Region, pattern: Pattern) -> Tensor:
    """The region of into (I, H, W, B), as a view: row Y of phase a is row sY + a - p."""
    way, phase = pattern.geometry, pattern.phases[region.phase]
    first = [s * n + int(a) - p for s, n, a, p in zip(way.stride, region.first, phase, way.padding, strict=True)]
    return into[:, first[0] :: way.stride[0], first[1] :: way.stride[1]][:, : region.rows, : region.columns]


def _around(region: Region, sweep: Sweep, count: int) -> Rows:
    """What a region reads of the padded gradient, relative to an offset."""
    start = (region.first[0] + sweep.before[0]) * sweep.gradient[1] + region.first[1] + sweep.before[1]
    return Rows(start * count, region.rows, region.columns * count, sweep.gradient[1] * count).joined()


def _launch_gather(x: Tensor, read: Rows, offsets: Tensor, values: Tensor, begins: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fills out (outputs, …, B)."""
    ways, strips, (start, run, pitch) = _ways(read, out.shape[-1])
    with torch.cuda.device_of(x):
        where = x, offsets, values, begins, bias, out
        _gather[(len(out) * read.rows * strips,)](*where, len(out), start, read.rows, strips, run, pitch, **ways)


def _launch_dots(x: Tensor, g: Tensor, read: Rows, offsets: Tensor, pattern: Pattern) -> Tensor:
    """(nnz,); the strips of a weight are shared out by shapes alone, so that the bits are the same in every run."""
    ways, strips, (_, run, pitch) = _ways(read, g.shape[-1])
    kept = len(offsets)
    parts = min(read.rows * strips, max(1, PROGRAMS // max(1, kept)))
    share = -(-read.rows * strips // parts)
    found = torch.empty(-(-read.rows * strips // share), kept, device=g.device)
    with torch.cuda.device_of(x):
        where = x, g, offsets, pattern.owners, found
        _dots[(kept, len(found))](*where, kept, read.rows, strips, run, pitch, share, **ways)
    return found.sum(0)


def _ways(read: Rows, count: int) -> tuple[dict[str, Any], int, tuple[int, int, int]]:
    """What a kernel is compiled for, strips of a row, and start, length and pitch in as many of the `count` images as a load takes."""
    even = 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1
    block = min(BLOCK, max(32, 1 << (read.length - 1).bit_length()))
    ways = {"EVEN": even, "BLOCK": block, "num_warps": max(1, block // 128), "enable_fp_fusion": True}  # four values a thread
    return ways, -(-read.length // block), (read.start // even, read.length // even, read.pitch // even)
