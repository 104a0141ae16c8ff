"""The inner loops of every sparse layer: kept weights times runs of images, sums held in registers.

A run is as many float32 as fit a strip of registers; what is left of a row is done in narrower strips. Every kept weight is an
offset into the images it meets and a place among the values, so the loops do no index arithmetic and know no kernel size or padding.
The columns of a strided convolution lie apart in its images: there a strip is of 2, 4 or 8 pieces, each the images of one column.

The order of every sum is that of strips of 64, on every processor: one of 128 is two of 64 in turn, and 16 lanes are twice eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels.vectors import HAS_512, INT, LONG, SIZE, Strip

BLOCK, LANES = 64, 32  # values whose products are summed before they are added to a weight's gradient, and lanes of that sum
WIDE = 128 if HAS_512 else 64  # values of the widest strip
Shape = tuple[int, int]  # vectors of a strip, and float32 of a vector
SHAPES: dict[int, Shape] = {128: (8, 16), 64: (4, 16) if HAS_512 else (8, 8), 16: (2, 8), 4: (1, 4), 1: (1, 1)}


class Pieces:
    """The addresses of the vectors of a strip that is of so many pieces, `step` values apart."""

    def __init__(self, strip: Strip, pieces: int, step: Any) -> None:
        self.strip, self.each = strip, strip.vectors // pieces
        self.steps = [strip.builder.mul(step, LONG(piece)) for piece in range(1, pieces)]

    def _of(self, pointer: Any, k: int) -> Any:
        piece = k // self.each
        return self.strip.builder.gep(pointer, [self.steps[piece - 1]]) if piece else pointer

    def load(self, pointer: Any, k: int) -> Any:
        return self.strip.load(self._of(pointer, k), k % self.each)

    def store(self, value: Any, pointer: Any, k: int) -> None:
        self.strip.store(value, self._of(pointer, k), k % self.each)


def _gather(shape: Shape, pieces: int) -> Any:
    """out[c] = bias + Σ_j values[places[j]] · x[offsets[j] + c] for the c of one strip; addresses and a count in, nothing out."""

    @intrinsic
    def gather(context: Any, out: Any, x: Any, offsets: Any, places: Any, values: Any, count: Any, step: Any, bias: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            out, x, offsets, places, values, count, step, bias = given
            strip = Strip(builder, *shape)
            read, sums = Pieces(strip, pieces, step), strip.sums(strip.splat(bias))
            out, x, values = (strip.pointer(address) for address in (out, x, values))
            offsets, places = (strip.pointer(address, INT) for address in (offsets, places))
            with cgutils.for_range(builder, count) as loop:
                run = builder.gep(x, [builder.sext(strip.item(offsets, loop.index), LONG)])
                value = strip.splat(strip.item(values, builder.sext(strip.item(places, loop.index), LONG)))
                for k, held in enumerate(sums):
                    builder.store(strip.multiply_add(value, read.load(run, k), builder.load(held)), held)
            for k, held in enumerate(sums):
                strip.store(builder.load(held), out, k)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7, types.float32), code

    return gather


def _scatter(shape: Shape, pieces: int) -> Any:
    """Both gradients of one strip of inputs, each run of the output's gradient read once.

    into[c] = Σ_j values[places[j]] · g[offset[j] + c], and found[places[j]] += Σ_c x[c] · g[offset[j] + c].
    """

    @intrinsic
    def scatter(context: Any, into: Any, x: Any, g: Any, offsets: Any, places: Any, values: Any, found: Any, count: Any, step: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            into, x, g, offsets, places, values, found, count, step = given
            strip = Strip(builder, *shape)
            apart, sums = Pieces(strip, pieces, step), strip.sums(strip.zero)
            into, x, g, values, found = (strip.pointer(address) for address in (into, x, g, values, found))
            offsets, places = (strip.pointer(address, INT) for address in (offsets, places))
            with cgutils.for_range(builder, count) as loop:
                run = builder.gep(g, [builder.sext(strip.item(offsets, loop.index), LONG)])
                place = builder.sext(strip.item(places, loop.index), LONG)
                value, sum_at = strip.splat(strip.item(values, place)), builder.gep(found, [place])
                dots = _Dots(strip)
                for k, held in enumerate(sums):
                    seen = strip.load(run, k)
                    builder.store(strip.multiply_add(value, seen, builder.load(held)), held)
                    dots.add(k, seen, apart.load(x, k))
                builder.store(dots.added_to(builder.load(sum_at)), sum_at)
            for k, held in enumerate(sums):
                apart.store(builder.load(held), into, k)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), code

    return scatter


class _Dots:
    """Sums of products of a strip, one for each block, in several chains, for a sum waits for the one before."""

    def __init__(self, strip: Strip) -> None:
        self.strip = strip
        self.of_block = min(strip.vectors, max(1, BLOCK // strip.width))
        chains = min(self.of_block, max(1, LANES // strip.width))
        self.blocks = [[strip.zero] * chains for _ in range(strip.vectors // self.of_block)]

    def add(self, k: int, one: Any, other: Any) -> None:
        block = self.blocks[k // self.of_block]
        chain = k % self.of_block % len(block)
        block[chain] = self.strip.multiply_add(one, other, block[chain])

    def added_to(self, value: Any) -> Any:
        for block in self.blocks:
            value = self.strip.builder.fadd(value, self.strip.added_up(self.strip.joined(block)))
        return value


def _outputs(shape: Shape, pieces: int = 1) -> Callable[..., None]:
    gather = _gather(shape, pieces)

    @inlined
    def outputs(
        out: int, plane: int, x: int, offsets: int, places: int, values: int, begins: Any, bias: Any, step: int
    ) -> None:  # pragma: no cover - compiled
        """One strip of every output."""
        for o in range(bias.size):
            first = begins[o]
            kept = SIZE * first
            gather(out + SIZE * o * plane, x, offsets + kept, places + kept, values, begins[o + 1] - first, step, bias[o])

    return outputs


def _inputs(shape: Shape, pieces: int = 1) -> Callable[..., None]:
    scatter = _scatter(shape, pieces)

    @inlined
    def inputs(
        into: int, x: int, plane: int, g: int, offsets: int, places: int, values: int, begins: Any, found: int, step: int
    ) -> None:  # pragma: no cover - compiled
        """One strip of every input."""
        for i in range(begins.size - 1):
            first, there = begins[i], SIZE * i * plane
            kept = SIZE * first
            scatter(into + there, x + there, g, offsets + kept, places + kept, values, found, begins[i + 1] - first, step)

    return inputs


_OUT_WIDE, _OUT64, _OUT16, _OUT4, _OUT1 = (_outputs(SHAPES[width]) for width in (WIDE, 64, 16, 4, 1))
_IN_WIDE, _IN64, _IN16, _IN4, _IN1 = (_inputs(SHAPES[width]) for width in (WIDE, 64, 16, 4, 1))
_OUT_WIDE_OF_32, _OUT_WIDE_OF_16, _OUT64_OF_32, _OUT64_OF_16 = (
    _outputs(SHAPES[width], width // piece) for width in (WIDE, 64) for piece in (32, 16)
)
_IN_WIDE_OF_32, _IN_WIDE_OF_16, _IN64_OF_32, _IN64_OF_16 = (
    _inputs(SHAPES[width], width // piece) for width in (WIDE, 64) for piece in (32, 16)
)


@inlined
def _strip_of_outputs(
    left: int, piece: int, out: int, plane: int, x: int, offsets: int, places: int, values: int, begins: Any, bias: Any, step: int
) -> int:  # pragma: no cover - compiled
    """The widest strip that is left, of every output. Its values."""
    if left >= WIDE:
        if piece == 1:
            _OUT_WIDE(out, plane, x, offsets, places, values, begins, bias, step)
        elif piece == 32:
            _OUT_WIDE_OF_32(out, plane, x, offsets, places, values, begins, bias, step)
        else:
            _OUT_WIDE_OF_16(out, plane, x, offsets, places, values, begins, bias, step)
        return WIDE
    if left >= 64:
        if piece == 1:
            _OUT64(out, plane, x, offsets, places, values, begins, bias, step)
        elif piece == 32:
            _OUT64_OF_32(out, plane, x, offsets, places, values, begins, bias, step)
        else:
            _OUT64_OF_16(out, plane, x, offsets, places, values, begins, bias, step)
        return 64
    if left >= 16:
        _OUT16(out, plane, x, offsets, places, values, begins, bias, step)
        return 16
    if left >= 4:
        _OUT4(out, plane, x, offsets, places, values, begins, bias, step)
        return 4
    _OUT1(out, plane, x, offsets, places, values, begins, bias, step)
    return 1


@inlined
def _strip_of_inputs(
    left: int, piece: int, into: int, x: int, plane: int, g: int, offsets: int, places: int, values: int, begins: Any, found: int, step: int
) -> int:  # pragma: no cover - compiled
    """The widest strip that is left, of every input. Its values."""
    if left >= WIDE:
        if piece == 1:
            _IN_WIDE(into, x, plane, g, offsets, places, values, begins, found, step)
        elif piece == 32:
            _IN_WIDE_OF_32(into, x, plane, g, offsets, places, values, begins, found, step)
        else:
            _IN_WIDE_OF_16(into, x, plane, g, offsets, places, values, begins, found, step)
        return WIDE
    if left >= 64:
        if piece == 1:
            _IN64(into, x, plane, g, offsets, places, values, begins, found, step)
        elif piece == 32:
            _IN64_OF_32(into, x, plane, g, offsets, places, values, begins, found, step)
        else:
            _IN64_OF_16(into, x, plane, g, offsets, places, values, begins, found, step)
        return 64
    if left >= 16:
        _IN16(into, x, plane, g, offsets, places, values, begins, found, step)
        return 16
    if left >= 4:
        _IN4(into, x, plane, g, offsets, places, values, begins, found, step)
        return 4
    _IN1(into, x, plane, g, offsets, places, values, begins, found, step)
    return 1


@inlined
def _moved(done: int, piece: int, step: int) -> int:  # pragma: no cover - compiled
    """How far a strip of so many values goes in tensors whose pieces lie `step` apart, in bytes."""
    return SIZE * (done if done < piece else done // piece * step)


@kernel
def forward(
    x: Any, offsets: Any, places: Any, values: Any, begins: Any, segments: Any, bias: Any, out: Any, plane: int, piece: int, step: int
) -> None:  # pragma: no cover - compiled
    """out[o · plane + …] = bias[o] + Σ_j values[places[j]] · x[offsets[j] + …] over the kept weights of o in a segment's list.

    x, values, bias (O,) and out are flat float32, offsets and places int32; begins (lists, O + 1) and segments (n, 4) int64: the list,
    where the segment begins in x and in out, its values. `piece` (1, 16 or 32) values lie side by side in x, pieces `step` apart.
    """
    px, po, pp, pv, py = x.ctypes.data, offsets.ctypes.data, places.ctypes.data, values.ctypes.data, out.ctypes.data
    for n in range(segments.shape[0]):
        kept, there, here, left = begins[segments[n, 0]], px + SIZE * segments[n, 1], py + SIZE * segments[n, 2], segments[n, 3]
        while left > 0:
            done = _strip_of_outputs(left, piece, here, plane, there, po, pp, pv, kept, bias, step)
            here, there, left = here + SIZE * done, there + _moved(done, piece, step), left - done


@kernel
def backward(
    g: Any,
    offsets: Any,
    places: Any,
    values: Any,
    begins: Any,
    segments: Any,
    x: Any,
    into: Any,
    found: Any,
    plane: int,
    piece: int,
    step: int,
) -> None:  # pragma: no cover - compiled
    """Gradients of `forward` with respect to x, into `into`, and to the values, added to `found`, from that of its output, g.

    begins (lists, I + 1) orders the kept weights of a list by input; segments (n, 4): the list, where the segment begins in g and in x,
    its values. x and `into` lie alike: channels `plane` apart, pieces `step` apart.
    """
    pg, po, pp, pv = g.ctypes.data, offsets.ctypes.data, places.ctypes.data, values.ctypes.data
    px, pi, pf = x.ctypes.data, into.ctypes.data, found.ctypes.data
    for n in range(segments.shape[0]):
        kept, here, there, left = begins[segments[n, 0]], pg + SIZE * segments[n, 1], SIZE * segments[n, 2], segments[n, 3]
        while left > 0:
            done = _strip_of_inputs(left, piece, pi + there, px + there, plane, here, po, pp, pv, kept, pf, step)
            here, there, left = here + SIZE * done, there + _moved(done, piece, step), left - done


@kernel
def step(w: Any, momentum: Any, g: Any, kept: Any, lr: float, factor: float, decay: float) -> None:  # pragma: no cover - compiled
    """torch.optim.SGD's step at the kept positions of w and, where it is not empty, of its momentum; g (nnz,) is theirs alone."""
    for j in range(kept.size):
        place = kept[j]
        moved = g[j] + np.float32(decay) * w[place]
        if momentum.size:
            moved += np.float32(factor) * momentum[place]
            momentum[place] = moved
        w[place] -= np.float32(lr) * moved
