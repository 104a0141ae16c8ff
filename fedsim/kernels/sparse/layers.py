"""Layers on kept weights alone: convolution and linear map, forward and both gradients, in CHWN layout.

The weight is (nnz,) values and a Pattern. The gradient exists at the kept positions only.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsim.kernels.activation_pruning.layers import Cache, restored
from fedsim.kernels.sparse import cpu, padding
from fedsim.kernels.sparse.chwn_layout import as_chwn, empty_chwn
from fedsim.kernels.sparse.dense_gradient import dense_gradient, phases_of
from fedsim.kernels.sparse.pattern import Pattern, Sweep
from fedsim.kernels.sparse.walk import walk_of

CacheInput = tuple[Cache, str]  # and the order of its entries


def conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, cache: CacheInput | None = None, tapped: Tensor | None = None
) -> Tensor:
    """F.conv2d of x (B, I, H, W) with the pattern's weight; (B, O, H', W') in CHWN layout.

    cache: the pruned x, which the backward pass reads in place of x for the weight's gradient.
    tapped: like the mask; its values do not matter, its gradient is the dense gradient of the weight.
    """
    (where, held), form = cache or ((None, None), "")
    return cast(Tensor, _Sparse.apply(x, values, bias, pattern, where, held, form, tapped))


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, cache: CacheInput | None = None, tapped: Tensor | None = None
) -> Tensor:
    """F.linear of x (B, I) with the pattern's weight; (B, O) in CHWN layout."""
    return conv2d(x[:, :, None, None], values, bias, pattern, cache, tapped)[:, :, 0, 0]


@cache
def missing(device: str) -> str:
    """Why the kernels do not work on this device, as Triton says it (it needs a C compiler there); empty if they do."""
    if device == "cpu":
        return ""
    try:
        one = torch.ones(1, 1, 1, 1, device=device)
        conv2d(one, one.view(1), None, Pattern(one.bool()))
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, values: Tensor, bias: Any, pattern: Pattern, where: Any, held: Any, form: str, tapped: Any
    ) -> Tensor:
        images = as_chwn(x)  # (I, H, W, B)
        out, read = _forward(images, values, bias, pattern)
        context.save_for_backward(read if where is None else None, values, where, held)
        context.shape, context.pattern, context.biased, context.whole, context.form = images.shape, pattern, bias is not None, x.shape, form
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, values, where, held = context.saved_tensors
        if where is not None:
            read = _read(as_chwn(restored((where, held), context.whole, context.form)), context.pattern)
        g = as_chwn(g)  # (O, H', W', B)
        by_x, by_values = _backward(read, context.shape, values, g, context.pattern)
        dense = _dense(read, context.shape, g, context.pattern) if context.needs_input_grad[-1] else None
        return by_x.movedim(-1, 0), by_values, g.sum((1, 2, 3)) if context.biased else None, None, None, None, None, dense


def _read(images: Tensor, pattern: Pattern) -> Tensor:
    """The tensor that the backward pass reads: the images, or their phases where the walk sorts them."""
    return _phased(images, pattern) if not images.is_cuda and walk_of(pattern, images.shape).phased else images


def _dense(read: Tensor, shape: torch.Size, g: Tensor, pattern: Pattern) -> Tensor:
    """The dense gradient of the weight; read: what `_read` gives of images of `shape`."""
    phased = not read.is_cuda and walk_of(pattern, shape).phased
    return dense_gradient(read if phased else phases_of(read, pattern), g, pattern)


def _forward(images: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(B, O, H', W') in CHWN layout, and what `_read` gives."""
    if images.is_cuda:
        from fedsim.kernels.sparse import cuda  # here, for Triton is not on every machine

        return cuda.forward(images, values, bias, pattern), images
    way, count = walk_of(pattern, images.shape), images.shape[-1]
    whole, out = empty_chwn(images, (count, pattern.outputs, *way.out))
    start = images.new_zeros(pattern.outputs) if bias is None else bias
    read = _phased(images, pattern) if way.padded and (way.phased or way.padded.plane != images.shape[1:3]) else images
    lists, (given, kept, begin, into) = way.forward, (_array(part) for part in (read, values, start, out))
    order = lists.offsets, lists.places, kept, lists.begins, lists.segments
    cpu.forward(given, *order, begin, into, prod(way.out) * count, way.piece, way.step)
    return whole, read if way.phased else images


def _phased(images: Tensor, pattern: Pattern) -> Tensor:
    """(P, I, *plane, B) the phases of the padded images."""
    out = images.new_empty(len(pattern.phases), len(images), *pattern.plane((images.shape[1], images.shape[2])), images.shape[-1])
    way = pattern.geometry
    padding.pad(images.numpy(), out.numpy(), np.array(way.stride), pattern.phases, np.array(way.padding))
    return out


def _backward(x: Tensor, shape: torch.Size, values: Tensor, g: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Gradients with respect to images of `shape` (I, H, W, B) and values (nnz,), of g (O, H', W', B); x: what `_forward` read."""
    if x.is_cuda:
        from fedsim.kernels.sparse import cuda

        return cuda.backward(x, values, g, pattern)
    way = walk_of(pattern, shape)
    into = torch.zeros_like(x) if way.phased or not len(way.backward.segments) else torch.empty_like(x)
    padded = _padded(g, way.padded) if way.padded and way.padded.gradient != way.out else g
    lists, found = way.backward, torch.zeros_like(values)
    given, kept, read, written, sums = (_array(part) for part in (padded, values, x, into, found))
    order = lists.offsets, lists.places, kept, lists.begins, lists.segments
    cpu.backward(given, *order, read, written, sums, prod(x.shape[-3:]), way.piece, way.step)
    return _gathered(into, shape, pattern) if way.phased else into, found


def _padded(g: Tensor, sweep: Sweep) -> Tensor:
    """(O, *gradient, B): zeros around."""
    out = g.new_empty(1, len(g), *sweep.gradient, g.shape[-1])
    padding.pad(g.numpy(), out.numpy(), np.ones(2, np.int64), np.zeros((1, 2), np.int64), np.array(sweep.before))
    return out[0]


def _gathered(phases: Tensor, shape: torch.Size, pattern: Pattern) -> Tensor:
    out = phases.new_empty(shape)
    way = pattern.geometry
    padding.unpad(phases.numpy(), out.numpy(), np.array(way.stride), pattern.phases, np.array(way.padding))
    return out


def _array(part: Tensor) -> Any:
    """Flat, without a copy."""
    return part.detach().view(-1).numpy()
