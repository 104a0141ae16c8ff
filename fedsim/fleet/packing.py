"""How a cohort is cut into packs, and what the clients of a pack are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fedsim.core import rng
from fedsim.core.tree import Tree, row
from fedsim.errors import CannotWrite
from fedsim.federated.protocol import ClientInput
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.client_images import count_of, counts_of, evaluation_images, many_steps_of, sizes_of, steps_of
from fedsim.fleet.messages import Ints, Pack, WorkerContext, WorkOrder


def cuts_of(clients: int, packs: int) -> Ints:
    """(packs + 1,) where each of `packs` runs of clients begins, and the end: their sizes differ by at most one; fewer of fewer clients."""
    count = min(packs, clients)
    return np.arange(count + 1) * (clients // count) + np.minimum(np.arange(count + 1), clients % count)


def cut_cohort(cohort: Sequence[int], packs: int) -> list[list[int]]:
    """The cohort in `packs` runs whose sizes differ by at most one; fewer when it is smaller."""
    cuts = cuts_of(len(cohort), packs).tolist()
    return [list(cohort[begin:end]) for begin, end in pairwise(cuts)]


class KeptStates(Sequence[Tree | None]):
    """The kept states of some clients, taken from where they lie when they are asked for."""

    def __init__(self, kept: Mapping[int, Tree], clients: Sequence[int]) -> None:
        self.kept, self.clients = kept, clients

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, i: Any) -> Any:
        return [held(self.kept, client) for client in self.clients[i]] if isinstance(i, slice) else held(self.kept, self.clients[i])


def held(kept: Mapping[int, Tree], client: int) -> Tree | None:
    """What a client keeps; CannotWrite where that lies on a disk, and is not there any more."""
    try:
        return kept.get(client)
    except OSError as error:
        raise CannotWrite(f"{error.filename or 'a checkpoint'} cannot be read any more: {error.strerror}; the run has stopped") from error


@dataclass(frozen=True)
class Packs(Sequence[Pack]):
    """The packs of a cohort. Each is made when it is asked for: a cohort of many thousands costs rank 0 little."""

    clients: list[int]  # of the cohort, sorted
    cuts: Ints  # (packs + 1,) where each pack begins among them, and their end
    own: Tree  # (K, …)
    kept: Mapping[int, Tree]
    calls: list[Ints]  # of the work, then of each feed's split: (K,) earlier uses by each client in this round

    @cached_property
    def ids(self) -> Ints:
        """(K,) the clients."""
        return np.asarray(self.clients, np.int64)

    @property
    def sizes(self) -> Ints:
        """(packs,) clients of each."""
        return np.diff(self.cuts)

    @property
    def plain(self) -> bool:
        """Whether no client has anything for itself, nor was asked before in this round."""
        return not self.own and not len(self.kept) and not any(calls.any() for calls in self.calls)

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"pack {i} of {len(self)}")
        rows = slice(int(self.cuts[i % len(self)]), int(self.cuts[i % len(self) + 1]))
        mine = self.clients[rows]
        kept: Sequence[Tree | None] = KeptStates(self.kept, mine) if len(self.kept) else [None] * len(mine)
        return Pack(mine, {key: value[rows] for key, value in self.own.items()}, kept, [calls[rows].tolist() for calls in self.calls])


def steps(order: WorkOrder, site: WorkerContext, client: int) -> list[int]:
    """The client's steps in each feed of the work."""
    return [steps_of(feed, count_of(site.population, feed, client)) for feed in order.work.feeds]


def whole_steps(order: WorkOrder, site: WorkerContext, clients: Ints) -> Ints:
    """(K,) the steps of each client in all feeds of the work."""
    found = np.zeros(len(clients), np.int64)
    for feed in order.work.feeds:
        found += many_steps_of(feed, counts_of(site.population, feed, clients))
    return found


def whole_images(site: WorkerContext, clients: Sequence[int]) -> int:
    """The images of all clients together, as `images` counts them."""
    return int(sizes_of(site.population, "train", clients).sum())


def images(site: WorkerContext, client: int) -> int:
    """n: a client's training images, or a test shard's images."""
    population = site.population
    if client < population.clients:
        return population.size(client)
    return len(evaluation_images(population, client))


def batches(order: WorkOrder, site: WorkerContext, pack: Pack, feed: int, rows: list[int]) -> Batches:
    """The batches of a feed for the pack's clients at `rows`."""
    clients, calls = [pack.clients[i] for i in rows], [pack.calls[1 + feed][i] for i in rows]
    key = Round(site.seed, order.r)
    return Batches(site.population, order.work.feeds[feed], clients, calls, key, site.device, site.dtype, site.channels_last, site.ready)


def client_input(order: WorkOrder, site: WorkerContext, pack: Pack) -> ClientInput:
    """What the pack's clients hold, (K, …) but for shared; the fleet lays in what they kept."""
    clients = torch.tensor(pack.clients)
    keys = rng.key(site.seed, order.work.purpose, order.r, torch.tensor(pack.calls[0]), clients)
    return ClientInput(
        order.shared,
        pack.own,
        {},
        torch.tensor([images(site, client) for client in pack.clients], device=site.device),
        torch.tensor([steps(order, site, client) for client in pack.clients], device=site.device).view(len(clients), -1),
        keys.to(site.device),
    )


def client_row(held: ClientInput, i: int) -> ClientInput:
    """One client's part of a pack's input."""
    return ClientInput(held.shared, row(held.own, i), row(held.kept, i), held.n[i], held.steps[i], held.key[i])
