"""Which masks each client received last, so that a mask it holds already costs nothing again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import masks
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

    def prices(self, clients: NDArray[np.int64], controls: bool = False) -> NDArray[np.int64]:
        """(K,) bytes that bring the masks of each client up to the newest version; afterwards they hold them.

        controls: clients keep values of weights (SCAFFOLD) which end where a weight is pruned. They also receive which weights were
        pruned since their last masks and are kept again.
        """
        ids, newest = clients.tolist(), max(self.versions)
        held, which = np.unique(np.array([self.of.get(client, -1) for client in ids], np.int64), return_inverse=True)
        prices = np.array([self._price(version, newest, controls) for version in held.tolist()], np.int64)
        self.of.update(dict.fromkeys(ids, newest))
        return prices[which]

    def _price(self, held: int, newest: int, controls: bool) -> int:
        """Bytes for a client with masks of version `held`."""
        if held == newest:
            return 0
        if (held, controls) not in self._prices:
            old = self.versions.get(held, {})
            last = {key: unpack_bits(old[key], mask) for key, mask in self._newest.items() if key in old}
            self._prices[held, controls] = communication.length(self._newest, last=last) + (self._regrown(held) if controls else 0)
        return self._prices[held, controls]

    def _pruned_since(self, old: int, packed: Tree) -> Tree:
        before = self.pruned.get(old, {})
        gone = {key: bits & ~packed[key] for key, bits in self.versions[old].items() if key in packed}
        return {key: bits | before[key] if key in before else bits for key, bits in gone.items()}

    def _regrown(self, held: int) -> int:
        """Bytes that say which weights of this version were pruned later and are kept now."""
        gone = self.pruned.get(held, {})
        again = {key: masks.count(unpack_bits(gone[key], mask) & mask) for key, mask in self._newest.items() if key in gone}
        return sum(positions_bytes(count, masks.count(self._newest[key])) for key, count in again.items())


def pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The mask of these bits, in the shape and place of another."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)).view(like.shape).to(like.device)
