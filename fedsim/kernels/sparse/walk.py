"""How the CPU kernels walk over inputs of one size: which kept weights a stretch of positions meets, and where it begins.

Symbols as in `pattern`. Positions whose taps lie inside the images alike form a cell. Each cell has a list of the kept weights that it
meets, so nothing is padded, and a strided convolution reads its images as they lie. A row of a cell is a segment. A 3x3 kernel has nine
cells, so the lists hold each kept weight up to 5.4 times; where many are kept, images and gradients are padded instead, and one list is
enough. A strip can be pieced together of columns that lie apart for some numbers of images only; for others a strided convolution
sorts its images by the phases of the stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedsim.kernels.sparse.pattern import Pattern, Sweep

Array = NDArray[Any]
Cut = tuple[int, int, Array]  # first and last + 1 of some rows or columns, and which taps (k,) meet the images there
Segment = tuple[int, int, int, int]  # list, first value in the tensor that is read and in the other, values
PIECES = (16, 32)  # images of a column that a strip can be pieced together of
STRIP = 64  # and images of a column that is whole strips by itself
FEW = 512  # kept weights of an output, on average, up to which there are lists for every cell: no layer was faster padded then


@dataclass(frozen=True)
class Lists:
    """Kept weights by cell and channel, and the segments that meet them, as `cpu.forward` and `cpu.backward` read them."""

    offsets: Array  # (n,) int32
    places: Array  # (n,) int32, among the values
    begins: Array  # (cells, channels + 1) int64
    segments: Array  # (s, 4) int64


@dataclass(frozen=True)
class Walk:
    """Both passes over inputs of one size."""

    out: tuple[int, int]  # H', W'
    forward: Lists
    backward: Lists
    piece: int  # values of a piece; 1: they lie side by side
    step: int  # values from one piece to the next
    padded: Sweep | None = None  # where images and gradients are padded first
    phased: bool = False  # whether padded images are sorted by phases


def walk_of(pattern: Pattern, shape: tuple[int, ...]) -> Walk:
    """The walk of a pattern over inputs of shape (I, H, W, B); made once."""
    size = tuple(shape[1:])
    if size not in pattern.walks:
        pattern.walks[size] = _walk(pattern, *size)
    return cast(Walk, pattern.walks[size])


def _walk(pattern: Pattern, height: int, width: int, images: int) -> Walk:
    way, size = pattern.geometry, (height, width)
    few = len(pattern.kept) <= FEW * pattern.outputs or pattern.kernel == (1, 1)
    if way.stride == (1, 1) and not few:
        return _padded(pattern, size, images)
    if way.stride[1] > 1 and images not in PIECES and images % STRIP:
        return _padded(pattern, size, images)
    pattern.check_reach(size, images, pattern.inputs * height * width, pattern.outputs * prod(pattern.out(size)))
    made, split = _Direct(pattern, size, images), way.stride[1] > 1 and images in PIECES
    return Walk(made.out, made.forward(), made.backward(), *((images, way.stride[1] * images) if split else (1, 1)))


# ---- padded
def _padded(pattern: Pattern, size: tuple[int, int], images: int) -> Walk:
    sweep, phased = pattern.sweep(*size, images), pattern.geometry.stride != (1, 1)
    run, pitch = sweep.out[1] * images, sweep.plane[1] * images
    segments = _joined([(0, row * pitch, row * run, run) for row in range(sweep.out[0])])
    forward = _lists(sweep.forward.numpy(), np.arange(len(pattern.kept)), pattern.begins.numpy()[None], segments)
    back: list[Segment] = []
    (height, width), gradient = sweep.plane if phased else size, sweep.gradient[1]
    for region in sweep.regions:
        first = [region.first[axis] + sweep.before[axis] for axis in (0, 1)]
        start = (region.phase * pattern.inputs * height + region.first[0]) * width + region.first[1] if phased else 0
        of_rows = [(first[0] * gradient + first[1] + row * gradient, start + row * width) for row in range(region.rows)]
        back += [(region.phase, read * images, written * images, region.columns * images) for read, written in of_rows]
    backward = _lists(sweep.backward.numpy(), pattern.order.numpy(), pattern.begins_back.numpy(), _joined(back))
    return Walk(sweep.out, forward, backward, 1, 1, sweep, phased)


def _lists(offsets: Array, places: Array, begins: Array, segments: list[Segment]) -> Lists:
    held = np.array(segments, np.int64).reshape(-1, 4)
    return Lists(offsets.astype(np.int32), places.astype(np.int32), np.ascontiguousarray(begins, np.int64), held)


# ---- without padding
class _Direct:
    """Lists for images and gradients as they lie."""

    def __init__(self, pattern: Pattern, size: tuple[int, int], images: int) -> None:
        self.pattern, self.size, self.out, self.images = pattern, size, pattern.out(size), images
        self.way, self.kernel = pattern.geometry, pattern.kernel
        self.by_column = self.way.stride[1] > 1 and images not in PIECES  # a segment for every column

    def forward(self) -> Lists:
        """Of the outputs; x lies `stride` apart."""
        rows, columns = (self._forward_cuts(axis) for axis in (0, 1))
        (taps, (o, i)), (down, across) = (self.pattern.taps, self.pattern.channels), self.way.stride
        reach = [tap * d - p for tap, d, p in zip(taps, self.way.dilation, self.way.padding, strict=True)]
        cells = _Cells(((i * self.size[0] + reach[0]) * self.size[1] + reach[1]) * self.images, o, self.pattern.outputs)
        segments: list[Segment] = []
        for (top, bottom, met), (first, last, inside) in product(rows, columns):
            number = cells.add(met[taps[0]] & inside[taps[1]])
            for row in range(top, bottom):
                there, here = down * row * self.size[1] + across * first, row * self.out[1] + first
                segments += self._segments(number, (there, across), (here, 1), last - first)
        segments.sort(key=lambda segment: segment[2])  # as the output lies in memory
        return cells.lists(segments if across > 1 else _joined(segments))

    def backward(self) -> Lists:
        """Of the inputs, phase by phase; x lies `stride` apart, g does not."""
        taps, (o, i), (down, across) = self.pattern.taps, self.pattern.channels, self.way.stride
        cells = _Cells(np.empty(0, np.int64), i, self.pattern.inputs, np.argsort(i, kind="stable"))
        segments: list[Segment] = []
        for y, x in product(range(down), range(across)):
            rows, columns = (self._shift(axis, phase)[tap] for axis, phase, tap in ((0, y, taps[0]), (1, x, taps[1])))
            cells.offsets = ((o * self.out[0] + rows) * self.out[1] + columns) * self.images
            for (top, bottom, met), (first, last, inside) in product(self._backward_cuts(0, y), self._backward_cuts(1, x)):
                number = cells.add(met[taps[0]] & inside[taps[1]])
                for row in range(top, bottom):
                    there = (down * row + y) * self.size[1] + across * first + x
                    segments += self._segments(number, (row * self.out[1] + first, 1), (there, across), last - first)
        segments.sort(key=lambda segment: segment[2])  # as x lies in memory
        return cells.lists(segments if across > 1 else _joined(segments))

    def _segments(self, number: int, read: tuple[int, int], written: tuple[int, int], columns: int) -> list[Segment]:
        """Of some columns; read and written: the first column's position, and how far columns lie apart."""
        if not self.by_column:
            return [(number, read[0] * self.images, written[0] * self.images, columns * self.images)]
        places = [(read[0] + n * read[1], written[0] + n * written[1]) for n in range(columns)]
        return [(number, a * self.images, b * self.images, self.images) for a, b in places]

    def _forward_cuts(self, axis: int) -> list[Cut]:
        """The outputs along an axis, cut where a tap begins or ends to lie inside the image."""
        stride = self.way.stride[axis]
        reach = np.arange(self.kernel[axis]) * self.way.dilation[axis] - self.way.padding[axis]
        return _cuts(-(reach // stride), (self.size[axis] - 1 - reach) // stride + 1, self.out[axis])

    def _backward_cuts(self, axis: int, phase: int) -> list[Cut]:
        """The inputs stride · n + phase along an axis, cut where a tap begins or ends to lie inside the output."""
        stride, shift = self.way.stride[axis], self._shift(axis, phase)
        meets = (phase + self.way.padding[axis] - np.arange(self.kernel[axis]) * self.way.dilation[axis]) % stride == 0
        return _cuts(np.where(meets, -shift, 0), np.where(meets, self.out[axis] - shift, 0), -((phase - self.size[axis]) // stride))

    def _shift(self, axis: int, phase: int) -> Array:
        """(k,) the output that input stride · n + phase meets by each tap, less n."""
        taps = np.arange(self.kernel[axis]) * self.way.dilation[axis]
        return np.asarray((phase + self.way.padding[axis] - taps) // self.way.stride[axis])


class _Cells:
    """The lists of the cells seen so far."""

    def __init__(self, offsets: Array, channels: Array, count: int, order: Array | None = None) -> None:
        """channels (nnz,): whose list each kept weight stands in, of `count`; order: of the kept weights, by channel."""
        self.offsets, self.channels, self.count, self.order = offsets, channels, count, order
        self._offsets: list[Array] = []
        self._places: list[Array] = []
        self._begins: list[Array] = []
        self._size = 0

    def add(self, met: Array) -> int:
        """The number of a new cell, of the kept weights with met (nnz,)."""
        places = np.flatnonzero(met) if self.order is None else self.order[met[self.order]]
        self._offsets.append(self.offsets[places].astype(np.int32))
        self._places.append(places.astype(np.int32))
        self._begins.append(np.searchsorted(self.channels[places], np.arange(self.count + 1)) + self._size)
        self._size += len(places)
        return len(self._begins) - 1

    def lists(self, segments: list[Segment]) -> Lists:
        offsets, places = (np.concatenate([np.empty(0, np.int32), *held]) for held in (self._offsets, self._places))
        return _lists(offsets, places, np.array(self._begins).reshape(-1, self.count + 1), segments)


def _cuts(first: Array, last: Array, size: int) -> list[Cut]:
    """0 … size, cut so that each tap's places, first … last - 1, are whole parts."""
    first, last = np.clip(first, 0, size), np.clip(last, 0, size)
    edges = np.unique(np.concatenate([[0, size], first, last]))
    return [(int(a), int(b), (first <= a) & (b <= last)) for a, b in pairwise(edges)]


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same list that follow each other in both tensors become one."""
    made: list[Segment] = []
    for number, read, written, length in segments:
        if made and (number, read, written) == (made[-1][0], made[-1][1] + made[-1][3], made[-1][2] + made[-1][3]):
            made[-1] = (*made[-1][:3], made[-1][3] + length)
        else:
            made.append((number, read, written, length))
    return made
