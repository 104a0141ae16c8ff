"""Partitions: which client holds which training images, and the record of how that came about.

The schemes stand in `schemes`; here is the job's [partition] section, the generators' keys, and the least size: bounded tries,
then a repair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

from fedsim.core import entry_points
from fedsim.data import own_partition, partition_schemes
from fedsim.data.client_indices import Blocks, Ints, Listed, Shards, listed, of_owners
from fedsim.data.partition_schemes import Floats
from fedsim.errors import BadInput

__all__ = ["NAMES", "Blocks", "Deal", "Listed", "PartitionSettings", "Shards", "deal", "generator", "listed", "of_owners", "parameters"]

FIELDS: dict[str, tuple[str, ...]] = {  # every scheme, with the fields that are its own
    "iid": (),
    "dirichlet_class": ("alpha", "balance"),
    "dirichlet_client": ("alpha", "prior", "sizes", "beta", "sigma"),
    "shards": ("shards_per_client", "drop_rest"),
    "classes_per_client": ("classes_per_client",),
    "few_per_class": ("classes_per_client", "images_per_class"),
    "quantity_dirichlet": ("beta",),
    "quantity_lognormal": ("sigma",),
    "feature_noise": ("noise_std",),
    "feature_rotation": ("angle",),
    "natural": (),
    "blocks": (),
}
OF_SIZES = {"beta": "dirichlet", "sigma": "lognormal"}  # of dirichlet_client: the value of `sizes` that reads them
NAMES = tuple(FIELDS)
SHARED = ("clients", "min_images", "max_tries", "public", "holdout", "test")
CHOICES = {"prior": ("shares", "ones"), "sizes": ("equal", "dirichlet", "lognormal"), "test": ("proportional", "global")}
COUNTED = ("shards_per_client", "classes_per_client", "images_per_class", "max_tries")  # at least 1
MEASURED = ("min_images", "public", "sigma", "noise_std", "angle")  # at least 0


@dataclass(frozen=True)
class PartitionSettings:
    """The section [partition]: which client holds which images. A job refuses fields of other schemes (`fedsim.config.unused`)."""

    name: str = "dirichlet_class"  # the scheme by which images are dealt to clients; or "package.module:function" of your own
    clients: int = 10  # N, all registered clients; natural: 0 for one per user
    alpha: float = 0.5  # dirichlet_class, dirichlet_client: concentration
    balance: bool = True  # dirichlet_class: full clients get none of the later classes
    prior: str = "shares"  # dirichlet_client: shares | ones
    sizes: str = "equal"  # dirichlet_client: equal | dirichlet (beta) | lognormal (sigma)
    beta: float = 0.5  # quantity_dirichlet: concentration of the sizes
    sigma: float = 1.0  # quantity_lognormal: sizes ~ exp(sigma z)
    shards_per_client: int = 2  # shards: of the images in the order of their classes
    drop_rest: bool = False  # shards: equal pieces, the remainder dropped
    classes_per_client: int = 2  # classes_per_client, few_per_class: of each client
    images_per_class: int = 20  # few_per_class: of each client
    noise_std: float = 0.1  # feature_noise: of the last client, pixel values in [0, 1]
    angle: float = 45.0  # feature_rotation: largest, degrees
    min_images: int = 10  # m, images of every client, held-out ones included
    max_tries: int = 10  # draws before the best of them is repaired
    public: int = 0  # images per class kept for the server
    holdout: float = 0.0  # share of each client's images it does not train on
    seed: int | None = None  # of the partition alone; by default the job's
    test: str = "proportional"  # proportional (each client has test images) | global (none has)
    arguments: dict[str, Any] | None = None  # of a function of your own, by name

    def __post_init__(self) -> None:
        if self.name not in NAMES and not own_partition.is_offered(self.name):
            every = [*NAMES, *entry_points.names(entry_points.PARTITIONS)]
            raise entry_points.unknown("[partition] name", self.name, every, '; or "package.module:function"')
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise BadInput(f"[partition] {field} = {getattr(self, field)!r} is not known. There are: {', '.join(known)}")
        for field in (*COUNTED, *MEASURED):
            low = 1 if field in COUNTED else 0
            if not low <= getattr(self, field) < float("inf"):
                raise BadInput(f"[partition] {field} = {getattr(self, field)} must be at least {low}")
        for field in ("alpha", "beta"):
            if not 0 < getattr(self, field) < float("inf"):
                raise BadInput(f"[partition] {field} = {getattr(self, field)} must be above 0")
        if not 0 <= self.holdout < 1:
            raise BadInput(f"[partition] holdout = {self.holdout} must be at least 0 and below 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise BadInput(f"[partition] seed = {self.seed} must be at least 0 and below 2^63")
        if self.clients < (0 if self.name == "natural" else 1):
            raise BadInput(f"[partition] clients = {self.clients} must be at least 1 (natural: 0 gives one client per user)")


@dataclass(frozen=True, eq=False)
class Deal:
    """What a partition did."""

    owner: Ints  # (n,) the client of each image, -1 where the scheme dropped it
    clients: int
    shares: Floats | None = None  # the Dirichlet shares, where there are: (C, N) class-wise, (N, C) client-wise
    tries: int = 1
    moved: int = 0  # images moved by the repair

    def sizes(self) -> Ints:
        """(N,) images of each client."""
        return np.bincount(self.owner[self.owner >= 0], minlength=self.clients)

    def counts(self, labels: Ints, classes: int) -> Ints:
        """(N, C) images of each client and class."""
        return tally(self.owner, labels, self.clients, classes)


def generator(seed: int, purpose: str) -> Generator:
    """The generator of one purpose (partition, public, holdout, test), so that changing one leaves the others."""
    return default_rng(SeedSequence(int.from_bytes(sha256(f"{seed}/{purpose}".encode()).digest(), "little")))


def own_fields(settings: PartitionSettings) -> tuple[str, ...]:
    """The fields of its scheme alone."""
    return FIELDS.get(settings.name, ("arguments",))


def users_of(field: str) -> list[str]:
    """The schemes that have a field of their own of this name."""
    return [name for name, own in FIELDS.items() if field in own]


def parameters(settings: PartitionSettings) -> dict[str, int | float | str | bool]:
    """The fields that this scheme depends on."""
    return {field: getattr(settings, field) for field in (*SHARED, *own_fields(settings))}


def deal(labels: Ints, settings: PartitionSettings, rng: Generator, users: Ints | None = None) -> Deal:
    """Deal n images to clients by the scheme named; every client gets at least `min_images`.

    labels (n,), users (n,) for `natural`. Up to `max_tries` draws; where none reaches the least size, the one with the largest
    minimum is repaired. BadInput if the data cannot give what is asked.
    """
    check_enough(settings, len(labels))
    best = None
    for tries in range(1, settings.max_tries + 1):
        owner, shares = _draw(labels, settings, rng, users)
        drawn = Deal(owner, settings.clients or int(owner.max()) + 1, shares, tries)
        if best is None or drawn.sizes().min() > best.sizes().min():
            best = drawn
        if best.sizes().min() >= settings.min_images or settings.name not in RANDOM_SIZES:
            break
    assert best is not None
    return _repaired(Deal(best.owner, best.clients, best.shares, tries), labels, settings, rng)


def check_enough(settings: PartitionSettings, n: int) -> None:
    """BadInput if n images cannot give every client its least."""
    if n == 0:
        public = f"public = {settings.public} keeps every image for the server; lower public"
        raise BadInput(f"[partition] no image is left for clients: {public if settings.public else 'the data have none'}")
    if settings.clients * settings.min_images > n:
        asked = f"clients = {settings.clients} x min_images = {settings.min_images} images"
        raise BadInput(
            f"[partition] {asked} = {settings.clients * settings.min_images}, but there are {n} to deal: lower clients or min_images"
        )


def tally(owner: Ints, labels: Ints, clients: int, classes: int) -> Ints:
    """(N, C) how many images of each class each client owns."""
    held = owner >= 0
    return np.bincount(owner[held] * classes + labels[held], minlength=clients * classes).reshape(clients, classes)


def _repaired(drawn: Deal, labels: Ints, settings: PartitionSettings, rng: Generator) -> Deal:
    size = drawn.sizes()
    if size.min() >= settings.min_images or settings.name == "natural":
        return drawn
    if size.sum() < drawn.clients * settings.min_images or settings.name == "few_per_class" or settings.name not in FIELDS:
        gives = f"{settings.name} gives client {size.argmin()} {size.min()} images, fewer than min_images = {settings.min_images}"
        more = "raise images_per_class or classes_per_client" if settings.name == "few_per_class" else "lower clients"
        raise BadInput(f"[partition] {gives}: lower min_images, or {more}")
    moved = partition_schemes.repair(drawn.owner, labels, drawn.clients, settings.min_images, rng)
    return Deal(drawn.owner, drawn.clients, drawn.shares, drawn.tries, moved)


Drawn = tuple[Ints, Floats | None]


def _draw(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    return DRAW.get(s.name, _by_own)(labels, s, rng, users)


def _sizes(n: int, s: PartitionSettings, rng: Generator, rule: str) -> Ints:
    if rule == "dirichlet":
        return partition_schemes.dirichlet_sizes(n, s.clients, s.beta, rng)
    if rule == "lognormal":
        return partition_schemes.lognormal_sizes(n, s.clients, s.sigma, rng)
    return partition_schemes.equal_sizes(n, s.clients)


def _sized(rule: str) -> Callable[..., Drawn]:
    return lambda labels, s, rng, users: (partition_schemes.iid(_sizes(len(labels), s, rng, rule), rng), None)


def _by_class(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    return partition_schemes.dirichlet_class(labels, s.clients, s.alpha, s.balance, rng)


def _by_client(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    return partition_schemes.dirichlet_client(labels, _sizes(len(labels), s, rng, s.sizes), s.alpha, s.prior, rng)


def _in_shards(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    return partition_schemes.shards(labels, s.clients, s.shards_per_client * s.clients, s.drop_rest, rng), None


def _by_few_classes(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    present = len(np.unique(labels))
    if s.classes_per_client > present:
        raise BadInput(f"[partition] classes_per_client = {s.classes_per_client}, but the data have {present} classes")
    if s.name == "few_per_class":
        return partition_schemes.few_per_class(labels, s.clients, s.classes_per_client, s.images_per_class, rng), None
    return partition_schemes.classes_per_client(labels, s.clients, s.classes_per_client, rng), None


def _by_own(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    return own_partition.deal(s.name, labels, s.clients, rng, users, s.arguments or {}), None


def _by_user(labels: Ints, s: PartitionSettings, rng: Generator, users: Ints | None) -> Drawn:
    if users is None:
        known = ", ".join(name for name in NAMES if name != "natural")
        raise BadInput(
            f'[partition] name = "natural" needs a file with a dataset `client`, the user of each image; without it there are: {known}'
        )
    return partition_schemes.natural(users, s.clients, s.min_images, rng), None


RANDOM_SIZES = ("dirichlet_class", "dirichlet_client", "quantity_dirichlet", "quantity_lognormal")
DRAW: dict[str, Callable[[Ints, PartitionSettings, Generator, Ints | None], Drawn]] = {
    "iid": _sized("equal"),
    "dirichlet_class": _by_class,
    "dirichlet_client": _by_client,
    "shards": _in_shards,
    "classes_per_client": _by_few_classes,
    "few_per_class": _by_few_classes,
    "quantity_dirichlet": _sized("dirichlet"),
    "quantity_lognormal": _sized("lognormal"),
    "feature_noise": _sized("equal"),
    "feature_rotation": _sized("equal"),
    "natural": _by_user,
}
