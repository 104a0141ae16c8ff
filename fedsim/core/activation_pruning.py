"""How much of the inputs of layers is kept for the backward pass, and what that takes: plain numbers.

Scaled activation pruning: FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification sections 3.4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

CACHES = ("bitmap", "int32")
LAYERS = ("all", "conv")
INDEX = 4  # bytes of an int32


@dataclass(frozen=True)
class ActivationPruning:
    """The largest entries of every input but the first layer's."""

    share: float  # of the entries of a batch, in (0, 1]; 1 - gamma
    layers: str = "all"  # conv: linear layers keep their whole input
    cache: str = "bitmap"  # how positions are kept: a bit an entry, or int32 each

    def bytes(self, entries: int, value: int = 4) -> int:
        """Of the cache of one input."""
        kept = count(entries, self.share)
        return value * kept + (bits(entries) if self.cache == "bitmap" else INDEX * kept)


def count(entries: int, share: float) -> int:
    """k = M - round((1 - share) M), at least 1."""
    return max(1, entries - int((1 - share) * entries + 0.5))


def bits(entries: int) -> int:
    """Bytes of a bit for each of so many entries."""
    return -(-entries // 8)
