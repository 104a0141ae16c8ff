"""Which masks each client received last, so that a mask it holds already costs nothing again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.costs import communication


@dataclass
class ReceivedMasks:
    """Masks that clients hold already: a version number a client, and each version that somebody holds once, as bits."""

    versions: dict[int, Tree] = field(default_factory=dict)
    of: dict[int, int] = field(default_factory=dict)
    own: dict[int, dict[str, int]] = field(default_factory=dict)  # client -> key -> checksum of a mask sent to it alone

    def __post_init__(self) -> None:
        self._newest: Tree = {}
        self._prices: dict[tuple[int, int], int] = {}  # (held version, newest version) -> bytes

    def copy(self) -> ReceivedMasks:
        """What stands here now, whatever is sent next."""
        return ReceivedMasks(dict(self.versions), dict(self.of), {client: dict(marks) for client, marks in self.own.items()})

    def version(self, masks: Tree) -> None:
        """Takes note of the masks that are sent now: a new version when they differ from the newest."""
        number = max(self.versions, default=-1)
        packed = {key: pack_bits(mask) for key, mask in masks.items()}
        newest = self.versions.get(number, {})
        if newest.keys() != packed.keys() or any(not newest[key].equal(packed[key]) for key in packed):
            number, self._prices = number + 1, {}
            held = set(self.of.values())
            self.versions = {old: bits for old, bits in self.versions.items() if old in held} | {number: packed}
        self._newest = masks

    def price(self, client: int) -> int:
        """Bytes that bring the client's masks up to the newest version; afterwards it holds them."""
        held, newest = self.of.get(client, -1), max(self.versions)
        if held == newest:
            return 0
        if (held, newest) not in self._prices:
            old = self.versions.get(held, {})
            last = {key: unpack_bits(old[key], mask) for key, mask in self._newest.items() if key in old}
            self._prices[held, newest] = communication.length(self._newest, last=last)
        self.of[client] = newest
        return self._prices[held, newest]


def pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The mask of these bits, in the shape and place of another."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)).view(like.shape).to(like.device)
