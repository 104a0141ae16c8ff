"""What is said of images: how many of each class, their mean and deviation, their users, and some of each class to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.data.conversion.batches import Batch
from fedsim.data.conversion.survey import Survey

Ints = NDArray[np.int64]
KEPT = 10  # images of each class on a sheet
MOST = 1000  # classes of which images are kept


@dataclass
class Part:
    """The training images, or the test images."""

    classes: Ints  # (classes,) images of each class
    levels: Ints  # (C, 256) pixels of each level, of each channel
    users: Counter[str] = field(default_factory=Counter)  # images of each user

    @property
    def images(self) -> int:
        return int(self.classes.sum())

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the pixels / 255, of each channel."""
        level = np.arange(256) / 255
        share = self.levels / np.maximum(self.levels.sum(1, keepdims=True), 1)
        mean = share @ level
        return mean.tolist(), np.sqrt(np.maximum(share @ level**2 - mean**2, 0)).tolist()


@dataclass
class Description:
    shape: tuple[int, int, int]
    parts: dict[str, Part]  # "train", "test"
    class_names: tuple[str, ...] | None
    examples: dict[int, list[NDArray[np.uint8]]]  # the first images of each class, (C, H, W)
    notes: list[str]


def describe(batches: Iterable[Batch], found: Survey, keep: int = 0) -> Description:
    """Looks at every batch once, and keeps the first `keep` images of each class: training images, or test images where there are none."""
    parts: dict[str, Part] = {}
    examples: dict[int, list[NDArray[np.uint8]]] = {}
    spare: dict[int, list[NDArray[np.uint8]]] = {}
    shape = (0, 0, 0)
    for batch in batches:
        shape = batch.x.shape[1:]
        name = "test" if batch.test else "train"
        part = parts.setdefault(name, Part(np.zeros(found.classes, np.int64), np.zeros((shape[0], 256), np.int64)))
        part.classes += np.bincount(batch.y, minlength=found.classes)
        for c in range(shape[0]):
            part.levels[c] += np.bincount(batch.x[:, c].reshape(-1), minlength=256)
        _count_users(part, batch, found)
        _keep(spare if batch.test else examples, batch, keep)
    every = {label: examples.get(label) or spare.get(label) or [] for label in range(min(found.classes, MOST))} if keep else {}
    return Description(shape, {name: parts[name] for name in ("train", "test") if name in parts}, found.class_names, every, found.notes)


def _count_users(part: Part, batch: Batch, found: Survey) -> None:
    if (users := found.user(batch.images)) is not None:
        part.users.update(map(str, users))


def _keep(examples: dict[int, list[NDArray[np.uint8]]], batch: Batch, keep: int) -> None:
    for label in np.unique(batch.y).tolist() if keep else ():
        held = examples.setdefault(label, [])
        if label < MOST and len(held) < keep:
            held += [batch.x[i].copy() for i in np.flatnonzero(batch.y == label)[: keep - len(held)]]
