"""What passes inside a fleet: an order for the cohort, a pack of clients, and the answer of a pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim import draw, wire
from fedsim.core import Sent, Work
from fedsim.exact import Sum, Unit
from fedsim.fault import ClientFault
from fedsim.fleet.batches import Batches, Population, Ready, Round, count_of, evaluation_images, steps_of
from fedsim.gated import STEPS
from fedsim.gates import GATES
from fedsim.masks import ones
from fedsim.net import Net
from fedsim.tree import Tree, row, under
from fedsim.works import Evaluate


@dataclass(frozen=True)
class Site:
    """Where work is done: the same on every rank, but for the rank."""

    net: Net
    population: Population
    seed: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    rank: int = 0
    stopped: Callable[[], bool] = lambda: False  # asked between packs
    ready: Ready = field(default_factory=Ready, compare=False)


@dataclass(frozen=True)
class Order:
    """One run of a work, the same for every pack of the cohort."""

    work: Work
    net: Net
    shared: Tree
    r: int
    n: int  # images of the cohort
    units: dict[str, Unit] = field(default_factory=dict, compare=False)  # of the sums, found when they are first asked for

    def sum(self) -> Sum:
        """An empty sum of this order."""
        return Sum(self.shared, self.n, self.units)


@dataclass(frozen=True)
class Pack:
    """Clients that are worked on together on one rank, in the order of the sorted cohort."""

    clients: list[int]
    own: Tree  # (K, …)
    kept: Sequence[Tree | None]  # None: never visited
    calls: list[list[int]]  # of the work, then of each feed's split: earlier uses by each client in this round


@dataclass
class Answer:
    """What comes back of some packs."""

    total: Sum
    each: dict[int, Tree] = field(default_factory=dict)  # by client
    keep: dict[int, Tree] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)  # mean over the client's steps
    ones: dict[int, dict[str, int]] = field(default_factory=dict)  # kept weights, where a client has masks of its own
    arrived: dict[int, dict[str, int]] = field(default_factory=dict)  # the same, when its work began
    open: dict[int, list[list[int]]] = field(default_factory=dict)  # channels of every group under hard gates, step after step
    up: dict[int, int] = field(default_factory=dict)  # bytes of the report

    def merge(self, other: Answer) -> None:
        self.total.merge(other.total)
        for name in ("each", "keep", "loss", "ones", "arrived", "open", "up"):
            getattr(self, name).update(getattr(other, name))


@dataclass
class Place:
    """Where in a client's work we are, for the message of an error."""

    order: Order
    rank: int
    clients: Sequence[int]
    stage: str = "start"

    @contextmanager
    def told(self) -> Iterator[None]:
        """What goes wrong inside is told with its rank, client, round and step."""
        try:
            yield
        except Exception as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> ClientFault:
        who = f"client {self.clients[0]}" if len(self.clients) == 1 else f"clients {', '.join(map(str, self.clients))}"
        work = type(self.order.work).__name__
        told = f"{type(error).__name__}: {error}"
        if "vmap" in told and "data-dependent" in told:
            told = f"a Work may not branch on a tensor's value (torch.where chooses); the packed fleet says {told}"
        return ClientFault(f"[rank {self.rank}, {who}, round {self.order.r}, {work}.{self.stage}] {told}")


def cut(cohort: Sequence[int], packs: int) -> list[list[int]]:
    """The cohort in `packs` runs whose sizes differ by at most one; fewer when it is smaller."""
    return [part.tolist() for part in np.array_split(np.asarray(cohort), min(packs, len(cohort)))]


def steps(order: Order, site: Site, client: int) -> list[int]:
    """The client's steps in each feed of the work."""
    return [steps_of(feed, count_of(site.population, feed, client)) for feed in order.work.feeds]


def images(site: Site, client: int) -> int:
    """n: a client's training images, or a test shard's images."""
    population = site.population
    if client < population.clients:
        return population.size(client)
    return len(evaluation_images(population, client))


def batches(order: Order, site: Site, pack: Pack, feed: int, rows: list[int]) -> Batches:
    """The batches of a feed for the pack's clients at `rows`."""
    clients, calls = [pack.clients[i] for i in rows], [pack.calls[1 + feed][i] for i in rows]
    key = Round(site.seed, order.r)
    return Batches(site.population, order.work.feeds[feed], clients, calls, key, site.device, site.dtype, site.channels_last, site.ready)


def sent(order: Order, site: Site, pack: Pack) -> Sent:
    """What the pack's clients hold, (K, …) but for shared; kept is laid in by `with_kept`."""
    clients = torch.tensor(pack.clients)
    keys = draw.key(site.seed, type(order.work).__name__, order.r, torch.tensor(pack.calls[0]), clients)
    return Sent(
        order.shared,
        pack.own,
        {},
        torch.tensor([images(site, client) for client in pack.clients], device=site.device),
        torch.tensor([steps(order, site, client) for client in pack.clients], device=site.device).view(len(clients), -1),
        keys.to(site.device),
    )


def row_of(held: Sent, i: int) -> Sent:
    """One client's part of a packed Sent."""
    return Sent(held.shared, row(held.own, i), row(held.kept, i), held.n[i], held.steps[i], held.key[i])


def charged(order: Order) -> bool:
    """Whether the ledger sees the order: evaluation is the simulator's own."""
    return not isinstance(order.work, Evaluate)


def charge_all(answer: Answer, net: Net, clients: Sequence[int], held: Sent, state: Tree, report: Tree) -> None:
    """`charge` for every client of a stacked pack; without masks or gates of its own, a client's bytes and gates are the first one's."""
    before = charge(answer, net, clients[0], row_of(held, 0), row(state, 0), row(report, 0), None)
    own = {**held.own, **held.kept, **state}
    if not (masks_of_one(own) or GATES in own or STEPS in own):
        answer.up.update(dict.fromkeys(clients, before))
        answer.open.update(dict.fromkeys(clients, answer.open[clients[0]]) if clients[0] in answer.open else {})
        return
    for i, client in enumerate(clients[1:], 1):
        before = charge(answer, net, client, row_of(held, i), row(state, i), row(report, i), before)


def masks_of_one(*trees: Tree) -> bool:
    """Whether a client has masks that the cohort does not share."""
    return any(key.startswith("mask/") for held in trees for key in held)


def charge(answer: Answer, net: Net, client: int, one: Sent, state: Tree, report: Tree, before: int | None) -> int:
    """Notes the client's bytes up, its hard gates, and its masks if it has some; without them its bytes are those of the client before.

    `report` is all that reaches the server; a mask in it is priced against the one that the client arrived with.
    """
    seen, private = one.tree(state), masks_of_one(one.own, one.kept, state)
    if private:
        answer.arrived[client] = ones(one.own | one.kept)
        answer.ones[client] = ones(seen)
    if (gates := _hard(seen)) is not None:
        answer.open[client] = net.channels.open(gates)
    if before is None or private:
        before = wire.length(report, seen, under(one.tree({}), "mask/"))
    answer.up[client] = before
    return before


def _hard(held: Tree) -> Tensor | None:
    """(S, n) the hard gates of all steps, or the one for all of them."""
    gates = held[STEPS] if STEPS in held else held[GATES][None] if GATES in held else None
    return gates if gates is not None and gates.dtype == torch.bool else None


def unchanged(start: Tree, state: Tree) -> None:
    """Raises where a state no longer has the keys, shapes and dtypes that `start` fixed."""
    if start.keys() != state.keys():
        odd = sorted(start.keys() ^ state.keys())
        raise KeyError(f"{', '.join(odd)}: start fixes the keys of the state, and a step neither adds nor drops one")
    for key, value in start.items():
        mine = state[key]
        if mine.shape != value.shape or mine.dtype != value.dtype:
            what = f"{tuple(value.shape)} {value.dtype}"
            raise TypeError(f"state {key!r} is {tuple(mine.shape)} {mine.dtype}; start made it {what}, which it keeps")


def finite(losses: Tensor, clients: Sequence[int], place: Place) -> None:
    """Raises for the first step (S,) or (S, A) whose loss is not a number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].tolist()
        place.stage, place.clients = f"step {step[0]}", [clients[step[1] if len(step) > 1 else 0]]
        raise FloatingPointError(f"the loss is {losses[tuple(step)].item()}; a lower train.lr, or a model with norm, may help")
