"""What one run of a work costs a client: FLOPs and memory, from shapes, masks, gates and numbers of images alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core import keys
from fedsim.core.keys import SCAFFOLD_CONTROL
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.costs import communication, flops, profile
from fedsim.costs.memory import ACTIVATIONS, client_memory, executed_memory
from fedsim.fleet.client_images import Population, counts_of, mean_size, part_of, shown, shown_last, steps_of
from fedsim.fleet.messages import PackResult, WorkOrder
from fedsim.nn import profiler
from fedsim.nn.net import Net

Ints = NDArray[np.int64]
# Weights of the layers that are the client's own, those it arrived with, channels of its gates step after step, entries of its buffers.
Use = tuple[dict[str, int], dict[str, int], list[list[int]] | None, int]

NO_STEP = ("gradients", "dense_gradient", "optimiser")
# Of what a client keeps, this takes memory of its own; kept weights and buffers are counted as part of the model.
BESIDE = (keys.OPTIMISER, keys.GRADIENTS, keys.LOSSES, keys.TOP, keys.INDICES)
UNUSED = {"train": (), "inputs": NO_STEP, "forward": (*NO_STEP, *ACTIVATIONS)}  # memory that each kind of pass does without


@dataclass
class ClientCosts:
    """One client's share of a round."""

    samples: int = 0  # images it saw, each epoch counted
    loss: float = float("nan")  # mean training loss of its last work
    density: float = float("nan")  # whole density of what it trained
    train_flops: int = 0
    extra_flops: int = 0  # of these, what works spend beside the passes of the model
    uncomputed_flops: int = 0  # of these, what was not computed here: of emulated clients whose answer does not count
    flops_at_mean: int = 0  # train_flops if it had the mean number of images
    dense_flops: int = 0  # of the job's local training with the dense model, the measure of the above
    bytes_up: int = 0
    bytes_down: int = 0
    memory: int = 0  # model figure, bytes, the largest of the round
    memory_terms: profile.Breakdown = field(default_factory=profile.Breakdown)  # whose sum it is
    model_memory: int = 0  # the same without activations
    executed: int = 0  # bytes, the most that the rank of this client holds in a step
    steps: int = 0  # batches that it computes on, in all feeds
    dense_equivalent: dict[float, int] = field(default_factory=dict)  # density -> FLOPs of such layers if they were dense; for a clock

    def add(self, run: ClientCosts) -> None:
        """One more run of a work; its bytes and its loss are added where they are known. What a clock reads is of single runs."""
        self.samples += run.samples
        self.train_flops += run.train_flops
        self.extra_flops += run.extra_flops
        self.flops_at_mean += run.flops_at_mean
        self.density, self.dense_flops = run.density, run.dense_flops
        self.model_memory, self.executed = max(self.model_memory, run.model_memory), max(self.executed, run.executed)
        self.hold(run.memory_terms)

    def add_unused(self, down: int, up: int, flops: int, extra_flops: int, memory: profile.Breakdown) -> None:
        """Work of a client whose answer does not count: it was paid, and not computed here."""
        self.bytes_down += down
        self.bytes_up += up
        self.train_flops += flops
        self.extra_flops += extra_flops
        self.uncomputed_flops += flops
        self.hold(memory)
        self.model_memory = max(self.model_memory, memory.without(*ACTIVATIONS).total)

    def hold(self, terms: profile.Breakdown) -> None:
        """Memory that it needs at one time."""
        if terms.total > self.memory:
            self.memory, self.memory_terms = terms.total, terms


class WorkPrices:
    """The costs of clients, without what travels. Nothing is charged here: `of` gives the same whenever it is asked."""

    def __init__(self, model_profile: profile.ModelProfile, population: Population, local: Feed, slots: int, pack: int) -> None:
        self.model_profile, self.population = model_profile, population
        self.local = local  # the job's local training
        self.pack = pack  # clients that a rank trains at once
        self.slots = slots  # values of the optimiser per parameter
        self.timed = False  # whether a clock reads steps and FLOPs by density
        self._mean_sizes: dict[str, int] = {}  # split -> images of a client with the mean number of them
        self._narrow: dict[tuple[tuple[int, int], ...], profile.ModelProfile] = {}  # whole and open channels of each group -> what is open
        self._known: tuple[Net, profile.ModelProfile, list[int]] | None = None

    def of(self, order: WorkOrder, clients: Sequence[int], answer: PackResult) -> list[ClientCosts]:
        """What the run costs each client. Clients alike share one object: it is to be read, and added to others."""
        runs, run = self.distinct(order, clients, answer)
        return [runs[i] for i in run.tolist()]

    def distinct(self, order: WorkOrder, clients: Ints | Sequence[int], answer: PackResult) -> tuple[list[ClientCosts], Ints]:
        """The different costs of the run, and (K,) which of them each client has: one for each number of images and each own model."""
        held, ids = order.net.used(under(order.shared, keys.MASKS)), np.asarray(clients, np.int64)
        counts = np.stack([counts_of(self.population, feed, ids) for feed in (self.local, *order.work.feeds)])
        uses, use = _uses(answer, ids)
        first, run = distinct(*counts, use)
        personal: dict[object, int] = {}  # of clients with equally many weights
        at_mean: dict[object, int] = {}  # of clients with equally many weights and channels
        runs = []
        for i in first.tolist():
            own, arrived, opened, top = uses[use[i]]
            weights = tuple(own.items()), tuple(arrived.items())
            if weights not in personal:
                personal[weights] = _personal(order.shared, answer.keep.get(int(ids[i]), {}))
            kept = _kept_in(order.work.feeds, held | {layer: count for layer, count in arrived.items() if layer in own}, held | own)
            bill = self.run(order, counts[:, i].tolist(), kept, opened, top, personal[weights])
            alike = weights, opened and tuple(map(tuple, opened))
            if alike not in at_mean:
                at_mean[alike] = self.at_mean(order, counts[:, i].tolist(), kept, opened, bill)
            bill.flops_at_mean = at_mean[alike]
            runs.append(bill)
        return runs, run

    def run(
        self,
        order: WorkOrder,
        counts: Sequence[int],
        kept: list[dict[str, int]],
        opened: list[list[int]] | None,
        top: int,
        personal: int,
    ) -> ClientCosts:
        """What a run of the work costs a client with so many images in an epoch of the job's local training and of each feed.

        `kept`: in each feed and at the end, weights of every layer that is not whole; `opened`: channels under hard gates; `top`: entries
        of the buffers that the client's largest gradients went through; `personal`: bytes that it holds beside the model for the
        aggregation, and for itself.
        """
        each = _each(order, kept[-1], opened)
        bill = ClientCosts(density=sum(flops.density(self.model_profile, used) for used in each) / len(each))
        bill.dense_flops = flops.feed_flops(self.model_profile, shown(self.local, counts[0])).total
        for feed, count, held in zip(order.work.feeds, counts[1:], kept[:-1], strict=True):
            trains = feed.cost == "train"
            batch = min(feed.batch, count)
            bill.samples += shown(feed, count) if trains else 0
            bill.train_flops += self.flops_of(feed, count, _each(order, held, opened))
            memory = self._memory(order, feed, batch, held, opened, top if feed.dense_gradient_layers else 0)
            memory = profile.Breakdown(memory | {"personal": personal}).without(*UNUSED[feed.cost])
            bill.hold(memory)
            bill.model_memory = max(bill.model_memory, memory.without(*ACTIVATIONS).total)
            executed = executed_memory(self.profile_of(order.net), batch, _masked(order, held), self.slots, self.pack)
            bill.executed = max(bill.executed, executed.total if trains else 0)
            if self.timed:
                bill.steps += steps_of(feed, count)
                self._add_dense_equivalent(bill.dense_equivalent, order, feed, count, held, opened)
        bill.extra_flops = order.work.extra_flops if any(counts[1:]) else 0
        bill.train_flops += bill.extra_flops
        if self.timed and bill.extra_flops:
            bill.dense_equivalent[1.0] = bill.dense_equivalent.get(1.0, 0) + bill.extra_flops
        return bill

    def _add_dense_equivalent(
        self, into: dict[float, int], order: WorkOrder, feed: Feed, count: int, kept: dict[str, int], opened: list[list[int]] | None
    ) -> None:
        """Adds a feed's FLOPs by density. Of channels that are cut or closed, the smaller layer is the dense one."""
        whole = _each(order, order.net.used({}), opened)
        for images, probed, mine, all_of in self._shares(feed, count, _each(order, kept, opened), whole):
            for share, number in flops.by_density(self.model_profile, images, mine, all_of, feed.cost, feed.dense_gradient_layers, probed):
                into[share] = into.get(share, 0) + number

    def _shares(
        self, feed: Feed, count: int, each: list[dict[str, int]], whole: list[dict[str, int]]
    ) -> Iterator[tuple[int, int, dict[str, int], dict[str, int]]]:
        """Images, those of them that dense gradients are formed of, kept weights, and those of the layers if they had no mask."""
        images = shown(feed, count)
        if len(each) == 1:
            seen = shown_last(feed, count, feed.dense_gradient_steps) if feed.dense_gradient_steps else images
            yield images, seen if feed.dense_gradient_layers else 0, each[0], whole[0]
            return
        for step, number in enumerate(_by_step(feed, count)):
            yield number, 0, each[min(step, len(each) - 1)], whole[min(step, len(whole) - 1)]

    def at_mean(
        self, order: WorkOrder, counts: Sequence[int], kept: list[dict[str, int]], opened: list[list[int]] | None, run: ClientCosts
    ) -> int:
        """FLOPs of such a client if it had the mean number of images; `run`: what it costs with `counts`."""
        mean = tuple(self._mean_count(feed) for feed in order.work.feeds)
        if mean == tuple(counts[1:]):
            return run.train_flops
        feeds = zip(order.work.feeds, mean, kept[:-1], strict=True)
        passes = sum(self.flops_of(feed, count, _each(order, held, opened)) for feed, count, held in feeds)
        return passes + (order.work.extra_flops if any(mean) else 0)

    def _mean_count(self, feed: Feed) -> int:
        if feed.split not in self._mean_sizes:
            self._mean_sizes[feed.split] = mean_size(self.population, feed.split)
        return part_of(feed, self._mean_sizes[feed.split])

    def flops_of(self, feed: Feed, count: int, each: list[dict[str, int]]) -> int:
        """Of a feed with `count` images an epoch; `each`: weights in use at every step (the last one's in those beyond), or at all."""
        images = shown(feed, count)
        if len(each) == 1:
            seen = shown_last(feed, count, feed.dense_gradient_steps) if feed.dense_gradient_steps else images
            return flops.feed_flops(self.model_profile, images, each[0], feed.cost, feed.dense_gradient_layers, seen).total
        shares = _by_step(feed, count)
        used = [each[min(step, len(each) - 1)] for step in range(len(shares))]
        return sum(flops.feed_flops(self.model_profile, n, kept, feed.cost).total for n, kept in zip(shares, used, strict=True))

    def _memory(
        self, order: WorkOrder, feed: Feed, batch: int, kept: dict[str, int], opened: list[list[int]] | None, top: int
    ) -> profile.Breakdown:
        """The described client's: under gates it holds the whole model, and gradients and activations of the open channels.

        Where the work exchanges the open channels alone, it holds no more of the model either: a smaller network.
        """
        model_profile, masked = self.profile_of(order.net), _masked(order, kept)
        if opened and order.work.compact:
            terms = [self._narrow_memory(order, feed, batch, masked, row, top) for row in opened]
            return max(terms, key=lambda found: found.total)
        memory = client_memory(
            model_profile, masked, batch, self.slots, feed.dense_gradient_layers, top=top, beside=order.work.extra_memory
        )
        if not opened:
            return memory
        widths, per = order.net.channels.widths, self._per_channel(order.net)
        closed = [sum((width - row[i]) * per[i] for i, width in enumerate(widths)) for row in opened]
        used = [client_memory(model_profile, masked | order.net.channels.used(row), slots=self.slots) for row in opened]
        fewer = {"gradients": max(terms["gradients"] for terms in used), "activations": memory["activations"] - batch * min(closed)}
        return profile.Breakdown(memory | fewer)

    def profile_of(self, net: Net) -> profile.ModelProfile:
        """The job's own, or that of what a cut has left."""
        return self._of_cut(net)[0] if net.kept else self.model_profile

    def _narrow_memory(
        self, order: WorkOrder, feed: Feed, batch: int, masked: dict[str, int], open: Sequence[int], top: int
    ) -> profile.Breakdown:
        """Of a client that holds so many channels of each group alone; its profile is remembered."""
        channels = order.net.channels
        mark = tuple(zip(channels.widths, open, strict=True))
        if mark not in self._narrow:
            kept = {group.name: torch.arange(count) for group, count in zip(channels.groups, open, strict=True)}
            small = channels.compact(order.net.original, kept).float()
            self._narrow[mark] = profiler.profile(small, self.population.train.shape, order.net.activation_pruning)
        touched = channels.used(open)
        whole = {layer: count for layer, count in masked.items() if layer not in touched}
        dense, beside = feed.dense_gradient_layers, order.work.extra_memory
        return client_memory(self._narrow[mark], whole, batch, self.slots, dense, top=top, beside=beside)

    def _per_channel(self, net: Net) -> list[int]:
        return self._of_cut(net)[1]

    def _of_cut(self, net: Net) -> tuple[profile.ModelProfile, list[int]]:
        """The model_profile of a net, and the bytes its activations lose with every closed channel; remembered for the last net."""
        if self._known is None or self._known[0] is not net:
            shape = self.population.train.shape
            self._known = net, profiler.profile(net.plain(net.initial).float(), shape, net.activation_pruning), net.per_channel(shape)
        return self._known[1:]


def _uses(answer: PackResult, clients: Ints) -> tuple[list[Use], Ints]:
    """What clients use of the model, and (K,) which of these each client uses: all the same where none has a model of its own."""
    if not (answer.ones or answer.open):
        return [({}, {}, None, _entries(answer.each.get(int(clients[0]), {})))], np.zeros(len(clients), np.int64)
    places: dict[object, int] = {}
    uses: list[Use] = []
    use = []
    for client in clients.tolist():
        own = {name.removesuffix(".weight"): count for name, count in answer.ones.get(client, {}).items()}
        arrived = {name.removesuffix(".weight"): count for name, count in answer.arrived.get(client, {}).items() if own}
        opened, top = answer.open.get(client), _entries(answer.each.get(client, {}))
        mark = tuple(own.items()), tuple(arrived.items()), opened and tuple(map(tuple, opened)), top
        if mark not in places:
            places[mark] = len(uses)
            uses.append((own, arrived, opened, top))
        use.append(places[mark])
    return uses, np.array(use, np.int64)


def distinct(*columns: Ints) -> tuple[Ints, Ints]:
    """(D,) where each distinct row of some columns (K,) stands first, and (K,) which of them every row is."""
    key = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if len(column) and (column != column[0]).any():
            _, more = np.unique(column, return_inverse=True)
            _, key = np.unique(key * (int(more.max()) + 1) + more, return_inverse=True)
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    return first, which


def _kept_in(feeds: Sequence[Feed], first: dict[str, int], last: dict[str, int]) -> list[dict[str, int]]:
    """In each feed, and at the end: what a client looks at before it trains, it looks at with the masks it came with."""
    before = next((i for i, feed in enumerate(feeds) if feed.cost != "forward"), 0)
    return [first if i < before else last for i in range(len(feeds))] + [last]


def _by_step(feed: Feed, count: int) -> list[int]:
    """Images of each step of a feed with `count` images an epoch."""
    ends = [shown_last(feed, count, last) for last in range(steps_of(feed, count) + 1)]  # images of the last steps
    return [more - less for less, more in pairwise(ends)][::-1]


def _each(order: WorkOrder, kept: dict[str, int], opened: list[list[int]] | None) -> list[dict[str, int]]:
    """Weights in use, step after step, or once where they are the same in all."""
    return [kept | order.net.channels.used(row) for row in opened] if opened else [kept]


def _personal(shared: Tree, kept: Tree) -> int:
    """Bytes that a client holds beside the model for the aggregation, and keeps for its training."""
    return communication.length(under(shared, SCAFFOLD_CONTROL) | under(kept, *BESIDE), under({**shared, **kept}, keys.MASKS))


def _masked(order: WorkOrder, kept: dict[str, int]) -> dict[str, int]:
    """Of the weights in use, those of layers with a mask."""
    whole = order.net.used({})
    return {layer: count for layer, count in kept.items() if whole.get(layer) != count}


def _entries(each: Tree) -> int:
    """Entries, each an index and a value, of the buffers whose positions a client sends; it may keep the values to itself."""
    return sum(value.numel() for value in under(each, keys.TOP_INDEX).values())
