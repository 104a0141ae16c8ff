"""The arrays in a user's own file, HDF5 or npz, by their names. Nothing is unpickled: a pickle can run code."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fedsim_analysis import run_file
from numpy.typing import NDArray

from fedsim.errors import BadInput

Array = NDArray[Any]
OTHER_NAMES = {"x": "x_train", "y": "y_train", "client": "users", "client_test": "users_test"}
KNOWN = ("x", "y", "client", "x_test", "y_test", "client_test", "class_names")
SAVE = 'numpy.savez("mine.npz", x=images, y=labels)'
CONVERT = "`fedsim data FOLDER --out mine.h5` converts"
BEGINNINGS = {  # of files that are neither: what they are, and what to do
    b"\x93NUMPY": f"a single array of numpy.save; write both arrays: {SAVE}",
    b"\x80": f"a pickle, which fedsim does not load since a pickle can run code; load it yourself and write {SAVE}",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x89PNG": f"one image; {CONVERT} a folder of images",
    b"\xff\xd8\xff": f"one image; {CONVERT} a folder of images",
    b"\0\0\x08": f"IDX, as MNIST's files; {CONVERT} the folder of these files",
    b"MATLAB 5": f"a MATLAB file; load it with scipy.io.loadmat and write {SAVE}",
}
BROKEN = (OSError, RuntimeError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)  # by broken files


@dataclass(frozen=True)
class Source:
    """An open file: its arrays by name. An array of HDF5 is read when it is sliced."""

    where: str  # how messages name it
    arrays: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self._called(name) in self.arrays

    def array(self, name: str) -> Any:
        """The array, or its other name's; BadInput where there is none, or where it is made of Python objects."""
        called = self._called(name)
        if called not in self.arrays:
            has = ", ".join(sorted(self.arrays)[:20]) or "nothing"
            raise BadInput(f"{self.where} has no array {name!r}. It has: {has}; known are: {', '.join(KNOWN)}")
        try:
            found = self.arrays[called]
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            what = f"{self.where}: {called} is an array of Python objects, which only a pickle can hold, and a pickle can run code"
            raise BadInput(f"{what}; write a plain array of numbers or text (x.astype(numpy.uint8), y.astype(str))") from error
        if not hasattr(found, "dtype"):
            raise BadInput(f"{self.where}: {called} is not an array")
        if found.dtype.kind not in "biufcSUO" or not isinstance(found.shape, tuple):
            raise BadInput(f"{self.where}: {called} is an array of {found.dtype}; it must be of plain numbers or text")
        if isinstance(found, h5py.Dataset) and (lost := _lost(found)):
            raise BadInput(
                f"{self.where}: {called} is a virtual dataset, and a part of it is missing: {lost}. HDF5 would read zeros in its place."
                " Put the file back, or copy the values into one file"
            )
        return found

    def _called(self, name: str) -> str:
        other = OTHER_NAMES.get(name, name)
        if other != name and name in self.arrays and other in self.arrays:
            raise BadInput(f"{self.where} has both {name!r} and {other!r}, two names of the same array; leave one out")
        return name if name in self.arrays else other if other in self.arrays else name


@contextmanager
def opened(path: str) -> Iterator[Source]:
    """The file, by what it holds and whatever its name ends in. BadInput where it is neither HDF5 nor npz, or cannot be read."""
    where = f"[data] {path}"
    if Path(path).is_dir():
        raise BadInput(f"[data] path: {path} is a folder; it must be an HDF5 or npz file")
    if not Path(path).is_file():
        raise BadInput(f"[data] path: there is no file {Path(path).absolute()}")
    try:
        if h5py.is_hdf5(path):
            with run_file.apart(path) as file:
                yield Source(where, _datasets(file))
        elif zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as file:
                yield Source(where, _NpzArrays(file))
        else:
            raise BadInput(f"[data] path: {path} is neither an HDF5 file nor an npz file (numpy.savez); {_looks(path)}")
    except BadInput:
        raise
    except MemoryError as error:
        raise BadInput(f"{where} needs more memory than there is: {error}") from error
    except BROKEN as error:
        raise BadInput(f"{where} cannot be read: {error or type(error).__name__}; is the file complete?") from error


def _looks(path: str) -> str:
    """What the file seems to be, by its first bytes."""
    with Path(path).open("rb") as file:
        first = file.read(16)
    found = next((what for beginning, what in BEGINNINGS.items() if first.startswith(beginning)), "")
    return f"it looks like {found}" if found else f"its first bytes are {first[:8]!r}. Write one by {SAVE}"


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets, also those in groups, by their paths."""
    found: dict[str, h5py.Dataset] = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def _lost(dataset: h5py.Dataset) -> str:
    """The first source of a virtual dataset that is not there: its file, or the dataset in it; empty where all are."""
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        if source.file_name == "." or "%b" in source.file_name + source.dset_name:  # this file itself; a series, which may end early
            continue
        places = [folder / source.file_name for folder in (Path(dataset.file.filename).parent, Path())]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return f"there is no file {source.file_name}"
        with run_file.apart(file) as opened_source:
            if source.dset_name not in opened_source:
                return f"{source.file_name} has no {source.dset_name}"
    return ""


class _NpzArrays(Mapping[str, Array]):
    """The arrays of an npz file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Array:
        found: Array = self.file[name]
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.file.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.files)

    def __len__(self) -> int:
        return len(self.file.files)
