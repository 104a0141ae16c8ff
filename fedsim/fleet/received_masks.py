"""Which masks each client received last, so that a mask it holds already costs nothing again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.costs import communication
from fedsim.costs.profile import positions_bytes


@dataclass
class ReceivedMasks:
    """Masks that clients hold already: a version number a client, and each version that somebody holds once, as bits."""

    versions: dict[int, Tree] = field(default_factory=dict)
    of: dict[int, int] = field(default_factory=dict)
    own: dict[int, dict[str, int]] = field(default_factory=dict)  # client -> key -> checksum of a mask sent to it alone
    pruned: dict[int, Tree] = field(default_factory=dict)  # version -> its weights that a later version pruned, as bits

    def __post_init__(self) -> None:
        self._newest: Tree = {}
        self._prices: dict[tuple[int, bool], int] = {}  # (held version, whether controls travel) -> bytes

    def copy(self) -> ReceivedMasks:
        """What stands here now, whatever is sent next."""
        own = {client: dict(marks) for client, marks in self.own.items()}
        return ReceivedMasks(dict(self.versions), dict(self.of), own, dict(self.pruned))

    def version(self, masks: Tree) -> None:
        """Takes note of the masks that are sent now: a new version when they differ from the newest."""
        number = max(self.versions, default=-1)
        packed = {key: pack_bits(mask) for key, mask in masks.items()}
        newest = self.versions.get(number, {})
        if newest.keys() != packed.keys() or any(not newest[key].equal(packed[key]) for key in packed):
            number, self._prices = number + 1, {}
            held = set(self.of.values())
            self.versions = {old: bits for old, bits in self.versions.items() if old in held} | {number: packed}
            self.pruned = {old: self._pruned_since(old, packed) for old in self.versions if old < number}
        self._newest = masks

    def price(self, client: int, controls: bool = False) -> int:
        """Bytes that bring the client's masks up to the newest version; afterwards it holds them.

        controls: the client keeps values of weights (SCAFFOLD) which end where a weight is pruned. It also receives which weights were
        pruned since its last masks and are kept again.
        """
        held, newest = self.of.get(client, -1), max(self.versions)
        if held == newest:
            return 0
        if (held, controls) not in self._prices:
            old = self.versions.get(held, {})
            last = {key: unpack_bits(old[key], mask) for key, mask in self._newest.items() if key in old}
            self._prices[held, controls] = communication.length(self._newest, last=last) + (self._regrown(held) if controls else 0)
        self.of[client] = newest
        return self._prices[held, controls]

    def _pruned_since(self, old: int, packed: Tree) -> Tree:
        before = self.pruned.get(old, {})
        gone = {key: bits & ~packed[key] for key, bits in self.versions[old].items() if key in packed}
        return {key: bits | before[key] if key in before else bits for key, bits in gone.items()}

    def _regrown(self, held: int) -> int:
        """Bytes that say which weights of this version were pruned later and are kept now."""
        gone = self.pruned.get(held, {})
        again = {key: int((unpack_bits(gone[key], mask) & mask).sum()) for key, mask in self._newest.items() if key in gone}
        return sum(positions_bytes(count, int(self._newest[key].sum())) for key, count in again.items())


def pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The mask of these bits, in the shape and place of another."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)).view(like.shape).to(like.device)
