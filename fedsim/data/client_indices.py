"""Who holds which images: sorted index arrays, listed for some partitions and computed for others.

`Listed` is one flat array with offsets; `Blocks` is arithmetic, so that a million clients cost what ten cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CHUNK = 8_192  # clients hashed at once


class Shards(Protocol):
    """The images of each client, disjoint."""

    def __len__(self) -> int:
        """Number of clients."""
        ...

    def of(self, client: int) -> Ints:
        """The sorted image indices of one client."""
        ...

    def size(self, client: int) -> int: ...

    def sizes(self) -> Ints:
        """(N,) number of images of each client."""
        ...

    def sizes_of(self, clients: Ints) -> Ints:
        """(K,) number of images of some clients."""
        ...

    def stretch(self, first: int, last: int) -> tuple[Ints, Ints]:
        """The indices of clients first … last-1 one after the other, and how many each has."""
        ...


@dataclass(frozen=True, eq=False)
class Listed:
    """Shards as one flat array: client k holds flat[offsets[k] : offsets[k + 1]]."""

    flat: Ints
    offsets: Ints  # (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, client: int) -> Ints:
        return self.flat[self.offsets[client] : self.offsets[client + 1]]

    def size(self, client: int) -> int:
        return int(self.offsets[client + 1] - self.offsets[client])

    def sizes(self) -> Ints:
        return np.diff(self.offsets)

    def sizes_of(self, clients: Ints) -> Ints:
        return self.offsets[clients + 1] - self.offsets[clients]

    def stretch(self, first: int, last: int) -> tuple[Ints, Ints]:
        return self.flat[self.offsets[first] : self.offsets[last]], np.diff(self.offsets[first : last + 1])


@dataclass(frozen=True, eq=False)
class Blocks:
    """Client k holds the k-th run of n consecutive images, sizes within 1 of each other; `without` is stepped over.

    With a held-out share h, the last h of each run are the held-out part.
    """

    n: int
    clients: int
    without: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # sorted indices that belong to nobody
    holdout: float = 0.0
    held: bool = False

    def __len__(self) -> int:
        return self.clients

    def of(self, client: int) -> Ints:
        if not 0 <= client < self.clients:
            raise IndexError(f"client {client} of {self.clients}")
        return self.stretch(client, client + 1)[0]

    def size(self, client: int) -> int:
        if not 0 <= client < self.clients:
            raise IndexError(f"client {client} of {self.clients}")
        return self._either[client < self.n % self.clients]

    def sizes(self) -> Ints:
        return self.sizes_of(np.arange(self.clients))

    def sizes_of(self, clients: Ints) -> Ints:
        return self._spans(clients)[1]

    def stretch(self, first: int, last: int) -> tuple[Ints, Ints]:
        start, size = self._spans(np.arange(first, last))
        position = np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())
        gap = self.without - np.arange(len(self.without))
        return position + np.searchsorted(gap, position, side="right"), size

    @cached_property
    def _either(self) -> tuple[int, int]:
        """The size of a shard, and of one of the first, which may be longer by one."""
        last, first = self._spans(np.array([self.clients - 1, 0]))[1].tolist()
        return last, first

    def _spans(self, client: Ints) -> tuple[Ints, Ints]:
        base, extra = divmod(self.n, self.clients)
        start, size = client * base + np.minimum(client, extra), base + (client < extra)
        held = held_size(size, self.holdout)
        return (start + size - held, held) if self.held else (start, size - held)


def listed(parts: Sequence[Sequence[int] | Ints]) -> Listed:
    """Shards written down by hand, one sequence of image indices per client."""
    sizes = [len(part) for part in parts]
    flat = np.concatenate([np.sort(np.asarray(part, np.int64)) for part in parts]) if parts else np.empty(0, np.int64)
    return Listed(flat, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def of_owners(owner: Ints, clients: int, index: Ints) -> Listed:
    """Shards from the client of each image (-1: nobody's); `index` (n,), sorted, names the images."""
    order = np.argsort(owner, kind="stable")
    nobody = int((owner < 0).sum())
    count = np.bincount(owner[owner >= 0], minlength=clients)
    return Listed(index[order[nobody:]], np.concatenate([[0], np.cumsum(count)]).astype(np.int64))


def held_size(size: Ints, share: float) -> Ints:
    """How many images of `size` are held out: the share, rounded, but at least 1 and never all; none of a single image."""
    if share == 0:
        return np.zeros_like(size)
    return np.clip(np.floor(share * size + 0.5).astype(np.int64), np.minimum(1, size // 2), np.maximum(size - 1, 0))


def sha256_of(shards: Shards, begin: bytes) -> str:
    """SHA-256 over `begin`, then per client the number and the sorted indices of its images as little-endian int64."""
    digest = sha256(begin)
    for flat, sizes in _stretches(shards):
        digest.update(np.insert(flat, np.cumsum(sizes) - sizes, sizes).astype("<i8").data)
    return digest.hexdigest()


def _stretches(shards: Shards) -> Iterator[tuple[Ints, Ints]]:
    for first in range(0, len(shards), CHUNK):
        yield shards.stretch(first, min(first + CHUNK, len(shards)))
