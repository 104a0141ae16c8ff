"""Trees as one buffer of bytes and a layout that says what is in it: how tensors pass between ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.core.tree import Tree

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
Layout = list[tuple[str, str, list[int]]]  # key, dtype, shape


def layout(tree: Tree) -> Layout:
    """What `flat` puts in a row."""
    return [(key, str(value.dtype), list(value.shape)) for key, value in tree.items()]


def flat(tree: Tree) -> np.ndarray:
    """All tensors as one buffer of bytes."""
    parts = [value.detach().cpu().contiguous().flatten().view(torch.uint8) for value in tree.values()]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.uint8)


def unflat(rows: Layout, buffer: np.ndarray | Tensor, device: str = "cpu") -> Tree:
    """The inverse of `flat`; copies, on a device."""
    tree: Tree = {}
    begin, whole = 0, buffer if isinstance(buffer, Tensor) else torch.from_numpy(buffer)
    for key, name, shape in rows:
        dtype = DTYPES[name]
        end = begin + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tree[key] = whole[begin:end].clone().view(dtype).view(shape).to(device)
        begin = end
    return tree


def size_of(rows: Layout) -> int:
    """Bytes of a buffer with this layout."""
    return sum(int(np.prod(shape, dtype=np.int64)) * DTYPES[name].itemsize for _, name, shape in rows)
