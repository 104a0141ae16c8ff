"""What images are converted from: first every label and user, without pixels, then the pixels, one image after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.core.types import Data

Picture = NDArray[np.uint8]  # (C, H, W)

LETTERS = 40  # of a text in a message at most
AT_ONCE = 1024  # images that are taken from a data set at once


@dataclass(frozen=True)
class Row:
    """One image without its pixels."""

    where: str  # the image in messages, such as a path below the source; an image has the same text on every machine
    label: str
    user: str | None = None
    test: bool = False


class Source(Protocol):
    """Images that can be read twice in the same order."""

    notes: list[str]  # what was left out or read in a certain way; complete after `rows`

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def numbers(self) -> str:
        """Which labels are numbers: "words" that all look like it, or none; "names", numbers if all are; "known", 0 … classes-1."""
        ...

    @property
    def classes(self) -> int:
        """How many classes there are where they are known."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Their names, if they have some."""
        ...

    def rows(self) -> Iterator[Row]:
        """Every image without its pixels."""
        ...

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """The same images in the same order, as messages call them, and their pixels."""
        ...


@dataclass
class Opened:
    """The images of a data set that fedsim has opened: by its name, or of an HDF5 or npz file."""

    name: str
    train: Data
    test: Data
    notes: list[str] = field(default_factory=list)
    numbers: str = "known"

    @property
    def classes(self) -> int:
        return self.train.classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return getattr(self.train, "class_names", None)

    def rows(self) -> Iterator[Row]:
        for part, data in (("train", self.train), ("test", self.test)):
            users, called = getattr(data, "users", None), getattr(data, "user_names", None)
            for index in blocks(len(data)):
                who: list[Any] = [None] * len(index) if users is None else users[index].tolist()
                for i, label, user in zip(index.tolist(), data.labels(index).tolist(), who, strict=True):
                    text = None if user is None else called[user] if called else str(user)
                    yield Row(f"{part} image {i}", str(label), text, part == "test")

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        for part, data in (("train", self.train), ("test", self.test)):
            for index in blocks(len(data)):
                yield from ((f"{part} image {i}", picture) for i, picture in zip(index.tolist(), data.images(index).numpy(), strict=True))


@dataclass
class Together:
    """A source of training images and one of test images."""

    train: Source
    test: Source

    def __post_init__(self) -> None:
        self.name, self.numbers = self.train.name, self.train.numbers
        self.classes, self.class_names = self.train.classes, self.train.class_names
        self.notes: list[str] = []

    def rows(self) -> Iterator[Row]:
        self.notes = []
        for source in (self.train, self.test):
            for row in source.rows():
                if row.test:
                    raise BadInput(f"{source.name} has test images of its own ({row.where}); leave out --test")
                yield Row(f"{source.name}: {row.where}", row.label, row.user, source is self.test)
            self.notes += source.notes

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        for source in (self.train, self.test):
            yield from ((f"{source.name}: {where}", picture) for where, picture in source.pictures())


def shortened(text: str) -> str:
    """A text in quotes for a message, cut where it is long."""
    return repr(text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…")


def blocks(n: int) -> Iterator[torch.Tensor]:
    """The numbers 0 … n-1 in pieces."""
    for begin in range(0, n, AT_ONCE):
        yield torch.arange(begin, min(begin + AT_ONCE, n))
