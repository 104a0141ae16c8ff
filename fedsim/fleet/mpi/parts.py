"""A rank's part of an order: its packs.

8 bytes each: packs   clients of each pack   the clients, pack after pack      then what these have for themselves (JSON), if they do
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.fleet.messages import Pack
from fedsim.fleet.mpi.communicator import coded
from fedsim.fleet.mpi.tree_buffer import layout
from fedsim.fleet.packing import Ints, Packs

Bytes = NDArray[np.uint8]


def parts_of(packs: Packs, hands: list[Ints]) -> list[Bytes]:
    """The part of every rank. hands: which packs each gets."""
    numbers = _numbers(packs, hands)
    if packs.plain:
        return numbers
    own = (coded([_own(packs[i]) for i in hand.tolist()]) for hand in hands)
    return [np.concatenate(both) for both in zip(numbers, own, strict=True)]


def _numbers(packs: Packs, hands: list[Ints]) -> list[Bytes]:
    """What comes first, cut out of one buffer for all ranks."""
    order, sizes, counts = np.concatenate(hands), packs.sizes, np.array([len(hand) for hand in hands])
    clients = np.add.reduceat(sizes[order], np.cumsum(counts) - counts)  # of each rank
    ends = np.cumsum(1 + counts + clients)
    begins = ends - (1 + counts + clients)
    every = np.empty(ends[-1], np.int64)
    every[begins] = counts
    every[_runs(begins + 1, counts)] = sizes[order]
    every[_runs(begins + 1 + counts, clients)] = packs.ids[_runs(packs.cuts[order], sizes[order])]
    return [every[begin:end].view(np.uint8) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def _runs(begins: Ints, lengths: Ints) -> Ints:
    """begin, begin + 1, … for each of some runs, one after the other."""
    return np.repeat(begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def read_part(part: Bytes) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The clients of each pack, and what these have for themselves."""
    count = int(part[:8].view(np.int64)[0])
    cuts = np.cumsum([1 + count, *part[8 : 8 + 8 * count].view(np.int64)]).tolist()
    clients = [part[8 * begin : 8 * end].view(np.int64).tolist() for begin, end in pairwise(cuts)]
    own = part[8 * cuts[-1] :]
    return clients, json.loads(own.tobytes()) if own.nbytes else [{}] * count


def _own(pack: Pack) -> dict[str, Any]:
    kept = [None if kept is None else layout(kept) for kept in pack.kept]
    calls = pack.calls if any(map(any, pack.calls)) else []
    found = {"calls": calls, "own": layout(pack.own), "kept": kept if any(kept) else []}
    return {name: held for name, held in found.items() if held}
