"""Tensors as the arrays that a file holds, and back bit for bit: packed masks, kept weights, chunks of scattered clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any
from zlib import compress

import numpy as np
import torch
from fedsim_analysis import masks
from numpy.typing import NDArray
from torch import Tensor

Tree = dict[str, Tensor]
HALVES = (torch.bfloat16, torch.float16)  # stored as their bits: numpy lacks the first, and netCDF-4 the second


def bits(mask: Tensor) -> NDArray[np.uint8]:
    """ceil(N / 8) bytes, the first entry in the highest bit."""
    return np.packbits(mask.detach().cpu().bool().numpy(), axis=None)


def from_bits(packed: NDArray[np.uint8], shape: Sequence[int]) -> Tensor:
    """The bool tensor that `bits` packed."""
    return torch.from_numpy(np.unpackbits(packed, count=prod(shape)).astype(bool)).reshape(tuple(shape))


def pack(kept: Tree) -> tuple[str, bytes]:
    """(keys and shapes as JSON, the bits of all masks, each mask beginning at a byte)."""
    return json.dumps({key: list(mask.shape) for key, mask in kept.items()}), b"".join(bits(mask).tobytes() for mask in kept.values())


def unpack(layout: str, packed: bytes) -> Tree:
    """The masks that `pack` packed."""
    return {key: torch.from_numpy(mask) for key, mask in masks.unpacked(masks.shapes(layout), packed)}


def store(value: Tensor, mask: Tensor | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
    """(array, what `restore` must know): packed bits of a bool, the values a mask keeps of a weight, anything else in full.

    A weight that is not exactly 0 where its mask is 0 is stored in full.
    """
    value = value.detach().cpu().contiguous()
    about = {"dtype": str(value.dtype).removeprefix("torch."), "shape": json.dumps(list(value.shape)), "masked": 0}
    if value.dtype == torch.bool:
        return bits(value), about
    if mask is not None and mask.shape == value.shape:
        keep = mask.cpu().bool()
        if not value[~keep].view(torch.uint8).any():
            value, about["masked"] = value[keep], 1
    return (value.view(torch.int16) if value.dtype in HALVES else value).numpy(), about


def restore(array: NDArray[Any], about: Mapping[str, Any], mask: Tensor | None = None) -> Tensor:
    """The tensor that `store` was given; ValueError where the array is none that it gave."""
    dtype, shape = getattr(torch, str(about["dtype"]), None), json.loads(about["shape"])
    if not isinstance(dtype, torch.dtype) or not masks.is_shape(shape):
        raise ValueError(f"there is no tensor of dtype {about['dtype']!r} and shape {about['shape']!r}")
    if dtype == torch.bool:
        if array.dtype != np.uint8 or array.shape != (-(-prod(shape) // 8),):
            raise ValueError(f"{array.size} bytes are not the bits of the shape {shape}")
        return from_bits(array, shape)
    stored = torch.from_numpy(np.atleast_1d(array))
    if stored.dtype not in (dtype, torch.int16) or stored.element_size() != dtype.itemsize:
        raise ValueError(f"its values are {array.dtype}, not {about['dtype']}")
    values = stored.view(dtype)
    if not about["masked"]:
        return values.reshape(shape)
    if mask is None or mask.dtype != torch.bool or list(mask.shape) != shape:
        raise ValueError("these are the kept values of a weight; its mask is missing, or is no mask of this shape")
    if values.shape != (kept := int(mask.sum()),):
        raise ValueError(f"{tuple(values.shape)} values were stored, and its mask keeps {kept:,}")
    full = torch.zeros(shape, dtype=dtype)
    full[mask] = values
    return full


def in_order(ids: NDArray[np.int64], measured: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What was measured, by rising ids; the last where a client has several values."""
    real = ~np.isnan(measured)
    if not real.all():
        ids, measured = ids[real], measured[real]
    if (ids[1:] <= ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        ids, measured = ids[order], measured[order]
        last = np.append(ids[1:] != ids[:-1], True)
        ids, measured = ids[last], measured[last]
    return ids, measured


def chunks(ids: NDArray[np.int64], measured: NDArray[np.float64], width: int) -> Iterator[tuple[int, bytes]]:
    """The chunks that hold what was measured, as `in_order` gives it: (first client, compressed values)."""
    touched, place = np.zeros(1, np.int64), np.zeros(1, np.intp)
    if not len(ids) or ids[-1] >= width:
        touched, place = np.unique(ids // width, return_inverse=True)
    block = np.full((len(touched), width), np.nan)  # (chunks, width)
    block[place, ids % width] = measured
    for start, values in zip(touched * width, block, strict=True):
        yield int(start), compress(values.tobytes(), 1)
