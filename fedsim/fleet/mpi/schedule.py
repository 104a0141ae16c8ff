"""Scheduling: longest-processing-time assignment of packs to ranks, and the binomial tree of a broadcast."""

from __future__ import annotations

from heapq import heapreplace

from fedsim.fleet.messages import Pack


def branches(rank: int, ranks: int) -> list[int]:
    """The ranks that `rank` hands a broadcast on to, that of the largest branch first: its number with one more, lower bit set."""
    steps = [1 << bit for bit in reversed(range(ranks.bit_length()))]
    return [rank + step for step in steps if (rank == 0 or step < rank & -rank) and rank + step < ranks]


def children(rank: int, ranks: int) -> list[int]:
    """Of ranks 0 … `ranks`, those that answer through `rank`, that of the smallest branch first: pairs join, then pairs of pairs."""
    return [rank + step for bit in range(ranks.bit_length()) if (step := 1 << bit) + rank <= ranks and (rank == 0 or step < rank & -rank)]


def branch(rank: int, ranks: int) -> range:
    """The ranks of a branch, its root `rank` first, among `ranks` in all."""
    return range(rank, min(rank + (rank & -rank), ranks))


def deal(packs: list[Pack], weights: list[int], ranks: int) -> list[list[int]]:
    """Packs to ranks, heaviest first to the rank with least; every one of the first `ranks` ranks gets one."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for pack in sorted(range(len(packs)), key=lambda pack: (-weights[pack], pack)):
        load, rank = loads[0]
        hands[rank].append(pack)
        heapreplace(loads, (load + max(1, weights[pack]), rank))
    return [sorted(hand) for hand in hands]
