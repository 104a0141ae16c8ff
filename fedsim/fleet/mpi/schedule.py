"""Scheduling: longest-processing-time assignment of packs to ranks, and the binomial tree of a broadcast."""

from __future__ import annotations

import numpy as np

from fedsim.fleet.messages import Pack


def branches(rank: int, ranks: int) -> list[int]:
    """The ranks that `rank` hands a broadcast on to, that of the largest branch first: its number with one more, lower bit set."""
    steps = [1 << bit for bit in reversed(range(ranks.bit_length()))]
    return [rank + step for step in steps if (rank == 0 or step < rank & -rank) and rank + step < ranks]


def deal(packs: list[Pack], weights: list[int], ranks: int) -> list[list[int]]:
    """Packs to ranks, heaviest first to the rank with least; every one of the first `ranks` ranks gets one."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks, dtype=np.int64)
    for pack in sorted(range(len(packs)), key=lambda pack: (-weights[pack], pack)):
        rank = int(loads.argmin())
        hands[rank].append(pack)
        loads[rank] += max(1, weights[pack])
    return [sorted(hand) for hand in hands]
