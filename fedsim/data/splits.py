"""The three disjoint splits beside a partition: the server's public images, the clients' held-out images, their test images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from fedsim.data.client_indices import Ints, held_size
from fedsim.data.partition_schemes import apportion
from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.core.types import Data


def labels_of(data: Data, index: Ints) -> Ints:
    """(b,) labels as numpy."""
    return data.labels(torch.from_numpy(index)).numpy()


def public(data: Data, per_class: int, rng: Generator) -> Ints:
    """Sorted indices of `per_class` random images of each class present, for the server.

    Looks at as many images as it takes, so that it costs little in a set of millions. BadInput if a class has too few.
    """
    if per_class == 0:
        return np.empty(0, np.int64)
    seen = 2 * per_class * data.classes
    while True:
        index = rng.choice(len(data), min(seen, len(data)), replace=False)
        labels = labels_of(data, index)
        count = np.bincount(labels, minlength=data.classes)
        if seen >= len(data) or count.min() >= per_class:
            break
        seen *= 2
    short = np.flatnonzero((count < per_class) & (count > 0))
    if len(short):
        raise BadInput(f"[partition] public = {per_class} images per class, but class {short[0]} of {data.name} has {count[short[0]]}")
    return np.sort(np.concatenate([index[labels == c][:per_class] for c in np.flatnonzero(count)]))


def held(owner: Ints, labels: Ints, clients: int, classes: int, share: float, rng: Generator) -> NDArray[np.bool_]:
    """(n,) True where a client holds its image out: `share` of its images, by class in proportion, at least one, never all."""
    aside = np.zeros(len(owner), bool)
    if share == 0:
        return aside
    mine = np.flatnonzero(owner >= 0)
    cell = owner[mine] * classes + labels[mine]  # one per client and class
    count = np.bincount(cell, minlength=clients * classes)
    counts = count.reshape(clients, classes)
    quota = apportion(held_size(counts.sum(1), share), counts, rng.random(counts.shape)).reshape(-1)
    order = np.lexsort((rng.random(len(mine)), cell))
    rank = np.arange(len(mine)) - (np.cumsum(count) - count)[cell[order]]
    aside[mine[order]] = rank < quota[cell[order]]
    return aside


def proportional(counts: Ints, labels: Ints, rng: Generator) -> Ints:
    """(n_test,) the client of each test image: each class is cut by the shares counts[k, c] of its training images (N, C).

    Largest remainders, equal ones in random order. -1 where no client trains on the class.
    """
    clients, classes = counts.shape
    quota = apportion(np.bincount(labels, minlength=classes), counts.T, rng.random((classes, clients)))  # (C, N)
    owner = np.full(len(labels), -1)
    for c in range(classes):
        member = rng.permutation(np.flatnonzero(labels == c))
        owner[member[: quota[c].sum()]] = np.repeat(np.arange(clients), quota[c])
    return owner
