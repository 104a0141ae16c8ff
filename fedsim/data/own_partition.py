"""A partition of the user's own: a function that says which client owns which image.

It is called as function(labels, clients, rng=…, users=…, **arguments): labels (n,) of the images that are dealt, the number of clients, a
generator that begins from the partition's seed, and (n,) the natural user of each image or None. It returns (n,) whole numbers, the
client of each image, -1 where nobody gets it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedsim.core import entry_points
from fedsim.errors import BadInput

FIELD = "[partition] name"
Ints = NDArray[np.int64]


def is_offered(name: str) -> bool:
    """Whether a job may name it: "package.module:function", or a name that an installed package offers."""
    return ":" in name or entry_points.find(entry_points.PARTITIONS, name, FIELD) is not None


def deal(name: str, labels: Ints, clients: int, rng: Generator, users: Ints | None, arguments: dict[str, Any]) -> Ints:
    """(n,) the client of each image, -1: nobody's. BadInput where the function fails, or gives what is none, or other owners each time."""
    where = f"[partition] {name}"
    owner, again = (_called(name, where, labels, clients, deepcopy(rng), users, arguments) for _ in range(2))
    if owner.shape != labels.shape or owner.dtype.kind not in "iu":
        right = f"it should give ({len(labels)},) whole numbers, the client of each image, -1 where nobody gets it"
        raise BadInput(f"{where} gave {owner.shape} {owner.dtype}; {right}")
    if not np.array_equal(owner, again):
        raise BadInput(f"{where} gives other owners each time it is called; draw by the generator `rng` that it is given")
    owner = owner.astype(np.int64)
    if len(owner) and not -1 <= owner.min() <= owner.max() < clients:
        wrong = owner.min() if owner.min() < -1 else owner.max()
        raise BadInput(f"{where} gave an image to client {wrong}; the clients are 0 to {clients - 1}, and -1 is nobody")
    return owner


def _called(name: str, where: str, labels: Ints, clients: int, rng: Generator, users: Ints | None, arguments: dict[str, Any]) -> Any:
    from fedsim.core.shared_generators import LARGEST, seeded  # imports torch, and settings are read without it

    function = entry_points.own(name, FIELD) if ":" in name else _installed(name)
    try:
        with seeded(int(deepcopy(rng).integers(LARGEST))):
            return np.asarray(function(labels.copy(), clients, rng=rng, users=None if users is None else users.copy(), **arguments))
    except (Exception, SystemExit) as error:  # whatever the function raises, the message names it
        right = "it is called as function(labels, clients, rng=…, users=…, and what partition.arguments has)"
        raise BadInput(f"{where} failed: {type(error).__name__}: {error}; {right}") from error


def _installed(name: str) -> Any:
    entry = entry_points.find(entry_points.PARTITIONS, name, FIELD)
    if entry is None:
        raise BadInput(f"{FIELD} = {name!r} is not known")
    return entry_points.load(entry, FIELD)
