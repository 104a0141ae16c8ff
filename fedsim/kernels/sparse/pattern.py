"""The kept weights of a layer in the form that the kernels read: offsets into the images that each kept weight is multiplied with.

Symbols: O outputs and I inputs of a convolution (k_h, k_w) with stride s, padding p, dilation d and groups; H, W of its input, H', W'
of its output, B images; nnz kept weights. A strided convolution reads one of s x s phases of its padded input, row sY + a of which is
row Y of phase a: so neighbouring outputs read neighbouring inputs whatever the stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.int64]
REACH = 2**31  # values that an int32 offset can address


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; a linear layer is one over a single position."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Region:
    """The inputs of one phase that lie inside the image: rows first[0] …, columns first[1] … of the phase."""

    phase: int
    first: tuple[int, int]
    rows: int
    columns: int


@dataclass(frozen=True)
class Sweep:
    """The offsets of a pattern for one input size and number of images: int32, counted in values."""

    out: tuple[int, int]  # H', W'
    plane: tuple[int, int]  # rows and columns of a phase
    gradient: tuple[int, int]  # of the padded gradient of the output
    before: tuple[int, int]  # rows above and columns left of that gradient
    regions: tuple[Region, ...]
    forward: Tensor  # (nnz,) into the phases (P, I, *plane, B), kept weights by output
    backward: Tensor  # (nnz,) into the padded gradient (O, *gradient, B), relative to an input's position, kept weights by phase and input


class KeptPositions:
    """The kept positions of a weight of any shape; its kept values are (nnz,), in the weight's order."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.kept = mask.reshape(-1).nonzero().squeeze(1).int()  # (nnz,)

    def values(self, weight: Tensor) -> Tensor:
        """(nnz,) the kept entries of a weight."""
        return weight.reshape(-1).index_select(0, self.kept)

    def spread(self, values: Tensor) -> Tensor:
        """A dense tensor with the values (nnz,) at the kept positions and 0 elsewhere."""
        return values.new_zeros(self.mask.numel()).index_copy_(0, self.kept.long(), values).view(self.mask.shape)


class Pattern:
    """The kept positions of one layer's weight (O, I / groups, k_h, k_w) or (O, I); its values are (nnz,), in the weight's order."""

    def __init__(self, mask: Tensor, geometry: Geometry = Geometry()) -> None:
        self.mask, self.geometry = mask, geometry
        self.kept = mask.reshape(-1).nonzero().squeeze(1)  # (nnz,)
        self.outputs = mask.shape[0]
        self.inputs = mask.shape[1] * geometry.groups
        self.kernel = tuple(mask.shape[2:]) or (1, 1)
        o, i, ky, kx = np.unravel_index(self.kept.cpu().numpy(), (*mask.shape[:2], *self.kernel))
        self._o, self._i = o, i + o // (self.outputs // geometry.groups) * mask.shape[1]
        taps = [k * d for k, d in zip((ky, kx), geometry.dilation, strict=True)]
        self._tap = [tap // s for tap, s in zip(taps, geometry.stride, strict=True)]  # rows and columns of a phase
        sides = [np.unique(np.arange(k) * d % s) for k, d, s in zip(self.kernel, geometry.dilation, geometry.stride, strict=True)]
        self.phases = np.array([(a, b) for a in sides[0] for b in sides[1]])  # (P, 2)
        numbers = [np.searchsorted(side, tap % s) for side, tap, s in zip(sides, taps, geometry.stride, strict=True)]
        self._phase = numbers[0] * len(sides[1]) + numbers[1]
        self._sweeps: dict[tuple[int, int, int], Sweep] = {}
        self.walks: dict[tuple[int, ...], Any] = {}  # of the CPU kernels, made by `walk.walk_of`

    @property
    def density(self) -> float:
        return len(self.kept) / self.mask.numel()

    def values(self, weight: Tensor) -> Tensor:
        """(nnz,) the kept entries of a weight."""
        return weight.reshape(-1).index_select(0, self.kept)

    def spread(self, values: Tensor) -> Tensor:
        """A dense tensor with the values (nnz,) at the kept positions and 0 elsewhere."""
        return values.new_zeros(self.mask.numel()).index_copy_(0, self.kept, values).view(self.mask.shape)

    @property
    def channels(self) -> tuple[Array, Array]:
        """(nnz,) output and input of each kept weight."""
        return self._o, self._i

    @property
    def taps(self) -> tuple[Array, Array]:
        """(nnz,) row and column of each kept weight in the kernel."""
        index = self.kept.cpu().numpy()
        return index // self.kernel[1] % self.kernel[0], index % self.kernel[1]

    @cached_property
    def begins(self) -> Tensor:
        """(O + 1,) where each output's kept weights begin."""
        return self._placed(np.searchsorted(self._o, np.arange(self.outputs + 1)))

    @cached_property
    def owners(self) -> Tensor:
        """(nnz,) int32: the output of each kept weight."""
        return self._placed(self._o, torch.int32)

    @cached_property
    def order(self) -> Tensor:
        """(nnz,) the kept weights by phase and input."""
        return self._placed(np.argsort(self._input_of_phase, kind="stable"))

    @cached_property
    def begins_back(self) -> Tensor:
        """(P, I + 1) where each input's kept weights begin in that order, by phase."""
        ends = np.searchsorted(np.sort(self._input_of_phase), np.arange(len(self.phases) * self.inputs + 1))
        rows = np.arange(len(self.phases))[:, None] * self.inputs + np.arange(self.inputs + 1)
        return self._placed(ends[rows])

    @property
    def _input_of_phase(self) -> Array:
        return np.asarray(self._phase * self.inputs + self._i)

    def _placed(self, values: Array, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.kept.device, dtype)

    def sweep(self, height: int, width: int, images: int) -> Sweep:
        """The offsets for inputs of this size; made once."""
        size = height, width, images
        if size not in self._sweeps:
            self._sweeps[size] = self._sweep((height, width), images)
        return self._sweeps[size]

    def out(self, size: tuple[int, int]) -> tuple[int, int]:
        """H', W' for inputs of H, W."""
        way = self.geometry
        parts = zip(size, way.padding, self.kernel, way.dilation, way.stride, strict=True)
        return _pair([(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, d, s in parts])

    def plane(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a phase of padded inputs of H, W, as far as they are read."""
        way = self.geometry
        parts = zip(self.out(size), self.kernel, way.dilation, way.stride, strict=True)
        return _pair([n + d * (k - 1) // s for n, k, d, s in parts])

    def check_reach(self, size: tuple[int, int], images: int, *values: int) -> None:
        """ValueError where so many values of an image, read or written, are too many for int32."""
        if max(values) * images >= REACH:
            raise ValueError(f"{images} images of {size[0]} x {size[1]} in {self.inputs} channels are too many for 32-bit offsets")

    def _sweep(self, size: tuple[int, int], images: int) -> Sweep:
        way, out, plane = self.geometry, self.out(size), self.plane(size)
        ranges = [
            [_inside(int(phase[axis]), size[axis], plane[axis], way.stride[axis], way.padding[axis]) for axis in (0, 1)]
            for phase in self.phases
        ]
        regions = tuple(
            Region(number, (rows[0], columns[0]), rows[1] - rows[0], columns[1] - columns[0])
            for number, (rows, columns) in enumerate(ranges)
            if rows[0] < rows[1] and columns[0] < columns[1]
        )
        reach = [whole - n for whole, n in zip(plane, out, strict=True)]
        before = [max([0, *(reach[axis] - region.first[axis] for region in regions)]) for axis in (0, 1)]
        last = [max([0, *(region.first[axis] + (region.rows, region.columns)[axis] for region in regions)]) for axis in (0, 1)]
        padded = [max(n, end) + around for n, end, around in zip(out, last, before, strict=True)]
        self.check_reach(size, images, len(self.phases) * self.inputs * plane[0] * plane[1], self.outputs * padded[0] * padded[1])
        down, across = self._tap
        forward = (((self._phase * self.inputs + self._i) * plane[0] + down) * plane[1] + across) * images
        backward = ((self._o * padded[0] - down) * padded[1] - across) * images
        ordered = backward[self.order.cpu().numpy()]
        whole = [self._placed(offsets, torch.int32) for offsets in (forward, ordered)]
        return Sweep(out, plane, _pair(padded), _pair(before), regions, whole[0], whole[1])


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _inside(phase: int, size: int, plane: int, stride: int, padding: int) -> tuple[int, int]:
    """First and last + 1 of the places of a phase, in a plane of so many, that are positions of the image: sY + phase - padding."""
    first = max(0, -((phase - padding) // stride))
    return first, min(plane, (size - 1 + padding - phase) // stride + 1)
