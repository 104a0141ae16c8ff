"""IDX, the form of MNIST's files (LeCun, Cortes and Burges): a file of images and one of labels, plain or compressed by gzip.

A file begins with two zero bytes, the type of its values, the number of its axes, and the length of each axis as 4 bytes, the highest
first. A folder has the training pair and perhaps the test pair, whose names have `t10k` or `test` in them.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fedsim.data.conversion.image_files import inside
from fedsim.data.conversion.source import Picture, Row
from fedsim.errors import BadInput

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4"}  # of labels; images have the first
PIXELS = 1 << 26  # of one image at most: more are the sign of a broken file
AT_ONCE = 1024  # labels that are read at once
IMAGES, LABELS = re.compile("images"), re.compile("labels")


class IdxFiles:
    """See the module."""

    numbers, classes = "words", 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, path: str) -> None:
        self.name, self.notes = path, list[str]()
        self.pairs = [(*_pair(Path(path))[:2], False)] if Path(path).is_file() else _pairs(Path(path))

    def rows(self) -> Iterator[Row]:
        for images, labels, test in self.pairs:
            with opened(images) as file:
                n = _sizes(images, file, (3,))[1][0]
            i = -1
            for i, label in enumerate(_labels(labels, n, images)):
                yield Row(f"{images.name}, image {i}", str(label), None, test)
            if i < 0:
                raise BadInput(f"{images} has no images")

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        for images, _, _ in self.pairs:
            with opened(images) as file:
                _, (n, height, width) = _sizes(images, file, (3,))
                for i in range(n):
                    pixels = np.frombuffer(_taken(images, file, height * width, f"image {i} of {n}"), np.uint8)
                    yield f"{images.name}, image {i}", pixels.reshape(1, height, width)
                _at_end(images, file)


def read(images: Path, labels: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images (n, H, W) of one file, and the labels (n,) of another. BadInput where one is broken or they do not belong together."""
    with opened(images) as file:
        _, sizes = _sizes(images, file, (3,))
        pixels = np.frombuffer(_taken(images, file, math.prod(sizes), f"its {sizes[0]} images"), np.uint8).reshape(sizes)
        _at_end(images, file)
    return pixels.copy(), np.fromiter(_labels(labels, len(pixels), images), np.int64)


def is_idx(path: Path) -> bool:
    """Whether a file begins as IDX images or labels do."""
    try:
        with opened(path) as file:
            first = file.read(4)
    except BadInput:
        return False
    return len(first) == 4 and first[:2] == b"\0\0" and first[2] in TYPES and first[3] in (1, 3)


def has_idx(folder: Path) -> bool:
    """Whether a folder has images in this form."""
    return any(IMAGES.search(path.name) and ("idx3" in path.name or is_idx(path)) for path in folder.iterdir() if path.is_file())


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked. BadInput where it is broken."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except FileNotFoundError:
        raise BadInput(f"{path} is not there") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def _pair(path: Path) -> tuple[Path, Path, bool]:
    """A file of images, the file of labels with the corresponding name, and whether both are of test images by their names."""
    if not IMAGES.search(path.name):
        raise BadInput(f"{path}: give the file of the images, whose name has 'images' in it, or the folder of the files")
    stem = path.name.removesuffix(".gz").replace("images", "labels")
    names = [re.sub(r"idx\d", "idx1", stem), stem]
    for name in [f"{name}{ending}" for name in names for ending in ("", ".gz")]:
        if path.with_name(name).is_file():
            return path, path.with_name(name), bool(re.search("t10k|test", path.name))
    raise BadInput(f"{path} has no file of labels beside it; it should be called {names[0]} or {names[0]}.gz")


def _pairs(folder: Path) -> list[tuple[Path, Path, bool]]:
    """The training pair and the test pair of a folder. A file that is there unpacked too is used once."""
    files = {path.name.removesuffix(".gz"): path for path in sorted(folder.iterdir(), reverse=True) if IMAGES.search(path.name)}
    for path in folder.iterdir():
        inside(path, folder.resolve(), str(path))
    pairs = sorted((_pair(path) for path in files.values()), key=lambda pair: pair[2])
    for test, kind in ((False, "training"), (True, "test")):
        same = [images.name for images, _, is_test in pairs if is_test == test]
        if len(same) > 1:
            raise BadInput(
                f"{folder} has {len(same)} files of {kind} images: {', '.join(sorted(same))}; give one of them, and --test the other"
            )
    if all(pair[2] for pair in pairs):
        raise BadInput(f"{folder} has test images alone; give the file itself if these are to be trained on")
    return pairs


def _sizes(path: Path, file: IO[bytes], axes: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The type of the values and the length of each axis, from the beginning of the file."""
    first = file.read(4)
    if len(first) < 4 or first[:2] != b"\0\0" or first[2] not in TYPES:
        raise BadInput(f"{path} is no IDX file of whole numbers: it begins with {first!r}")
    if first[3] not in axes or (first[3] > 1 and first[2] != 0x08):
        kind = "images (n, H, W) of bytes" if 3 in axes else "labels (n,)"
        raise BadInput(f"{path} has {first[3]} axes of {TYPES[first[2]]}; it should hold {kind}")
    sizes = tuple(int(size) for size in np.frombuffer(_taken(path, file, 4 * first[3], "its beginning"), ">u4"))
    if math.prod(sizes[1:]) > PIXELS or 0 in sizes[1:]:
        raise BadInput(f"{path} says that its images are {'x'.join(map(str, sizes[1:]))}; the file is broken")
    return TYPES[first[2]], sizes


def _labels(path: Path, n: int, images: Path) -> Iterator[int]:
    with opened(path) as file:
        kind, (count,) = _sizes(path, file, (1,))
        if count != n:
            raise BadInput(f"{images} has {n} images and {path} has {count} labels; each image needs one label")
        for begin in range(0, n, AT_ONCE):
            some = min(AT_ONCE, n - begin)
            yield from np.frombuffer(_taken(path, file, some * np.dtype(kind).itemsize, f"label {begin} of {n}"), kind).tolist()
        _at_end(path, file)


def _taken(path: Path, file: IO[bytes], size: int, what: str) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise BadInput(f"{path} ends within {what}; is the file complete?")
    return found


def _at_end(path: Path, file: IO[bytes]) -> None:
    if file.read(1):
        raise BadInput(f"{path} goes on after what its beginning says; the file is broken")
