"""Labelled images in memory, or made on demand: what implements `core.Data`, and how a test set is split off where there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.core.types import Data


@dataclass(frozen=True, eq=False)
class Stored:
    """Images and labels held as tensors. ValueError if their shapes or dtypes do not fit."""

    name: str
    x: Tensor  # (n, C, H, W) uint8
    y: Tensor  # (n,) int64, in 0 … classes-1
    classes: int
    mean: tuple[float, ...]  # per channel, of the training images / 255
    std: tuple[float, ...]
    users: Tensor | None = None  # (n,) int64, the natural user of each image
    class_names: tuple[str, ...] | None = None  # where the labels were numbered anew: what each class was called
    user_names: tuple[str, ...] | None = None  # by the number of a user, where a file names its users by text
    notes: tuple[str, ...] = ()  # what was read otherwise than as it stands

    def __post_init__(self) -> None:
        if self.x.dim() != 4 or self.x.dtype != torch.uint8:
            raise ValueError(f"images of {self.name} are {tuple(self.x.shape)} {self.x.dtype}; they must be (n, C, H, W) uint8")
        for name, column in {"labels": self.y, "users": self.users}.items():
            if column is not None and (column.shape != self.x.shape[:1] or column.dtype != torch.int64):
                raise ValueError(f"{name} of {self.name} are {tuple(column.shape)} {column.dtype}; they must be ({len(self.x)},) int64")
        low, high = (int(self.y.min()), int(self.y.max())) if len(self.y) else (0, 0)
        if not 0 <= low <= high < self.classes:
            raise ValueError(f"labels of {self.name} lie in {low} … {high}, its classes are 0 … {self.classes - 1}")

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.y)

    def images(self, index: Tensor) -> Tensor:
        """(b,) int64 -> (b, C, H, W) uint8."""
        return self.x[index]

    def labels(self, index: Tensor) -> Tensor:
        """(b,) int64 -> (b,) int64."""
        return self.y[index]


class Unscaled:
    """A set of images whose pixels are used as they are, in [0, 1]."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.mean, self.std = (0.0,) * data.shape[0], (1.0,) * data.shape[0]

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.data, name)


@dataclass(frozen=True)
class Fake:
    """Uniform random bytes and labels, a pure function of (seed, split, image index): nothing of size n is held."""

    n: int
    shape: tuple[int, int, int]
    classes: int
    seed: int
    split: str = "train"
    name: str = "fake"

    @property
    def mean(self) -> tuple[float, ...]:
        return (0.5,) * self.shape[0]

    @property
    def std(self) -> tuple[float, ...]:
        return (((256**2 - 1) / 12) ** 0.5 / 255,) * self.shape[0]

    def __len__(self) -> int:
        return self.n

    def images(self, index: Tensor) -> Tensor:
        """(b,) int64 -> (b, C, H, W) uint8; one hash gives eight pixels."""
        size = prod(self.shape)
        words = rng.bits(rng.fold(self._keys(index), "pixels"), -(-size // 8))  # (b, size / 8)
        return words.view(torch.uint8)[:, :size].reshape(-1, *self.shape)

    def labels(self, index: Tensor) -> Tensor:
        """(b,) int64 -> (b,) int64."""
        return rng.integers(rng.fold(self._keys(index), "label"), 1, self.classes).squeeze(-1)

    @cached_property
    def _root(self) -> Tensor:
        return rng.key(self.seed, "fake", self.split)

    def _keys(self, index: Tensor) -> Tensor:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise IndexError(f"image {int(index.min())} … {int(index.max())} of {self.n} fake images")
        return rng.fold(self._root.to(index.device), index)


def moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (n, C, H, W) uint8 over 255, from exact integer sums; 1 where nothing varies."""
    count = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in x.unbind(1)])  # (C, 256)
    level = torch.arange(256, dtype=torch.float64) / 255
    share = count.double() / count.sum(1, keepdim=True)
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist())


def fifth(y: Tensor) -> Tensor:
    """(n,) bool, True at a stratified fifth (rounded up) of the labels: a fixed rule, so that every job tests on the same images."""
    return stratified(y, -(-len(y) // 5), "test fifth")


def stratified(y: Tensor, wanted: int, purpose: str) -> Tensor:
    """(n,) bool, True at `wanted` of the labels (n,), each class in proportion; a fixed rule, the same for every job.

    Each class gives its share by largest remainder; which of its images, one integer hash of their position and the purpose says.
    """
    n = len(y)
    count = torch.bincount(y)
    quota, rest = (count * wanted) // n, (count * wanted) % n
    extra = rest.argsort(descending=True, stable=True)[: wanted - int(quota.sum())]
    quota[extra] += 1
    order = rng.bits(rng.key(purpose, torch.arange(n)), 1).squeeze(-1).argsort(stable=True)
    order = order[y[order].argsort(stable=True)]  # by class, in hashed order within it
    rank = torch.arange(n) - (count.cumsum(0) - count)[y[order]]
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order] = rank < quota[y[order]]
    return chosen


def reduced(data: Stored, wanted: int | None, field: str) -> Stored:
    """So many images of a set, each class in proportion, the same ones in every run; all where `wanted` is None.

    The mean and the deviation stay those of the whole set. BadInput where it has fewer images; `field` is how the message calls it.
    """
    if wanted is None or wanted == len(data):
        return data
    if wanted > len(data):
        raise BadInput(f"[data] {field} = {wanted:,}: {data.name} has {len(data):,}; leave it out to take all of them")
    chosen = stratified(data.y, wanted, "train part" if field == "train_images" else "test part")
    return replace(data, x=data.x[chosen], y=data.y[chosen], users=None if data.users is None else data.users[chosen])


def parted(name: str, x: Tensor, y: Tensor, classes: int, users: Tensor | None = None, **more: Any) -> tuple[Stored, Stored]:
    """Training and test images of a set that has no test part: a fixed stratified fifth is the test set. `more`: fields of both."""
    aside = fifth(y)
    mean, std = moments(x[~aside])
    pick = [(x[m], y[m], None if users is None else users[m]) for m in (~aside, aside)]
    train, test = (Stored(name, images, labels, classes, mean, std, who, **more) for images, labels, who in pick)
    return train, test
