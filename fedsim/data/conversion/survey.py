"""The first reading of a source: labels become classes, users get numbers, and it is decided which images are test images.

It holds some numbers for each image, and no pixels.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import rng
from fedsim.data.conversion.options import Options
from fedsim.data.conversion.source import Source, shortened
from fedsim.data.own_file.labels import only_tested
from fedsim.errors import BadInput

Ints = NDArray[np.int64]
SHOWN = 12  # labels that a message lists
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NONE = -1  # the user of an image without one
RELABEL = "--relabel numbers the labels that occur from 0, in sorted order"


@dataclass(frozen=True)
class Survey:
    y: Ints  # (n,) in 0 … classes-1
    test: NDArray[np.bool_]  # (n,)
    classes: int
    class_names: tuple[str, ...] | None
    users: Ints | None  # (n,): numbers of users as the source has them, or places in `user_names`
    user_names: tuple[str, ...] | None
    notes: list[str] = field(default_factory=list)

    def user(self, some: NDArray[Any]) -> Ints | list[str] | None:
        """The users of some images, as the source names them; None where these images have none."""
        if self.users is None or not (self.users[some] != NONE).any():
            return None
        return [self.user_names[i] for i in self.users[some].tolist()] if self.user_names else self.users[some]


class _Column:
    """A column of texts: each is held once, and its number for each image."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}
        self.codes = array("q")

    def add(self, text: str | None) -> None:
        self.codes.append(NONE if text is None else self.number.setdefault(text, len(self.number)))

    def where(self, text: str) -> int:
        """The first image that has this text."""
        return self.codes.index(self.number[text])


def survey(source: Source, options: Options) -> Survey:
    """Reads all labels and users. BadInput says what is wrong with them."""
    labels, users, test, keys = _Column(), _Column(), array("b"), array("q")
    for row in source.rows():
        labels.add(row.label)
        users.add(row.user)
        test.append(row.test)
        if options.test_share is not None:
            keys.append(rng.number("test share", row.where))
    if not test:
        raise BadInput(f"{source.name} has no images")
    y, classes, names, notes = _classes(source, labels, options.relabel)
    is_test = np.array(test, bool)
    if options.test_share is not None:
        if is_test.any():
            raise BadInput(f"--test-share: {source.name} has {is_test.sum():,} test images of its own; leave it out")
        is_test = drawn(y, np.array(keys), options.test_share)
        if options.test_share and not is_test.any():
            what = f"--test-share {options.test_share:g}: each class of {source.name} has one image, which is trained on"
            raise BadInput(f"{what}; --test-share 0 says that there are no test images")
    numbers, called = _users(source, users, is_test)
    if is_test.any():
        notes += only_tested(y[~is_test], y[is_test], names)
    return Survey(y, is_test, classes, names, numbers, called, [*source.notes, *notes])


def drawn(y: Ints, keys: Ints, share: float) -> NDArray[np.bool_]:
    """(n,) True at a share of each class, rounded, at least one and never all: those with the smallest keys."""
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y) if share else ():
        member = np.flatnonzero(y == label)
        count = min(max(round(share * len(member)), 1), len(member) - 1)
        chosen[member[np.argsort(keys[member], kind="stable")[:count]]] = True
    return chosen


def _classes(source: Source, labels: _Column, relabel: bool) -> tuple[Ints, int, tuple[str, ...] | None, list[str]]:
    """(n,) the class of each image, how many classes there are, what they are called, and notes."""
    codes, texts = np.array(labels.codes), list(labels.number)
    if source.numbers == "known" and not relabel:
        return np.array([int(text) for text in texts])[codes], source.classes, source.class_names, []
    numbers = _whole(source, labels, relabel)
    if numbers is None:
        known = sorted(texts)
        _two(source, known)
        place = {text: i for i, text in enumerate(known)}
        return np.array([place[text] for text in texts])[codes], len(known), tuple(known), [_renamed(known)]
    values = sorted(set(numbers))
    _two(source, values)
    if relabel:
        place_of = {value: i for i, value in enumerate(values)}
        names = [source.class_names[value] if source.class_names else str(value) for value in values]
        return np.array([place_of[number] for number in numbers])[codes], len(values), tuple(names), [_renamed(names)]
    _refuse_gaps(source, labels, numbers, values)
    return np.array(numbers)[codes], len(values), None, []


def _whole(source: Source, labels: _Column, relabel: bool) -> list[int] | None:
    """The whole number that each label is; None where labels are names."""
    texts = list(labels.number)
    if source.numbers == "names":  # of folders: numbers if all of them are, and no two the same
        numbers = [int(text) for text in texts if text.isascii() and text.isdecimal()]
        return numbers if len(set(numbers)) == len(texts) else None
    looks = [text for text in texts if NUMBER.fullmatch(text)]
    if not looks:
        return None
    name = next((text for text in texts if not NUMBER.fullmatch(text)), None)
    odd = name if name is not None else next((text for text in looks if not float(text).is_integer()), None)
    if odd is None:
        return [int(text) if text.removeprefix("-").isdecimal() else int(float(text)) for text in texts]
    if relabel:
        return None
    other = f", and others such as {shortened(looks[0])} are numbers" if name is not None else ""
    what = f"{source.name}: the label {shortened(odd)} (image {labels.where(odd)}) is no whole number"
    raise BadInput(f"{what}{other}; --relabel takes all labels as names of classes")


def _refuse_gaps(source: Source, labels: _Column, numbers: list[int], values: list[int]) -> None:
    if values[0] < 0:
        image = labels.codes.index(numbers.index(values[0]))
        raise BadInput(f"{source.name}: the label {values[0]} (image {image}) is below 0; labels count from 0, and {RELABEL}")
    if values[-1] == len(values) - 1:
        return
    has, gap = set(values), []
    for number in range(values[-1]):
        if number not in has:
            gap.append(number)
        if len(gap) > SHOWN:
            break
    shown = ", ".join(map(str, gap[:SHOWN])) + (", …" if len(gap) > SHOWN else "")
    what = f"the labels go from {values[0]} to {values[-1]:,}, and no image has {shown}"
    raise BadInput(f"{source.name}: {what}; labels should be 0 … classes-1, and {RELABEL}")


def _two(source: Source, known: list[str] | list[int]) -> None:
    if len(known) < 2:
        raise BadInput(f"{source.name}: all images have the label {known[0]!r}; there must be at least 2 classes")


def _renamed(names: list[str]) -> str:
    shown = ", ".join(f"{name} -> {i}" for i, name in enumerate(names[:SHOWN]))
    return f"labels are numbered in sorted order: {shown}{', …' if len(names) > SHOWN else ''}"


def _users(source: Source, users: _Column, test: NDArray[np.bool_]) -> tuple[Ints | None, tuple[str, ...] | None]:
    """(n,) the user of each image, and the names of users that are no numbers."""
    if not users.number:
        return None, None
    codes = np.array(users.codes)
    for part, some in (("training", ~test), ("test", test)):
        if len(np.unique(codes[some] == NONE)) > 1:
            raise BadInput(f"{source.name}: some {part} images have a user and some have none; give each image one")
    if (codes[~test] == NONE).any():
        raise BadInput(f"{source.name}: the test images have users, the training images have none")
    texts = list(users.number)
    if numbers := _plain(texts):
        return np.array([*numbers, NONE])[codes], None
    place = {text: i for i, text in enumerate(sorted(texts))}
    return np.array([*(place[text] for text in texts), NONE])[codes], tuple(sorted(texts))


def _plain(texts: Iterable[str]) -> list[int]:
    """The numbers that the texts are written as; empty where some are not."""
    texts = list(texts)
    numbers = [int(text) for text in texts if text.isascii() and text.isdecimal() and len(text) < 19]
    return numbers if [str(number) for number in numbers] == texts else []
