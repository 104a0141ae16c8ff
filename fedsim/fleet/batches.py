"""The batches of a pack of clients for one feed: which images, in which order, normalised and augmented as seeded tensor work.

Shapes: K clients of the pack, A of them still active at a step, S steps, B images of a batch, n images of a client.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.types import Data, Feed
from fedsim.fleet.augment import cut_out, moved, noisy, rotated
from fedsim.fleet.client_images import TESTS, Population, count_of, images_of, steps_of

READY = 1 << 26  # bytes of float images up to which they are normalised once, not per batch


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


class Ready:
    """Sets of images that are small enough, normalised once and held from round to round."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str, torch.dtype], tuple[Data, Tensor, Tensor]] = {}

    def of(self, data: Data, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """All its images (N, C, H, W) and labels (N,); None where they are more than READY bytes."""
        if len(data) * int(np.prod(data.shape)) * dtype.itemsize > READY:
            return None
        key = (id(data), device, dtype)  # the set is held beside, so no other one gets its id
        if key not in self._held:
            every = torch.arange(len(data))
            scale, shift = _moments(data, device, dtype)
            images = data.images(every).to(device).to(dtype).div_(255).sub_(shift).div_(scale)
            self._held[key] = data, images, data.labels(every).to(device)
        return self._held[key][1:]


def _moments(data: Data, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Deviation and mean of the channels, (C, 1, 1)."""
    scale, shift = (torch.tensor(value, dtype=dtype, device=device).view(-1, 1, 1) for value in (data.std, data.mean))
    return scale, shift


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
        ready: Ready | None = None,
    ) -> None:
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.population, self.feed, self.key = population, feed, key
        self.device, self.dtype = device, dtype
        self.data: Data = population.test if feed.split in TESTS else population.train
        own = [images_of(population, feed.split, client) for client in clients]
        self.counts = [count_of(population, feed, client) for client in clients]
        self.steps = [steps_of(feed, count) for count in self.counts]
        if self.steps != sorted(self.steps, reverse=True):
            raise ValueError(f"clients must be ordered by decreasing number of steps; these have {self.steps}")
        self.clients = torch.tensor(clients)
        self.calls = torch.tensor(calls)
        self.images = torch.zeros(len(clients), max(map(len, own)), dtype=torch.int64)  # (K, n)
        for row, images in zip(self.images.numpy(), own, strict=True):
            row[: len(images)] = images
        self._choose([len(images) for images in own])
        self.plan = self._plan()  # (K, S, B), positions among the client's images, -1 where there is none
        self.widths = (self.plan >= 0).sum(-1).numpy()  # (K, S), images of every batch
        self.scale, self.shift = _moments(self.data, device, dtype)
        self.augmented = bool(population.augment) and feed.augment and feed.split == "train"
        plain, flat = not self.augmented and population.skew is None, self.images.flatten()
        whole, labels = ready.of(self.data, device, dtype) or (None, None) if ready and plain else (None, None)
        self.whole = whole
        self.labels = self.data.labels(flat).to(device) if labels is None else labels[flat]
        self.ready = self._ready() if plain and whole is None else None
        self.begins = (torch.arange(len(clients)) * self.images.shape[1]).view(-1, 1)

    def _choose(self, whole: list[int]) -> None:
        """A share of a split is a random subset that the client draws once and for all."""
        if self.feed.share == 1:
            return
        keys = rng.key(self.key.seed, "share", self.clients)
        for row, size, count, key in zip(self.images, whole, self.counts, keys, strict=True):
            row[:count] = row[rng.permutation(key, size)[:count].sort().values].clone()
        self.images = self.images[:, : max(self.counts)].contiguous()

    def _plan(self) -> Tensor:
        """Which image every step sees: a fresh order every epoch; test images in their stored order."""
        batch, most, width = min(self.feed.batch, max(1, *self.counts)), max(self.steps), max(self.counts)
        steps, counts = np.array(self.steps)[:, None], np.array(self.counts)[:, None]
        per_epoch = np.maximum(1, -(-counts // batch))  # (K, 1) steps
        plan, places = np.full((len(steps), most, batch), -1), np.arange(width)
        for epoch in range(int((-(-steps // per_epoch)).max())):
            order = np.where(places < counts, self._order(epoch, width), -1)  # (K, n)
            padded = np.pad(order, ((0, 0), (0, -width % batch)), constant_values=-1).reshape(len(steps), -1, batch)
            step = np.arange(padded.shape[1])
            at = epoch * per_epoch + step  # (K, steps of an epoch)
            rows, found = ((step < per_epoch) & (at < steps)).nonzero()
            plan[rows, at[rows, found]] = padded[rows, found]
        return torch.from_numpy(plan)

    def _order(self, epoch: int, width: int) -> Any:
        """(K, n) an order of every client's images, which come before the places that it has no images for."""
        places = np.broadcast_to(np.arange(width), (len(self.steps), width))
        if self.feed.split in TESTS:
            return places
        calls = 0 if self.feed.split == "probe" else self.calls  # models that are compared are compared on the same batches
        numbers = rng.bits(rng.key(self.key.seed, self.feed.split, self.key.r, calls, self.clients, epoch), width).numpy()
        return np.where(places < np.array(self.counts)[:, None], numbers, np.iinfo(np.int64).max).argsort(-1, kind="stable")

    def _ready(self) -> Tensor | None:
        """All images of the pack as normalised floats, when they are few and most of them are shown."""
        size = self.images.numel() * int(np.prod(self.data.shape)) * 4
        few = self.plan.shape[1] * self.feed.batch < self.images.shape[1]
        if size > READY or few:
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
        if self.whole is not None:
            return self.whole[images]
        x = self._skewed(self._float(images), images, begin, end)
        if not self.augmented:
            return self._normalised(x)
        names, population = self.population.augment, self.population
        keys = self._keys(len(index) // (end - begin), begin, end, t).to(self.device)
        pad = population.crop_pad if "crop" in names else 0
        x = self._normalised(moved(x, keys, pad, "flip" in names, population.crop_border))
        return cut_out(x, keys, population.cutout) if "cutout" in names else x

    def _keys(self, width: int, begin: int, end: int, t: int) -> Tensor:
        """A key for every image of the step, (A · B,)."""
        keys = rng.key(self.key.seed, "augment", self.key.r, self.calls[begin:end], self.clients[begin:end], t)
        return rng.fold(keys.unsqueeze(1), torch.arange(width)).flatten()

    def _skewed(self, x: Tensor, images: Tensor, begin: int, end: int) -> Tensor:
        """The client's own transform of its images, which is part of the partition; the global test set stays clean."""
        skew = self.population.skew
        if skew is None or self.feed.split == "global" or int(self.clients.max()) >= self.population.clients:
            return x
        each = len(images) // (end - begin)
        clients = self.clients[begin:end].repeat_interleave(each)
        angles = torch.tensor([skew.angle(int(k)) for k in self.clients[begin:end]]).repeat_interleave(each)
        stds = torch.tensor([skew.noise(int(k)) for k in self.clients[begin:end]]).repeat_interleave(each)
        if bool(angles.any()):
            x = rotated(x, angles.to(x.device))
        if bool(stds.any()):
            keys = rng.fold(rng.fold(rng.key(self.key.seed, "noise", int(self.feed.split == "test")), clients), images)
            x = noisy(x, keys.to(x.device), stds.to(x.device, x.dtype))
        return x
