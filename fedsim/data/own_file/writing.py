"""Writes the HDF5 file that `data.name = "file"` reads, a batch after the other. Under its name there is a complete file or none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim.errors import BadInput
from fedsim.storage import disk_room


class FileWriter:
    """A file of images, written beside `out` and renamed at the end. It holds no images: what `add` is given is written at once.

    sizes: how many images each array of images will have: {"x": 60_000, "x_test": 10_000}.
    """

    def __init__(self, out: Path, sizes: Mapping[str, int]) -> None:
        self.out, self.aside = out, out.with_name(out.name + ".new")
        self.sizes = sizes
        self.done = dict.fromkeys(sizes, 0)
        try:
            if self.aside.exists():  # the rest of a command that was killed, unless one still writes it
                _refuse_busy(self.aside, out)
                self.aside.unlink()
            self.file = h5py.File(self.aside, "x")
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error}; choose another --out") from error

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.file.flush()
            end = self.file.id.get_filesize()
            self.file.close()
            disk_room.give_back(os.open(self.aside, os.O_RDWR | os.O_CLOEXEC), end)
            if kind is None:
                disk_room.sync(self.aside)
                self.aside.rename(self.out)
        finally:
            with suppress(OSError):
                self.aside.unlink(missing_ok=True)

    def add(self, name: str, images: NDArray[np.uint8]) -> None:
        """Writes the next images (b, C, H, W) of an array; grey ones without the axis of channels."""
        rows = images[:, 0] if images.shape[1] == 1 else images
        if name not in self.file:
            shape = (self.sizes[name], *rows.shape[1:])
            disk_room.reserve(self.file, self.aside, int(np.prod(shape, dtype=np.int64)) + disk_room.STEP, self.out)
            self.file.create_dataset(name, shape, np.uint8)
        begin = self.done[name]
        self.file[name][begin : begin + len(rows)] = rows
        self.done[name] = begin + len(rows)

    def column(self, name: str, values: NDArray[Any] | Sequence[str]) -> None:
        """Writes a whole array of numbers or texts."""
        texts = not isinstance(values, np.ndarray)
        size = sum(len(text.encode()) + 32 for text in values) if texts else values.nbytes  # type: ignore[union-attr]
        disk_room.reserve(self.file, self.aside, size + disk_room.STEP, self.out)
        self.file.create_dataset(name, data=values, dtype=h5py.string_dtype() if texts else None)


def is_hdf5(path: Path) -> bool:
    return path.is_file() and bool(h5py.is_hdf5(path))


def _refuse_busy(aside: Path, out: Path) -> None:
    """BadInput where another command writes the file: HDF5 holds a lock on what it writes."""
    with aside.open("r+b") as file, suppress(OSError):  # a file system without locks tells nothing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{out} is being written by another command ({aside}); wait for it, or choose another --out") from None
