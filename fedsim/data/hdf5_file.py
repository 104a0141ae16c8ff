"""`file`: a user's own data in one HDF5 file.

Datasets: x (n, C, H, W) or (n, H, W) uint8 and y (n,) whole numbers from 0; if it has natural users, client (n,) whole numbers;
if it has a test part, x_test, y_test and, with client, perhaps client_test. Without a test part a fixed stratified fifth is the test set.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from fedsim.data.image_sets import Stored, moments, parted
from fedsim.errors import BadInput

NAMES = ("x", "y", "client", "x_test", "y_test", "client_test")


class Part(NamedTuple):
    """One part of the file."""

    x: Tensor  # (n, C, H, W) uint8
    y: Tensor  # (n,) int64
    users: Tensor | None


def open_file(path: str) -> tuple[Stored, Stored]:
    """Training and test set of the file. BadInput says what is missing or wrong in it."""
    if not Path(path).is_file():
        raise BadInput(f"[data] path: there is no file {Path(path).absolute()}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _parts(file, path)
    except OSError as error:
        raise BadInput(f"[data] path: {path} cannot be read as an HDF5 file: {error}") from error


def _parts(file: h5py.File, path: str) -> tuple[Stored, Stored]:
    whole = _part(file, path, "")
    if "x_test" not in file and "y_test" not in file:
        return parted("file", whole.x, whole.y, _classes(path, whole), whole.users)
    aside = _part(file, path, "_test")
    if aside.x.shape[1:] != whole.x.shape[1:]:
        raise BadInput(f"[data] {path}: images of x_test are {tuple(aside.x.shape[1:])}, those of x are {tuple(whole.x.shape[1:])}")
    classes, (mean, std) = _classes(path, whole, aside), moments(whole.x)
    train, test = (Stored("file", part.x, part.y, classes, mean, std, part.users) for part in (whole, aside))
    return train, test


def _part(file: h5py.File, path: str, ending: str) -> Part:
    x = _array(file, path, "x" + ending)
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
        raise BadInput(f"[data] {path}: x{ending} is {x.shape} {x.dtype}; it must be (n, C, H, W) or (n, H, W) uint8, and not empty")
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise BadInput(
            f"[data] {path}: x{ending} is {x.shape}, which looks like (n, H, W, C); it must be (n, C, H, W): x.transpose(0, 3, 1, 2)"
        )
    y = _column(file, path, "y" + ending, len(x))
    if y.min() < 0:
        raise BadInput(f"[data] {path}: y{ending} has the label {int(y.min())}; labels count from 0")
    users = _column(file, path, "client" + ending, len(x)) if "client" + ending in file else None
    return Part(torch.from_numpy(x if x.ndim == 4 else x[:, None]), y, users)


def _array(file: h5py.File, path: str, name: str) -> np.ndarray:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        has = ", ".join(sorted(file)) or "nothing"
        raise BadInput(f"[data] {path} has no dataset {name!r}. It has: {has}; known are: {', '.join(NAMES)}")
    return np.asarray(found[()])


def _column(file: h5py.File, path: str, name: str, n: int) -> Tensor:
    column = _array(file, path, name)
    if column.shape != (n,) or column.dtype.kind not in "iu":
        raise BadInput(f"[data] {path}: {name} is {column.shape} {column.dtype}; it must be ({n},) whole numbers, one per image")
    return torch.from_numpy(column.astype(np.int64))


def _classes(path: str, *parts: Part) -> int:
    classes = 1 + max(int(part.y.max()) for part in parts)
    if classes < 2:
        raise BadInput(f"[data] {path}: all labels are 0; there must be at least 2 classes")
    return classes
