"""The masks in a run file: packed bits, stored in the rounds in which they changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from zlib import crc32

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked, checksums
from fedsim_analysis.checked import need

GROUP = "masks"
PREFIX = "mask/"  # of the keys of masks
NONE = ("{}", b"")  # what is in force where no mask was stored
Packed = tuple[str, bytes]  # JSON of each key and its shape, in order; the bits of all masks, each beginning at a byte


def rounds(names: Iterable[str]) -> list[int]:
    """The names that are numbers of rounds."""
    return [int(name) for name in names if name.isascii() and name.isdigit() and len(name) <= 18]


def stored_rounds(file: h5py.File) -> list[int]:
    """The rounds, rising, after which other masks were in force than before."""
    return sorted(rounds(checked.needed(file, GROUP)))


def in_force(file: h5py.File, r: int, known: Sequence[str] | None = None) -> Packed:
    """The masks in force after round `r`. `known`: what has checksums, if the caller knows."""
    stored = [number for number in stored_rounds(file) if number <= r]
    if not stored:
        checksums.check_in_force(file, GROUP, r, checksum_of(NONE), known)
        return NONE
    name = f"{GROUP}/{stored[-1]}"
    mask = checked.dataset(file, name, "u", (None,))
    tensors, packed = checked.attribute(mask, "tensors"), mask[()].tobytes()
    checksums.check(mask, str(tensors).encode(), packed)
    expected = sum(-(-prod(shape) // 8) for shape in shapes(tensors, name).values())
    need(len(packed) == expected, f"{name} has {len(packed):,} bytes, and its masks have {expected:,}")
    checksums.check_in_force(file, GROUP, r, checksum_of((tensors, packed)), known)
    return tensors, packed


def checksum_of(packed: Packed) -> int:
    return crc32(packed[1], crc32(packed[0].encode()))


def shapes(layout: str, name: str = GROUP) -> dict[str, list[int]]:
    """The shape of each mask, from the JSON of `Packed`."""
    found: dict[str, list[int]] = checked.from_json(layout, f"the attribute 'tensors' of {name}")
    need(all(map(is_shape, found.values())), f"the attribute 'tensors' of {name} has shapes that are none")
    return found


def is_shape(shape: object) -> bool:
    """Whether it is a list of lengths."""
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) and len(shape) <= 16


def unpacked(sizes: Mapping[str, list[int]], packed: bytes) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each mask, by its key. `sizes`: of all of them, in their order."""
    begin = 0
    for key, shape in sizes.items():
        end = begin + -(-prod(shape) // 8)
        bits = np.unpackbits(np.frombuffer(packed[begin:end], np.uint8), count=prod(shape))
        yield key, bits.astype(bool).reshape(shape)
        begin = end
