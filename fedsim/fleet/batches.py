"""The batches of a pack of clients for one feed: which images, in which order, normalised and augmented as seeded tensor work.

Shapes: K clients of the pack, A of them still active at a step, S steps, B images of a batch, n images of a client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim import draw
from fedsim.core import Data, Feed
from fedsim.fleet.augment import cut_out, moved, noisy, rotated

READY = 1 << 26  # bytes of float images of a pack up to which they are normalised once, not per batch


class Population(Protocol):
    """Whose images a fleet reads; the data room makes it."""

    @property
    def train(self) -> Data: ...
    @property
    def test(self) -> Data: ...
    @property
    def shards(self) -> Mapping[str, Any]: ...  # "train", "held", "test": .of(client) -> sorted indices, .size(client), .sizes()
    @property
    def clients(self) -> int: ...
    @property
    def augment(self) -> tuple[str, ...]: ...
    @property
    def crop_pad(self) -> int: ...
    @property
    def cutout(self) -> int: ...
    @property
    def skew(self) -> Any: ...  # None, or .noise(client) -> standard deviation and .angle(client) -> degrees
    def size(self, client: int) -> int: ...


@dataclass(frozen=True)
class Step:
    """One step of a pack: the first `active` clients take part."""

    active: int
    x: Tensor  # (A, B, C, H, W)
    y: Tensor  # (A, B)
    real: Tensor | None  # (A, B)
    t: int


@dataclass(frozen=True)
class Round:
    """What keys the draws of a round."""

    seed: int
    r: int


def images_of(population: Population, split: str, client: int) -> np.ndarray:
    """A client's images in a split as sorted indices; clients beyond the population are fixed shards of the global test set."""
    if client >= population.clients:
        return evaluation_images(population, client)
    return population.shards["train" if split == "probe" else split].of(client)


def evaluation_shards(population: Population) -> int:
    """Number of shards of the global test set: enough for many ranks, never empty."""
    return min(len(population.test), max(8, min(64, -(-len(population.test) // 256))))


def evaluation_images(population: Population, client: int) -> np.ndarray:
    """The global test images of a pseudo-client."""
    cuts = np.linspace(0, len(population.test), evaluation_shards(population) + 1).astype(np.int64)
    return np.arange(cuts[client - population.clients], cuts[client - population.clients + 1])


def count_of(population: Population, feed: Feed, client: int) -> int:
    """Number of images that the feed shows the client in one epoch."""
    whole = len(images_of(population, feed.split, client))
    return whole if feed.share == 1 else min(whole, max(int(feed.share * whole + 1e-9), min(feed.batch, whole)))


def steps_of(feed: Feed, count: int) -> int:
    """Steps of the feed for a client with `count` images; none without images."""
    return 0 if count == 0 else feed.steps or feed.epochs * -(-count // feed.batch)


def shown(feed: Feed, count: int) -> int:
    """Images that the feed shows the client in all, incomplete last batches at their true size."""
    if count == 0:
        return 0
    epochs, rest = divmod(steps_of(feed, count), -(-count // feed.batch))
    return epochs * count + rest * feed.batch


def shown_last(feed: Feed, count: int, last: int) -> int:
    """Images of the feed's `last` steps."""
    if count == 0:
        return 0
    before = steps_of(feed, count) - last
    return shown(feed, count) - (shown(replace(feed, epochs=0, steps=before), count) if before > 0 else 0)


class Batches:
    """The steps of `feed` for the given clients; those with more steps come first, so that a pack narrows as clients end."""

    def __init__(
        self,
        population: Population,
        feed: Feed,
        clients: list[int],
        calls: list[int],
        key: Round,
        device: str,
        dtype: torch.dtype,
        channels_last: bool = False,
    ) -> None:
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.population, self.feed, self.key = population, feed, key
        self.device, self.dtype = device, dtype
        self.data: Data = population.test if feed.split == "test" else population.train
        own = [images_of(population, feed.split, client) for client in clients]
        self.counts = [count_of(population, feed, client) for client in clients]
        self.steps = [steps_of(feed, count) for count in self.counts]
        if self.steps != sorted(self.steps, reverse=True):
            raise ValueError("clients come with falling numbers of steps")
        self.clients = torch.tensor(clients)
        self.calls = torch.tensor(calls)
        self.images = torch.zeros(len(clients), max(map(len, own)), dtype=torch.int64)  # (K, n)
        for row, images in zip(self.images, own, strict=True):
            row[: len(images)] = torch.from_numpy(np.ascontiguousarray(images))
        self._choose([len(images) for images in own])
        self.plan = self._plan()  # (K, S, B), positions among the client's images, -1 where there is none
        self.scale = torch.tensor(self.data.std, dtype=dtype, device=device).view(-1, 1, 1)
        self.shift = torch.tensor(self.data.mean, dtype=dtype, device=device).view(-1, 1, 1)
        self.augmented = bool(population.augment) and feed.augment and feed.split == "train"
        self.ready = self._ready()
        self.labels = self.data.labels(self.images.flatten()).to(self.device)
        self.begins = (torch.arange(len(clients)) * self.images.shape[1]).view(-1, 1)
        self.widths = (self.plan >= 0).sum(-1).numpy()  # (K, S), images of every batch

    def _choose(self, whole: list[int]) -> None:
        """A share of a split is a random subset that the client draws once and for all."""
        if self.feed.share == 1:
            return
        keys = draw.key(self.key.seed, "share", self.clients)
        for row, size, count, key in zip(self.images, whole, self.counts, keys, strict=True):
            row[:count] = row[draw.permutation(key, size)[:count].sort().values].clone()
        self.images = self.images[:, : max(self.counts)].contiguous()

    def _plan(self) -> Tensor:
        """Which image every step sees: a fresh order every epoch; test images in their stored order."""
        batch, most = min(self.feed.batch, max(1, *self.counts)), max(self.steps)
        per_epoch = [max(1, -(-count // batch)) for count in self.counts]
        width = max(self.counts)
        counts = torch.tensor(self.counts).unsqueeze(1)
        places = torch.arange(width)
        plan = torch.full((len(self.steps), most, batch), -1)
        for epoch in range(max(-(-steps // each) for steps, each in zip(self.steps, per_epoch, strict=True))):
            order = self._order(epoch, width, counts)
            order = torch.where(places < counts, order, -1)  # (K, n)
            padded = torch.nn.functional.pad(order, (0, -width % batch), value=-1).view(len(self.steps), -1, batch)
            for k, (steps, each) in enumerate(zip(self.steps, per_epoch, strict=True)):
                begin, end = epoch * each, min((epoch + 1) * each, steps)
                if begin < end:
                    plan[k, begin:end] = padded[k, : end - begin]
        return plan

    def _order(self, epoch: int, width: int, counts: Tensor) -> Tensor:
        places = torch.arange(width).expand(len(self.steps), width)
        if self.feed.split == "test":
            return places
        calls = 0 if self.feed.split == "probe" else self.calls  # models that are compared are compared on the same batches
        keys = draw.key(self.key.seed, self.feed.split, self.key.r, calls, self.clients, epoch)
        numbers = draw.bits(keys, width)
        return torch.where(places < counts, numbers, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)

    def _ready(self) -> Tensor | None:
        """All images of the pack as normalised floats, when they are few, are not augmented, and most of them are shown."""
        size = self.images.numel() * int(np.prod(self.data.shape)) * 4
        few = self.plan.shape[1] * self.feed.batch < self.images.shape[1]
        if self.augmented or self.population.skew is not None or size > READY or few:
            return None
        return self._normalised(self._float(self.images.flatten()))

    def _float(self, index: Tensor) -> Tensor:
        return self.data.images(index).to(self.device).to(self.dtype).div_(255)

    def _normalised(self, x: Tensor) -> Tensor:
        return x.sub_(self.shift).div_(self.scale)

    def __iter__(self) -> Iterator[Step]:
        """The steps of the pack, clients together; a batch is as wide as its widest client's."""
        for t in range(self.plan.shape[1]):
            yield self._step(0, sum(steps > t for steps in self.steps), t)

    def alone(self, k: int) -> Iterator[Step]:
        """The steps of the client at row `k`, never padded."""
        for t in range(self.steps[k]):
            yield self._step(k, k + 1, t)

    def _step(self, begin: int, end: int, t: int) -> Step:
        """Step `t` of the clients at rows begin … end-1."""
        widths = self.widths[begin:end, t]
        width = int(widths.max())
        places = self.plan[begin:end, t, :width]
        padded = int(widths.min()) < width
        index = ((places.clamp(min=0) if padded else places) + self.begins[begin:end]).flatten()
        x = self._images(index, begin, end, t).contiguous(memory_format=self.layout)
        real = (places >= 0).to(self.device, self.dtype) if padded else None
        return Step(end - begin, x.view(end - begin, width, *x.shape[1:]), self.labels[index].view(end - begin, width), real, t)

    def _images(self, index: Tensor, begin: int, end: int, t: int) -> Tensor:
        if self.ready is not None:
            return self.ready[index]
        images = self.images.flatten()[index]
        x = self._skewed(self._float(images), images, begin, end)
        if not self.augmented:
            return self._normalised(x)
        names, population = self.population.augment, self.population
        keys = self._keys(len(index) // (end - begin), begin, end, t).to(self.device)
        x = self._normalised(moved(x, keys, population.crop_pad if "crop" in names else 0, "flip" in names))
        return cut_out(x, keys, population.cutout) if "cutout" in names else x

    def _keys(self, width: int, begin: int, end: int, t: int) -> Tensor:
        """A key for every image of the step, (A · B,)."""
        keys = draw.key(self.key.seed, "augment", self.key.r, self.calls[begin:end], self.clients[begin:end], t)
        return draw.fold(keys.unsqueeze(1), torch.arange(width)).flatten()

    def _skewed(self, x: Tensor, images: Tensor, begin: int, end: int) -> Tensor:
        """The client's own transform of its images, which is part of the partition; the global test set stays clean."""
        skew = self.population.skew
        if skew is None or int(self.clients.max()) >= self.population.clients:
            return x
        each = len(images) // (end - begin)
        clients = self.clients[begin:end].repeat_interleave(each)
        angles = torch.tensor([skew.angle(int(k)) for k in self.clients[begin:end]]).repeat_interleave(each)
        stds = torch.tensor([skew.noise(int(k)) for k in self.clients[begin:end]]).repeat_interleave(each)
        if bool(angles.any()):
            x = rotated(x, angles.to(x.device))
        if bool(stds.any()):
            keys = draw.fold(draw.fold(draw.key(self.key.seed, "noise", int(self.feed.split == "test")), clients), images)
            x = noisy(x, keys.to(x.device), stds.to(x.device, x.dtype))
        return x
