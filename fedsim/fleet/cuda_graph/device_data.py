"""Data where programs read them: images as uint8 on the device, and for a feed of a pack which of them every step shows.

Shapes: K clients, S steps, B images of a batch, N resident images, n images of a client.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.types import Data
from fedsim.fleet.augment import cut_out, moved
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.cuda_graph.buffers import remembered
from fedsim.fleet.cuda_graph.capture import GraphCapture
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder

SHARE = 0.25  # of the device's free memory that a whole set may take
HOST = 1 << 28  # bytes that it may take where the device is the host
SETS = 8  # of images that are held, and buffers for those of packs
CHUNK = 1 << 14  # images that are brought to the device at once


@dataclass(frozen=True)
class FeedIndex:
    """What every step of a feed shows of a pack, on the device."""

    images: Tensor  # (N, C, H, W) uint8, or float in [0, 1] where clients have their own transform
    where: Tensor  # (K, S, B) int64, the first image in the place of one that is not real
    y: Tensor  # (K, S, B) int64
    real: Tensor | None  # (K, S, B) in {0, 1}; None when every batch of every step is full
    keys: Tensor | None  # (K, S, B) int64 of the augmentation; None without one
    steps: list[int]  # of each client
    run: FeedBatches

    @property
    def ragged(self) -> bool:
        """Whether some client ends before the others."""
        return len(set(self.steps)) > 1


class FeedBatches(Batches):
    """Which images a feed shows, without the images; clients come with falling numbers of steps, as ever."""

    def _ready(self) -> None:
        return None

    def own(self) -> Tensor:
        """(K n, C, H, W) the images of all clients, under their own transform where they have one."""
        flat = self.images.flatten()
        if self.population.skew is None:
            return self.data.images(flat)
        return self._skewed(self._float(flat), flat, 0, len(self.clients))

    def positions(self) -> Tensor:
        """(K, S, B) among the images of all clients; the first of them for an image that is not real."""
        return self.plan.clamp(min=0) + self.begins.unsqueeze(2)

    def keys(self) -> Tensor:
        """(K, S, B) of the augmentation."""
        steps, width = torch.arange(self.plan.shape[1]), torch.arange(self.plan.shape[2])
        each = rng.key(self.key.seed, "augment", self.key.r, self.calls.unsqueeze(1), self.clients.unsqueeze(1), steps)
        return rng.fold(each.unsqueeze(2), width)

    def real(self) -> Tensor | None:
        """(K, S, B); a step that a client does not take counts as full, lest it divide by nothing."""
        taken = torch.arange(self.plan.shape[1]) < torch.tensor(self.steps).unsqueeze(1)
        real = (self.plan >= 0) | ~taken.unsqueeze(2)
        return None if bool(real.all()) else real.to(self.dtype)


class Resident:
    """The image sets of one device: whole where they fit a share of its free memory, else the pack's own, in a buffer that stays."""

    def __init__(self, device: str, capture: GraphCapture) -> None:
        self.device, self.capture = torch.device(device), capture
        self._wholes: OrderedDict[int, tuple[Data, Tensor | None]] = OrderedDict()  # by id, which the set beside keeps from another
        self._packs: OrderedDict[object, Tensor] = OrderedDict()

    def shown(self, order: WorkOrder, pack: Pack, site: WorkerContext, feed: int, steps: Tensor) -> FeedIndex:
        """What the feed's `steps` (K,) show; the pack's clients in their own order."""
        rows = steps.argsort(descending=True, stable=True)
        back = rows.argsort()
        clients, calls = ([values[i] for i in rows.tolist()] for values in (pack.clients, pack.calls[1 + feed]))
        run = FeedBatches(site.population, order.work.feeds[feed], clients, calls, Round(site.seed, order.r), "cpu", site.dtype)
        positions, whole = run.positions(), None if site.population.skew is not None else self._whole(run.data)
        where = positions if whole is None else run.images.flatten()[positions]
        images = self._of_pack(run.own(), feed) if whole is None else whole
        real, keys = (None if value is None else self._there(value, back) for value in (run.real(), run.keys() if run.augmented else None))
        where, y = self._there(where, back), self._there(run.labels[positions], back)
        return FeedIndex(images, where, y, real, keys, [run.steps[i] for i in back.tolist()], run)

    def _there(self, value: Tensor, back: Tensor) -> Tensor:
        return self.capture.to_device(value[back])

    def _whole(self, data: Data) -> Tensor | None:
        """The whole set, brought here when it is first asked for; None when it is too large."""

        def made() -> tuple[Data, Tensor | None]:
            return data, self._brought(data) if len(data) * prod(data.shape) <= self._room() else None

        return remembered(self._wholes, id(data), made, SETS)[1]

    def _room(self) -> float:
        """Bytes that a set may take."""
        return SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else HOST

    def _brought(self, data: Data) -> Tensor:
        images = torch.empty(len(data), *data.shape, dtype=torch.uint8, device=self.device)
        for index in torch.arange(len(data)).split(CHUNK):
            images[index[0] : index[-1] + 1] = data.images(index)
        return images

    def _of_pack(self, images: Tensor, feed: int) -> Tensor:
        """The images in a buffer at a place that stays, long enough for packs to come."""
        length = 1 << max(0, len(images) - 1).bit_length()
        key = (feed, length, images.shape[1:], images.dtype)
        place = remembered(self._packs, key, lambda: images.new_zeros(length, *images.shape[1:], device=self.device), SETS)
        place[: len(images)] = self.capture.to_device(images)
        return place


class BatchGather:
    """Makes the batches of E steps out of buffers that stay where they are."""

    def __init__(self, shown: FeedIndex, steps: int, site: WorkerContext) -> None:
        run, population = shown.run, site.population
        self.images, self.dtype, self.channels_last = shown.images, site.dtype, site.channels_last
        self.where, self.y, self.real, self.keys = (
            None if value is None else torch.zeros_like(value[:, :1]).repeat(1, steps, 1)
            for value in (shown.where, shown.y, shown.real, shown.keys)
        )
        self.scale, self.shift = (value.to(self.images.device) for value in (run.scale, run.shift))
        names = population.augment if run.augmented else ()
        self.pad, self.flip = population.crop_pad if "crop" in names else 0, "flip" in names
        self.border = population.crop_border
        self.hole = population.cutout if "cutout" in names else 0

    def take(self, shown: FeedIndex, begin: int) -> None:
        """The next steps, from `begin` on; beyond the last one, what was there before."""
        for mine, value in ((self.where, shown.where), (self.y, shown.y), (self.real, shown.real), (self.keys, shown.keys)):
            if mine is not None and value is not None:
                part = value[:, begin : begin + mine.shape[1]]
                mine[:, : part.shape[1]] = part

    def batch(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (K, B, C, H, W), y (K, B), real (K, B) or None of the step `i` of these."""
        assert self.where is not None
        assert self.y is not None
        clients, _, width = self.where.shape
        x = self.images.index_select(0, self.where[:, i].flatten())
        x = x.to(self.dtype).div_(255) if x.dtype == torch.uint8 else x
        x = self._augmented(x, None if self.keys is None else self.keys[:, i].flatten())
        x = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        return x.view(clients, width, *x.shape[1:]), self.y[:, i], None if self.real is None else self.real[:, i]

    def _augmented(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Normalised, and moved before and cut after that where there are keys."""
        if keys is None:
            return x.sub_(self.shift).div_(self.scale)
        x = moved(x, keys, self.pad, self.flip, self.border).sub_(self.shift).div_(self.scale)
        return cut_out(x, keys, self.hole) if self.hole else x
