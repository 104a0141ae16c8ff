"""A user's labels as classes 0 … n-1: whole numbers from 0 as they stand, one-hot rows, or with data.relabel any numbers or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.own_file import columns
from fedsim.data.own_file.columns import Column, Ints
from fedsim.errors import BadInput

RELABEL = "data.relabel = true numbers the labels that occur, in sorted order, from 0"
MANY = 1_000  # classes above which there must be at least as many images
LISTED = 12  # classes whose counts a note lists


@dataclass(frozen=True)
class Labels:
    values: dict[str, Tensor]  # (n,) int64 of each array
    classes: int
    names: tuple[str, ...] | None = None  # of the classes, where they were numbered anew
    notes: list[str] = field(default_factory=list)


def read(where: str, arrays: Mapping[str, Any], relabel: bool) -> Labels:
    """The labels of each array. BadInput says what is wrong, and where data.relabel would help."""
    notes: list[str] = []
    found, classes = {}, 0
    for name, array in arrays.items():
        found[name], width = _column(where, name, array, notes)
        classes = max(classes, width)
    if len({isinstance(column, list) for column in found.values()}) > 1:
        raise BadInput(f"{where}: of {' and '.join(found)} one has numbers and one has text; both must have the same labels")
    if relabel:
        return _relabelled(where, found, notes)
    numbers = {name: _from_zero(where, name, column) for name, column in found.items()}
    images, largest = sum(len(column) for column in numbers.values()), max(int(column.max()) for column in numbers.values())
    classes = max(classes, 1 + largest)
    if classes > max(MANY, images):
        raise BadInput(f"{where}: the largest label is {largest}, so {classes:,} classes of {images:,} images; {RELABEL}")
    _check(where, classes)
    notes += _gaps(numbers, classes) + _only_tested(numbers)
    return Labels({name: torch.from_numpy(column) for name, column in numbers.items()}, classes, None, notes)


def named(where: str, labels: Labels, array: Any) -> Labels:
    """The labels with the names that the file has for its classes, also for classes without an image. BadInput where they do not fit."""
    if labels.names is not None and not all(name.isdecimal() for name in labels.names):
        return labels  # the labels are texts, which data.relabel has numbered
    names = columns.read(where, "class_names", array, array.shape[0] if array.shape else 0)
    numbers = range(labels.classes) if labels.names is None else [int(name) for name in labels.names]
    if not isinstance(names, list) or max(numbers) >= len(names):
        kind = f"{len(names)} texts" if isinstance(names, list) else str(array.dtype)
        raise BadInput(f"{where}: class_names has {kind}; it must be a text for each of the classes 0 … {max(numbers)}")
    if labels.names is None:
        return replace(labels, classes=len(names), names=tuple(names))
    return replace(labels, names=tuple(names[number] for number in numbers))


def _column(where: str, name: str, array: Any, notes: list[str]) -> tuple[Column, int]:
    """The labels, and the classes that one-hot rows name (0: they are no such rows)."""
    shape = array.shape
    if len(shape) != 2 or shape[1] < 2 or array.dtype.kind not in "biuf":
        return columns.read(where, name, array, shape[0]), 0
    rows = np.asarray(array[()])
    if not ((rows == 0) | (rows == 1)).all() or not ((rows == 1).sum(1) == 1).all():
        right = f"it must be ({shape[0]},), one label for each image, or rows with a single 1"
        raise BadInput(f"{where}: {name} is {shape} {array.dtype}; {right}. Images with several labels cannot be used")
    notes.append(f"{name} is {shape}, read as one-hot rows: the class is the place of the 1")
    return rows.argmax(1).astype(np.int64), shape[1]


def _from_zero(where: str, name: str, column: Column) -> Ints:
    if isinstance(column, list):
        raise BadInput(f"{where}: {name} has labels of text, such as {column[0]!r}; {RELABEL}")
    if column.min() < 0:
        raise BadInput(f"{where}: {name} has the label {int(column.min())}; labels count from 0, and {RELABEL}")
    return column


def _relabelled(where: str, found: Mapping[str, Column], notes: list[str]) -> Labels:
    known = sorted(set(chain.from_iterable(column if isinstance(column, list) else column.tolist() for column in found.values())))
    _check(where, len(known))
    number = {label: i for i, label in enumerate(known)}
    values = {name: np.array([number[label] for label in _listed(column)], dtype=np.int64) for name, column in found.items()}
    names = tuple(map(str, known))
    shown = ", ".join(f"{name} -> {i}" for i, name in enumerate(names[:LISTED]))
    notes.append(f"labels were numbered anew: {shown}{', …' if len(names) > LISTED else ''}; the run file has the list")
    notes += _only_tested(values, names)
    return Labels({name: torch.from_numpy(column) for name, column in values.items()}, len(known), names, notes)


def _listed(column: Column) -> list[Any]:
    return column if isinstance(column, list) else column.tolist()


def _check(where: str, classes: int) -> None:
    if classes < 2:
        raise BadInput(f"{where}: all labels are equal; there must be at least 2 classes")


def _gaps(numbers: Mapping[str, Ints], classes: int) -> list[str]:
    """A note about classes without an image."""
    count = sum(np.bincount(column, minlength=classes) for column in numbers.values())
    empty = np.flatnonzero(np.asarray(count) == 0)
    if not len(empty):
        return []
    return [f"{classes} classes, of which {_some(empty)} {_has(empty)} no image ({_counts(count, classes)}); {RELABEL}"]


def _only_tested(numbers: Mapping[str, Ints], names: Sequence[str] | None = None) -> list[str]:
    """`only_tested` where the file has a test part."""
    if len(numbers) < 2:
        return []
    train, test = numbers.values()
    return only_tested(train, test, names)


def only_tested(train: Ints, test: Ints, names: Sequence[str] | None = None) -> list[str]:
    """A note about classes that only the test set has."""
    missing = np.setdiff1d(test, train)
    if not len(missing):
        return []
    images = int(np.isin(test, missing).sum())
    which = ", ".join(names[i] for i in missing[:LISTED]) if names else _some(missing)
    return [f"the test set alone has class {which} ({images} of its {len(test)} images): no client trains on it"]


def _some(classes: Ints) -> str:
    return ", ".join(map(str, classes[:LISTED])) + (f" and {len(classes) - LISTED} more" if len(classes) > LISTED else "")


def _has(classes: Ints) -> str:
    return "has" if len(classes) == 1 else "have"


def _counts(count: Any, classes: int) -> str:
    held = np.flatnonzero(count)[:LISTED]
    return "images by class: " + ", ".join(f"{c} has {count[c]}" for c in held) + (", …" if np.count_nonzero(count) > LISTED else "")
