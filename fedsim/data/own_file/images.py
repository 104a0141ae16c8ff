"""A user's images as (n, C, H, W) uint8: other types of pixels are brought to 0 … 255 where it is plain how, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.own_file.axes import ORDERS, order_of
from fedsim.errors import BadInput

AT_ONCE = 1 << 22  # pixels that are converted at once
DEPTHS = (10, 12, 14, 16)  # bits of the pixels of cameras and scanners
RIGHT = "it must be uint8, whole numbers in 0 … 255, floats in [0, 1], or 16-bit pixels"
EXACT = 1e-3  # of a level: below it a float stands for a whole level
FAINT = EXACT / 255  # as a share of white: how far rounding may take a float out of [0, 1]


@dataclass
class Range:
    """What values an array of pixels has."""

    low: float = np.inf
    high: float = -np.inf
    whole: bool = True  # no value has a fraction

    def add(self, block: NDArray[Any]) -> None:
        self.low, self.high = min(self.low, float(block.min())), max(self.high, float(block.max()))
        self.whole = self.whole and bool((block.dtype.kind != "f") or (block == np.rint(block)).all())


def read(where: str, arrays: Mapping[str, Any], layout: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The images of each array, and notes about what was converted. All arrays get the same scale. BadInput says what is wrong."""
    orders = {name: order_of(where, name, array.shape, layout) for name, array in arrays.items()}
    shapes = {name: shape_of(array.shape, orders[name][0]) for name, array in arrays.items()}
    first = next(iter(arrays))
    for name, shape in shapes.items():
        if shape[1:] != shapes[first][1:]:
            raise BadInput(f"{where}: images of {name} are {shape[1:]}, those of {first} are {shapes[first][1:]} (C, H, W)")
    factor, note = _scale(where, arrays)
    made, error = {}, 0.0
    for name, array in arrays.items():
        made[name], off = _converted(array, orders[name][0], shapes[name], factor)
        error = max(error, off)
    if note:
        exact = "exactly" if error < EXACT else f"rounded by at most {error:.2f} of a level of 255"
        note = f"{note}, {exact}"
    return made, [text for text in (*(read for _, read in orders.values()), note) if text]


def shape_of(shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """(n, C, H, W) of an array whose axes have this order."""
    return (shape[0], 1, *shape[1:]) if order == "nhw" else tuple(shape[axis] for axis in ORDERS[order])


def _scale(where: str, arrays: Mapping[str, Any]) -> tuple[float, str]:
    """What pixels are multiplied by to lie in 0 … 255, and a note about it, empty where they are uint8 as they stand."""
    kinds = {array.dtype.kind for array in arrays.values()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise BadInput(f"{where}: {name} is an array of {array.dtype}; {RIGHT}")
    if len({"u" if kind == "i" else kind for kind in kinds}) > 1:
        which = " and ".join(f"{name} is {array.dtype}" for name, array in arrays.items())
        raise BadInput(f"{where}: {which}; both must have the same type of pixels")
    if all(array.dtype == np.uint8 for array in arrays.values()):
        return 1.0, ""
    title = " and ".join(arrays)
    if kinds == {"b"}:
        return 255.0, f"{title}: true and false are taken as the pixels 255 and 0"
    found = {name: _range(where, name, array) for name, array in arrays.items()}
    low, high = min(each.low for each in found.values()), max(each.high for each in found.values())
    pixels = f"{title}: {' and '.join(sorted({str(array.dtype) for array in arrays.values()}))} pixels from {low:.6g} to {high:.6g}"
    if kinds == {"f"}:
        return _of_floats(where, found, low, high, pixels)
    if low < 0 or high >= 1 << DEPTHS[-1] or (high > 255 and any(array.dtype.itemsize == 1 for array in arrays.values())):
        raise BadInput(f"{where}: {pixels}; {RIGHT}")
    if high <= 255:
        return 1.0, f"{pixels} are taken as 8-bit pixels, where 255 is white"
    bits = next(bits for bits in DEPTHS if high < 1 << bits)
    return 255 / ((1 << bits) - 1), f"{pixels} are taken as {bits}-bit pixels and scaled to 8 bits, {(1 << bits) - 1} to 255"


def _of_floats(where: str, found: Mapping[str, Range], low: float, high: float, pixels: str) -> tuple[float, str]:
    if low >= -FAINT and high <= 1 + FAINT:
        return 255.0, f"{pixels} are scaled to 8 bits, 1.0 to 255"
    if low >= 0 and high <= 255 and all(each.whole for each in found.values()):
        return 1.0, f"{pixels} are taken as 8-bit pixels, where 255 is white"
    ranges = "; ".join(f"{name} lies in {each.low:.6g} … {each.high:.6g}" for name, each in found.items())
    if len(found) > 1 and any(each.low >= 0 and each.high <= 1 for each in found.values()):
        raise BadInput(f"{where}: {ranges}; both must have the same scale")
    raise BadInput(f"{where}: {ranges}; {RIGHT}; {_hint(low, high)}")


def _hint(low: float, high: float) -> str:
    """What makes floats right that are neither in [0, 1] nor whole."""
    if low >= -1 and high <= 1:
        return "pixels in [-1, 1] become right by (x + 1) / 2"
    if low >= 0 and high <= 255:
        return "pixels with fractions in 0 … 255 become right by x / 255"
    return "undo a normalisation: fedsim normalises itself"


def _range(where: str, name: str, array: Any) -> Range:
    found = Range()
    for begin, block in _blocks(array):
        if block.dtype.kind == "f" and not (finite := np.isfinite(block)).all():
            bad = np.flatnonzero(~finite.reshape(len(block), -1).all(1))
            raise BadInput(f"{where}: {name} has pixels that are no numbers (NaN or infinite), first in image {begin + int(bad[0])}")
        found.add(block)
    return found


def _blocks(array: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    """The array in pieces of some images, with the number of the first."""
    rows = max(1, AT_ONCE // max(1, int(np.prod(array.shape[1:], dtype=np.int64))))
    for begin in range(0, array.shape[0], rows):
        yield begin, np.asarray(array[begin : begin + rows])


def _room(shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of bytes; MemoryError where there is no room for it."""
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"{np.prod(shape, dtype=np.float64):,.0f} bytes of images") from error


def _converted(array: Any, order: str, shape: tuple[int, ...], factor: float) -> tuple[Tensor, float]:
    """(n, C, H, W) uint8, and by how many levels a pixel was rounded at most."""
    made, error = _room(shape), 0.0
    for begin, block in _blocks(array):
        arranged = block[:, None] if order == "nhw" else block.transpose(ORDERS[order])
        if block.dtype != np.uint8:
            scaled = arranged.astype(np.float64) * factor
            arranged = np.rint(scaled)
            error = max(error, float(np.abs(scaled - arranged).max()))
        made[begin : begin + len(block)] = torch.from_numpy(np.array(arranged, dtype=np.uint8, order="C"))
    return made, error
