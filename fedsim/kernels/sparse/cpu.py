"""The inner loops of every sparse layer: kept weights times contiguous runs of images, sums held in registers.

A run is as many float32 as fit a strip of registers; what is left of a row is done in narrower strips. Every kept weight is an
offset into the images it meets and a value, so the loops do no index arithmetic and know no kernel size, stride or padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels.vectors import INT, LONG, SIZE, Strip

STRIPS = ((8, 8), (2, 8), (1, 4), (1, 1))  # vectors of a strip and float32 of a vector: 64, 16, 4 and 1 values wide


def _gather(vectors: int, width: int) -> Any:
    """out[c] = bias + Σ_j value[j] · x[offset[j] + c] for the c of one strip; addresses and a count in, nothing out."""

    @intrinsic
    def gather(context: Any, out: Any, x: Any, offsets: Any, values: Any, count: Any, bias: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            out, x, offsets, values, count, bias = given
            strip = Strip(builder, vectors, width)
            sums = strip.sums(strip.splat(bias))
            out, x, values = (strip.pointer(address) for address in (out, x, values))
            offsets = strip.pointer(offsets, INT)
            with cgutils.for_range(builder, count) as loop:
                run = builder.gep(x, [builder.sext(strip.item(offsets, loop.index), LONG)])
                value = strip.splat(strip.item(values, loop.index))
                for k, held in enumerate(sums):
                    builder.store(strip.multiply_add(value, strip.load(run, k), builder.load(held)), held)
            for k, held in enumerate(sums):
                strip.store(builder.load(held), out, k)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5, types.float32), code

    return gather


def _scatter(vectors: int, width: int) -> Any:
    """Both gradients of one strip of inputs, each run of the output's gradient read once.

    into[c] = Σ_j value[j] · g[offset[j] + c], and found[j] += Σ_c x[c] · g[offset[j] + c].
    """

    @intrinsic
    def scatter(context: Any, into: Any, x: Any, g: Any, offsets: Any, values: Any, found: Any, count: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            into, x, g, offsets, values, found, count = given
            strip = Strip(builder, vectors, width)
            sums = strip.sums(strip.zero)
            into, x, g, values, found = (strip.pointer(address) for address in (into, x, g, values, found))
            offsets = strip.pointer(offsets, INT)
            with cgutils.for_range(builder, count) as loop:
                run = builder.gep(g, [builder.sext(strip.item(offsets, loop.index), LONG)])
                value = strip.splat(strip.item(values, loop.index))
                dots = [strip.zero] * min(2, vectors)  # two chains, for a sum waits for the one before
                for k, held in enumerate(sums):
                    seen = strip.load(run, k)
                    builder.store(strip.multiply_add(value, seen, builder.load(held)), held)
                    dots[k % len(dots)] = strip.multiply_add(seen, strip.load(x, k), dots[k % len(dots)])
                dot = builder.fadd(*dots) if len(dots) > 1 else dots[0]
                place = builder.gep(found, [loop.index])
                builder.store(builder.fadd(builder.load(place), strip.added_up(dot)), place)
            for k, held in enumerate(sums):
                strip.store(builder.load(held), into, k)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), code

    return scatter


def _outputs(gather: Any) -> Callable[..., None]:
    @inlined
    def outputs(out: int, plane: int, x: int, offsets: int, values: int, begins: Any, bias: Any) -> None:  # pragma: no cover - compiled
        """One strip of every output."""
        for o in range(bias.size):
            first = begins[o]
            gather(out + SIZE * o * plane, x, offsets + SIZE * first, values + SIZE * first, begins[o + 1] - first, bias[o])

    return outputs


def _inputs(scatter: Any) -> Callable[..., None]:
    @inlined
    def inputs(
        into: int, x: int, plane: int, g: int, offsets: int, values: int, begins: Any, found: int
    ) -> None:  # pragma: no cover - compiled
        """One strip of every input."""
        for i in range(begins.size - 1):
            first, there = begins[i], SIZE * i * plane
            kept = SIZE * first
            scatter(into + there, x + there, g, offsets + kept, values + kept, found + kept, begins[i + 1] - first)

    return inputs


_OUT64, _OUT16, _OUT4, _OUT1 = (_outputs(_gather(*strip)) for strip in STRIPS)
_IN64, _IN16, _IN4, _IN1 = (_inputs(_scatter(*strip)) for strip in STRIPS)


@kernel
def forward(
    x: Any, offsets: Any, values: Any, begins: Any, bias: Any, out: Any, rows: int, run: int, pitch: int
) -> None:  # pragma: no cover - compiled
    """out (O, rows, run) = bias (O,) + Σ values[j] · x[offsets[j] + r · pitch + c] over the kept j of o, begins[o] <= j < begins[o + 1].

    x, values and out are flat float32, offsets int32, begins (O + 1,) int64. `run` neighbours of a row lie side by side, rows of x
    `pitch` apart.
    """
    px, po, pv, py = x.ctypes.data, offsets.ctypes.data, values.ctypes.data, out.ctypes.data
    plane = rows * run
    for row in range(rows):
        c = 0
        while c < run:
            here, there, left = py + SIZE * (row * run + c), px + SIZE * (row * pitch + c), run - c
            if left >= 64:
                _OUT64(here, plane, there, po, pv, begins, bias)
                c += 64
            elif left >= 16:
                _OUT16(here, plane, there, po, pv, begins, bias)
                c += 16
            elif left >= 4:
                _OUT4(here, plane, there, po, pv, begins, bias)
                c += 4
            else:
                _OUT1(here, plane, there, po, pv, begins, bias)
                c += 1


@kernel
def backward(
    g: Any, offsets: Any, values: Any, begins: Any, x: Any, into: Any, found: Any, start: Any, rows: int, run: int, pitch: Any, plane: int
) -> None:  # pragma: no cover - compiled
    """Gradients of `forward` with respect to x, into `into`, and to the values, added to `found`, from that of its output, g.

    begins (I + 1,) orders the kept weights by input. start and pitch (2,): where the first row of g and of x begins, and how far
    rows lie apart in each; x and `into` lie alike, channels `plane` apart.
    """
    pg, po, pv, px = g.ctypes.data, offsets.ctypes.data, values.ctypes.data, x.ctypes.data
    pi, pf = into.ctypes.data, found.ctypes.data
    for row in range(rows):
        c = 0
        while c < run:
            here = pg + SIZE * (start[0] + row * pitch[0] + c)
            there, left = SIZE * (start[1] + row * pitch[1] + c), run - c
            if left >= 64:
                _IN64(pi + there, px + there, plane, here, po, pv, begins, pf)
                c += 64
            elif left >= 16:
                _IN16(pi + there, px + there, plane, here, po, pv, begins, pf)
                c += 16
            elif left >= 4:
                _IN4(pi + there, px + there, plane, here, po, pv, begins, pf)
                c += 4
            else:
                _IN1(pi + there, px + there, plane, here, po, pv, begins, pf)
                c += 1


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
