"""Bytes alive: every storage that torch makes inside the block, until it is freed."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that exist at once; `peak` is the most, `sizes` the storages at that moment."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}  # there before, so not counted
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._look()
        return out

    def _look(self) -> None:
        self.held = {address: (ref, size) for address, (ref, size) in self.held.items() if not ref.expired()}
        now = sum(size for _, size in self.held.values())
        if now > self.peak:
            self.peak, self.sizes = now, sorted((size for _, size in self.held.values()), reverse=True)

    def of_size(self, size: int) -> int:
        """Storages of so many bytes that are alive now."""
        self._look()
        return sum(held == size for _, held in self.held.values())
