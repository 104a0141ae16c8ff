"""Scheduling: longest-processing-time assignment of packs to ranks, and the binomial tree of a broadcast."""

from __future__ import annotations

from heapq import heapreplace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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


def deal(weights: NDArray[np.int64], ranks: int) -> list[NDArray[np.int64]]:
    """Packs to ranks, heaviest first to the rank with least; every one of the first `ranks` ranks gets one.

    weights: (packs,) how much work each is. Of equal packs every rank gets one after the other, as long as no rank has more work than
    another by a whole pack; so thousands of them are dealt as fast as a few.
    """
    order = np.argsort(-weights, kind="stable")
    weights = np.maximum(weights[order], 1)
    whose = np.empty(len(order), np.int64)  # of the packs, heaviest first
    loads, high = [(0, rank) for rank in range(ranks)], 0  # a heap, and the largest load
    ends = [*(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(order)]
    for begin, end in pairwise([0, *ends]):
        weight, at = int(weights[begin]), begin
        while at < end:
            turns = (end - at) // ranks
            if turns and high - loads[0][0] < weight:
                loads.sort()
                whose[at : at + turns * ranks] = np.tile([rank for _, rank in loads], turns)
                loads = [(load + turns * weight, rank) for load, rank in loads]
                at, high = at + turns * ranks, high + turns * weight
            else:
                load, whose[at] = loads[0]
                heapreplace(loads, (load + weight, int(whose[at])))
                at, high = at + 1, max(high, load + weight)
    rows = np.lexsort((order, whose))
    cuts, hands = np.searchsorted(whose[rows], np.arange(ranks + 1)).tolist(), order[rows]
    return [hands[begin:end] for begin, end in pairwise(cuts)]
