"""Static buffers: trees at fixed addresses, which a captured graph reads and writes. New values are copied in. K clients of a pack."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.federated.protocol import ClientInput

ALIGN = 64  # values; keys begin where vector instructions and tensor cores like them to

TreeLayout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def form(tree: Tree) -> TreeLayout:
    """What a tree must have in common with another to be put in its place."""
    return tuple((key, tuple(value.shape), value.dtype) for key, value in sorted(tree.items()))


class StateBuffers:
    """A stacked tree (K, …) in one buffer (K, P) for each dtype; the keys are views of it."""

    def __init__(self, like: Tree) -> None:
        sizes: dict[torch.dtype, int] = {}
        begins = {}
        for key, value in like.items():
            begins[key] = sizes.get(value.dtype, 0)
            sizes[value.dtype] = begins[key] + -(-value[0].numel() // ALIGN) * ALIGN
        some = next(iter(like.values()), torch.zeros(0))
        self.buffers = {dtype: torch.zeros(len(some), size, dtype=dtype, device=some.device) for dtype, size in sizes.items()}
        self.tree = {key: self._view(value, begins[key]) for key, value in like.items()}

    def _view(self, like: Tensor, begin: int) -> Tensor:
        columns = self.buffers[like.dtype][:, begin : begin + like[0].numel()]
        return columns.view(like.shape)

    def take(self, tree: Tree) -> None:
        """The values of a tree of the same form."""
        for key, place in self.tree.items():
            place.copy_(tree[key])

    def copy(self) -> list[Tensor]:
        """The buffers as they are now."""
        return [buffer.clone() for buffer in self.buffers.values()]

    def put_back(self, before: list[Tensor]) -> None:
        for buffer, old in zip(self.buffers.values(), before, strict=True):
            buffer.copy_(old)

    def keep_where(self, active: Tensor, before: list[Tensor]) -> None:
        """Rows that are not `active` (K,) as they were before."""
        for buffer, old in zip(self.buffers.values(), before, strict=True):
            torch.where(active.unsqueeze(1), buffer, old, out=buffer)


class InputBuffers:
    """What K clients hold while they work, at fixed places."""

    def __init__(self, held: ClientInput) -> None:
        self._own, self._kept = StateBuffers(held.own), StateBuffers(held.kept)
        shared = {key: torch.empty_like(value, memory_format=torch.contiguous_format) for key, value in held.shared.items()}
        self.sent = ClientInput(shared, self._own.tree, self._kept.tree, held.n.clone(), held.steps.clone(), held.key.clone())
        self._shared: Tree | None = None

    def take(self, held: ClientInput) -> None:
        """What the clients of the next pack hold; the broadcast only when it is another one."""
        if self._shared is not held.shared:
            for key, place in self.sent.shared.items():
                place.copy_(held.shared[key])
            self._shared = held.shared
        self._own.take(held.own)
        self._kept.take(held.kept)
        for place, value in ((self.sent.n, held.n), (self.sent.steps, held.steps), (self.sent.key, held.key)):
            place.copy_(value)


def remembered(kept: OrderedDict[Any, Any], key: object, make: Callable[[], Any], most: int) -> Any:
    """What stands under the key, made where it is new; the one that was not asked for longest gives way."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
