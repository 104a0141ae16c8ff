"""The population: the data, and which client trains, holds out and tests on which images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim.core import rng
from fedsim.data import digest, partition, splits
from fedsim.data.client_indices import Blocks, Ints, Listed, Shards, of_owners, sha256_of
from fedsim.data.image_sets import Stored, Unscaled
from fedsim.data.partition import Deal, PartitionSettings, generator
from fedsim.data.settings import DataSettings
from fedsim.data.sources import open_data
from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.core.types import Data


COUNTED = 100_000  # clients up to which counts are kept
LISTED = 12  # classes that a note names
MOVED = 0.01  # share of images moved by the repair above which the record warns


@dataclass(frozen=True)
class Skew:
    """What one client's images go through, training and test images alike; the global test set stays clean."""

    clients: int
    seed: int
    noise_std: float = 0.0  # of the last client; pixel values in [0, 1]
    max_angle: float = 0.0  # degrees

    def noise(self, client: int) -> float:
        """Standard deviation of the Gaussian noise on pixel values in [0, 1]: noise_std · k/N for k = 1 … N."""
        return self.noise_std * (client + 1) / self.clients

    def angle(self, client: int) -> float:
        """Degrees, fixed for the client, uniform within ± max_angle."""
        return self.max_angle * (2 * float(rng.uniform(rng.key(self.seed, "rotation", client), 1)) - 1)


@dataclass(frozen=True, eq=False)
class Population:
    """All clients' data. `shards` has train (without the held-out part), held, test (a shard per client) and public (one)."""

    train: Data
    test: Data
    shards: dict[str, Shards]
    record: dict[str, Any]  # scheme, parameters, seed, tries, moved … : plain numbers and text, fit for JSON
    sha256: str  # over the record's parameters and every shard
    augment: tuple[str, ...]
    crop_pad: int
    cutout: int
    skew: Skew | None
    clients: int
    crop_border: str = "zeros"
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "client", "class": what the file called each of them

    @cached_property
    def data_sha256(self) -> str:
        """What tells whether another machine, or another day, has the same images; empty where fedsim draws them."""
        return digest.digest(self.train, self.test)

    def size(self, client: int) -> int:
        """Number of images the client trains on."""
        return self.shards["train"].size(client)

    def counts(self) -> Ints | None:
        """(N, C) images each client trains on, by class; None above 100,000 clients."""
        if self.clients > COUNTED:
            return None
        index, sizes = self.shards["train"].stretch(0, self.clients)
        owner, labels = np.repeat(np.arange(self.clients), sizes), splits.labels_of(self.train, index)
        return partition.tally(owner, labels, self.clients, self.train.classes)

    def public(self) -> Stored | None:
        """The server's images, or None where it has none."""
        index = torch.from_numpy(self.shards["public"].of(0))
        train = self.train
        if not len(index):
            return None
        return Stored(train.name, train.images(index), train.labels(index), train.classes, train.mean, train.std)


def opened(data: DataSettings, seed: int) -> tuple[Data, Data]:
    """The training and the test set, as clients see their pixels."""
    train, test = open_data(data, seed)
    return (train, test) if data.normalise else (Unscaled(train), Unscaled(test))


def populate(data: DataSettings, settings: PartitionSettings, seed: int) -> Population:
    """Open the data and deal them to clients: a function of the settings and the seed. BadInput says what cannot be."""
    train, test = opened(data, seed)
    made = divide(train, test, settings, seed)
    if "crop" in data.augments() and data.crop_border == "reflect" and data.crop_pad >= min(train.shape[1:]):
        height, width = train.shape[1:]
        raise BadInput(
            f"[data] crop_pad = {data.crop_pad} is too large to reflect into {height}x{width} images; at most {min(height, width) - 1}"
        )
    side = min(train.shape[1:])
    if "cutout" in data.augments() and data.cutout >= side:
        raise BadInput(
            f"[data] cutout = {data.cutout} may cover an image of {train.shape[1]}x{train.shape[2]} whole; at most {side - 1},"
            f" and half of the side ({max(side // 2, 1)}) is usual"
        )
    return replace(made, augment=data.augments(), crop_pad=data.crop_pad, cutout=data.cutout, crop_border=data.crop_border)


def divide(train: Data, test: Data, settings: PartitionSettings, seed: int) -> Population:
    """Deal images already open; nothing is augmented. seed: of the partition, where it has none of its own."""
    seed = seed if settings.seed is None else settings.seed
    shards, facts = _in_blocks(train, test, settings, seed) if settings.name == "blocks" else _dealt(train, test, settings, seed)
    _check_held(shards, settings)
    record = _record(train, test, settings, seed) | facts
    begin = json.dumps(record, sort_keys=True).encode()
    record["hashes"] = {name: sha256_of(part, begin) for name, part in sorted(shards.items())}
    whole = sha256(json.dumps(record["hashes"], sort_keys=True).encode()).hexdigest()
    clients = len(shards["train"])
    notes = [*getattr(train, "notes", ()), *_merged(train, shards, settings), *_untrained(train, shards, settings)]
    record |= {"clients": clients, "numpy": np.__version__, "sha256": whole, "notes": notes}
    names = _names(train, shards, settings)
    return Population(train, test, shards, record, whole, (), 4, 16, _skew(settings, clients, seed), clients, names=names)


def _names(train: Data, shards: dict[str, Shards], settings: PartitionSettings) -> dict[str, tuple[str, ...]]:
    """What the user's own file called the classes, and the users that are clients now; a client of several users has all their names."""
    classes: tuple[str, ...] | None = getattr(train, "class_names", None)
    found = {} if classes is None else {"class": classes}
    users = _users(train)
    if settings.name != "natural" or users is None:
        return found
    texts: tuple[str, ...] | None = getattr(train, "user_names", None)
    held = [np.concatenate([shards[part].of(client) for part in ("train", "held")]) for client in range(len(shards["train"]))]
    numbers = [np.unique(users[index]).tolist() for index in held]
    if texts is None and numbers == [[client] for client in range(len(numbers))]:
        return found
    return found | {"client": tuple(", ".join(texts[user] if texts else str(user) for user in some) for some in numbers)}


def _merged(train: Data, shards: dict[str, Shards], settings: PartitionSettings) -> list[str]:
    """A note where users have too few images to be a client each."""
    users, clients = _users(train), len(shards["train"])
    if settings.name != "natural" or users is None:
        return []
    some = np.concatenate([shards[part].stretch(0, clients)[0] for part in ("train", "held")])
    if (found := len(np.unique(users[some]))) == clients:
        return []
    rule = f"users with fewer than partition.min_images = {settings.min_images} images are put together"
    if settings.clients:
        rule = f"partition.clients = {settings.clients:,} puts them together"
    return [f"the {found:,} users are {clients:,} client{'s' if clients > 1 else ''}: {rule}"]


def _untrained(train: Data, shards: dict[str, Shards], settings: PartitionSettings) -> list[str]:
    """A note about classes of which no client has an image. A user's own file, of whose gaps its own notes tell, is not blamed for them."""
    if settings.name == "blocks":  # it may have millions of images, which are not looked at
        return []
    clients, classes = len(shards["train"]), train.classes
    dealt = np.concatenate([shards[part].stretch(0, clients)[0] for part in ("train", "held")])
    every = np.bincount(splits.labels_of(train, np.arange(len(train))), minlength=classes)
    held = np.bincount(splits.labels_of(train, dealt), minlength=classes)
    empty = np.flatnonzero((held == 0) & ((every > 0) | (getattr(train, "notes", None) in (None, ()))))
    if not len(empty):
        return []
    which = ", ".join(f"class {c} ({every[c]:,} training images)" for c in empty[:LISTED].tolist())
    more = f" and {len(empty) - LISTED} more" if len(empty) > LISTED else ""
    return [f"no client has an image of {which}{more}: {_why(every[empty], shards, settings)}"]


def _why(images: Ints, shards: dict[str, Shards], settings: PartitionSettings) -> str:
    """Why no client has an image of the classes, which have so many in all."""
    if not images.any():
        return "the set has none"
    public = f"partition.public = {settings.public} keeps images for the server, and " if len(shards["public"].of(0)) else ""
    return f"{public}the partition deals out no others"


def _check_held(shards: dict[str, Shards], settings: PartitionSettings) -> None:
    """BadInput where images are to be held out, and no client has two, of which it could hold one out."""
    if not settings.holdout or shards["held"].sizes().any():
        return
    sizes = shards["train"].sizes()
    largest, clients = int(sizes.argmax()), len(sizes)
    raise BadInput(
        f"[partition] holdout = {settings.holdout} leaves no client a held-out image: the largest of {clients:,} clients, client {largest},"
        f" has {sizes[largest]} image; a client needs 2 to hold one out. Lower clients, or set holdout = 0"
    )


def _record(train: Data, test: Data, settings: PartitionSettings, seed: int) -> dict[str, Any]:
    names = {"scheme": settings.name, "parameters": partition.parameters(settings), "seed": seed}
    return names | {"data": train.name, "images": {"train": len(train), "test": len(test)}, "classes": train.classes}


def _skew(settings: PartitionSettings, clients: int, seed: int) -> Skew | None:
    if settings.name == "feature_noise":
        return Skew(clients, seed, noise_std=settings.noise_std)
    if settings.name == "feature_rotation":
        return Skew(clients, seed, max_angle=settings.angle)
    return None


Made = tuple[dict[str, Shards], dict[str, Any]]


def _in_blocks(train: Data, test: Data, settings: PartitionSettings, seed: int) -> Made:
    """Nothing is stored but the public indices: a client's images are known from its number."""
    public = splits.public(train, settings.public, generator(seed, "public"))
    n = len(train) - len(public)
    partition.check_enough(settings, n)
    whole = Blocks(n, settings.clients, public, settings.holdout)
    tested = Blocks(len(test) if settings.test == "proportional" else 0, settings.clients)
    shards: dict[str, Shards] = {"train": whole, "held": replace(whole, held=True), "test": tested, "public": _one(public)}
    return shards, {"tries": 1, "moved": 0, "dropped": 0, "untested": len(test) - tested.n, "warnings": []}


def _dealt(train: Data, test: Data, settings: PartitionSettings, seed: int) -> Made:
    public = splits.public(train, settings.public, generator(seed, "public"))
    index = np.setdiff1d(np.arange(len(train)), public)
    labels = splits.labels_of(train, index)
    users = _users(train)
    dealt = partition.deal(labels, settings, generator(seed, "partition"), None if users is None else users[index])
    held = splits.held(dealt.owner, labels, dealt.clients, train.classes, settings.holdout, generator(seed, "holdout"))
    tester = _testers(dealt, labels, index, train, test, settings, seed)
    shards: dict[str, Shards] = {
        "train": of_owners(np.where(held, -1, dealt.owner), dealt.clients, index),
        "held": of_owners(np.where(held, dealt.owner, -1), dealt.clients, index),
        "test": of_owners(tester, dealt.clients, np.arange(len(test))),
        "public": _one(public),
    }
    facts = {"tries": dealt.tries, "moved": dealt.moved, "dropped": int((dealt.owner < 0).sum()), "untested": int((tester < 0).sum())}
    return shards, facts | {"labels_sha256": sha256(labels.astype("<i8").data).hexdigest(), "warnings": _warnings(dealt)}


def _testers(dealt: Deal, labels: Ints, index: Ints, train: Data, test: Data, settings: PartitionSettings, seed: int) -> Ints:
    """(n_test,) the client of each test image, -1 for nobody's: by natural user where test images have one, else in proportion."""
    if settings.test == "global":
        return np.full(len(test), -1)
    trained, tested = _users(train), _users(test)
    if settings.name == "natural" and trained is not None and tested is not None:
        known, first = np.unique(trained[index], return_index=True)
        seat = np.searchsorted(known, tested).clip(max=len(known) - 1)
        return np.where(known[seat] == tested, dealt.owner[first[seat]], -1)
    every = np.arange(len(test))
    return splits.proportional(dealt.counts(labels, train.classes), splits.labels_of(test, every), generator(seed, "test"))


def _warnings(dealt: Deal) -> list[str]:
    if dealt.moved <= MOVED * len(dealt.owner):
        return []
    share = f"{100 * dealt.moved / len(dealt.owner):.1f} %"
    return [f"{dealt.moved} images ({share}) moved to give every client its least: the partition is no longer a plain draw of its scheme"]


def _users(data: Data) -> Ints | None:
    users = getattr(data, "users", None)
    return None if users is None else users.numpy()


def _one(index: Ints) -> Listed:
    return Listed(index, np.array([0, len(index)]))
