"""How many images a client has in a split, which they are, and how many steps a feed makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.core.types import Data, Feed

Ints = NDArray[np.int64]
TESTS = ("test", "global")  # splits of the test set


class Population(Protocol):
    """Whose images a fleet reads; the data room makes it."""

    @property
    def train(self) -> Data: ...
    @property
    def test(self) -> Data: ...
    @property  # "train", "held", "test": .of(client) -> sorted indices, .size(client), .sizes(), .sizes_of(clients)
    def shards(self) -> Mapping[str, Any]: ...
    @property
    def clients(self) -> int: ...
    @property
    def augment(self) -> tuple[str, ...]: ...
    @property
    def crop_pad(self) -> int: ...
    @property
    def crop_border(self) -> str: ...
    @property
    def cutout(self) -> int: ...
    @property
    def skew(self) -> Any: ...  # None, or .noise(client) -> standard deviation and .angle(client) -> degrees
    def size(self, client: int) -> int: ...


def images_of(population: Population, split: str, client: int) -> np.ndarray:
    """A client's images in a split as sorted indices; clients beyond the population are fixed shards of the global test set."""
    if client >= population.clients:
        return evaluation_images(population, client)
    if split == "global":
        return np.arange(len(population.test))
    return population.shards["train" if split == "probe" else split].of(client)


def evaluation_shards(population: Population) -> int:
    """Number of shards of the global test set: enough for many ranks, of 128 images or more, never empty."""
    images = len(population.test)
    return min(images, max(2, min(8, -(-images // 128)), min(64, -(-images // 256))))


def evaluation_images(population: Population, client: int) -> np.ndarray:
    """The global test images of a pseudo-client."""
    cuts = _cuts(population)
    return np.arange(cuts[client - population.clients], cuts[client - population.clients + 1])


def _cuts(population: Population) -> np.ndarray:
    """Where the shards of the global test set begin, and the end of the last."""
    return np.linspace(0, len(population.test), evaluation_shards(population) + 1).astype(np.int64)


def count_of(population: Population, feed: Feed, client: int) -> int:
    """Number of images that the feed shows the client in one epoch."""
    if client >= population.clients:
        whole = len(evaluation_images(population, client))
    elif feed.split == "global":
        whole = len(population.test)
    else:
        whole = population.shards["train" if feed.split == "probe" else feed.split].size(client)
    return part_of(feed, whole)


def sizes_of(population: Population, split: str, clients: Sequence[int] | Ints) -> np.ndarray:
    """(K,) images in a split: of clients, and of shards of the global test set, whatever the split."""
    ids = np.asarray(clients, np.int64)
    mine = ids < population.clients
    found = np.full(len(ids), len(population.test), np.int64)
    if split != "global":
        found[mine] = population.shards["train" if split == "probe" else split].sizes_of(ids[mine])
    if not mine.all():
        cuts = _cuts(population)
        found[~mine] = np.diff(cuts)[ids[~mine] - population.clients]
    return found


def counts_of(population: Population, feed: Feed, clients: Sequence[int] | Ints) -> np.ndarray:
    """`count_of` many clients, (K,)."""
    whole = sizes_of(population, feed.split, clients)
    if feed.share == 1:
        return whole
    return np.minimum(whole, np.maximum((feed.share * whole + 1e-9).astype(np.int64), np.minimum(feed.batch, whole)))


def many_steps_of(feed: Feed, counts: np.ndarray) -> np.ndarray:
    """`steps_of` many clients, (K,)."""
    return np.where(counts == 0, 0, feed.steps or feed.epochs * -(-counts // feed.batch))


def part_of(feed: Feed, whole: int) -> int:
    """Number of images that the feed shows in one epoch of `whole` images in its split."""
    return whole if feed.share == 1 else min(whole, max(int(feed.share * whole + 1e-9), min(feed.batch, whole)))


def mean_size(population: Population, split: str) -> int:
    """Images in the split of a client with the mean number of them, over the clients with training images; a half is rounded up."""
    if split == "global":
        return len(population.test)
    filled = population.shards["train"].sizes() > 0
    sizes = population.shards["train" if split == "probe" else split].sizes()[filled]
    return int(2 * sizes.sum(dtype=np.int64) + len(sizes)) // (2 * len(sizes)) if len(sizes) else 0


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
