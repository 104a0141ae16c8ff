"""How a cohort is cut into packs, and what the clients of a pack are given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.core import rng
from fedsim.core.tree import row
from fedsim.federated.protocol import ClientInput
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.client_images import count_of, counts_of, evaluation_images, many_steps_of, sizes_of, steps_of
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder


def cut_cohort(cohort: Sequence[int], packs: int) -> list[list[int]]:
    """The cohort in `packs` runs whose sizes differ by at most one; fewer when it is smaller."""
    return [part.tolist() for part in np.array_split(np.asarray(cohort), min(packs, len(cohort)))]


def steps(order: WorkOrder, site: WorkerContext, client: int) -> list[int]:
    """The client's steps in each feed of the work."""
    return [steps_of(feed, count_of(site.population, feed, client)) for feed in order.work.feeds]


def whole_steps(order: WorkOrder, site: WorkerContext, clients: Sequence[int]) -> np.ndarray:
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
