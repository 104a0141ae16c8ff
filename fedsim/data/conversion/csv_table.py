"""A CSV file: a path and a label for each image, or the label and the pixels themselves, as MNIST is often passed on.

The first line names the columns: path (or file, filename, image), label (or class, target), user (or client, writer), part (or split:
train or test). Without a column of paths all others are pixels. A file of numbers alone has the label first.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from fedsim.data.conversion.image_files import inside, read
from fedsim.data.conversion.source import Picture, Row, shortened
from fedsim.errors import BadInput

COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "target"),
    "user": ("user", "client", "writer"),
    "part": ("part", "split"),
}
PARTS = {"train": False, "training": False, "test": True, "testing": True}
OTHER = 5  # columns that a note names
FORM = "path,label or path,label,user, or label and the pixels"


class CsvTable:
    """See the module."""

    numbers, classes = "words", 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, path: str, images: str | None = None, shape: tuple[int, int, int] | None = None) -> None:
        self.name, self.path = path, Path(path)
        self.root = Path(images or self.path.parent).resolve()
        self.notes: list[str] = []
        with self._lines() as lines:
            first = next(lines, None)
        if not first or not any(first[1]):
            raise BadInput(f"{path} is empty; its columns should be {FORM}")
        self.header = not all(_is_number(cell) for cell in first[1])
        self.width = len(first[1])
        self.place = self._places(first[1]) if self.header else {"label": 0}
        self.pixels = [i for i in range(self.width) if i not in self.place.values()]
        self.shape = None if "path" in self.place else self._shape(shape)
        if "path" in self.place and shape:
            raise BadInput(f"--shape is for a CSV of pixels; {path} has paths of image files")
        if "path" not in self.place and images:
            raise BadInput(f"--images is for a CSV of paths; {path} has no column {' or '.join(COLUMNS['path'])}")
        self.others = [first[1][i] for i in self.pixels] if "path" in self.place else []

    def rows(self) -> Iterator[Row]:
        shown = ", ".join(self.others[:OTHER]) + (", …" if len(self.others) > OTHER else "")
        self.notes = [f"columns that are not used: {shown}"] if self.others else []
        for line, cells in self._rows():
            where = f"line {line}"
            fields = {name: cells[i].strip() for name, i in self.place.items()}
            for name in ("path", "label", "user"):
                if name in fields and not fields[name]:
                    raise BadInput(f"{self.name}, {where}: the {name} is empty; each image needs one")
            yield Row(fields.get("path", where), fields["label"], fields.get("user"), self._is_test(where, fields.get("part")))

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        for line, cells in self._rows():
            where = f"{self.name}, line {line}"
            if self.shape is None:
                path = cells[self.place["path"]].strip()
                yield path, self._file(path, where)
            else:
                yield f"line {line}", self._picture(cells, where)

    def _is_test(self, where: str, part: str | None) -> bool:
        if part is None:
            return False
        if part.lower() not in PARTS:
            raise BadInput(f"{self.name}, {where}: the part is {shortened(part)}; it should be train or test")
        return PARTS[part.lower()]

    def _file(self, path: str, where: str) -> Picture:
        called = f"{where}: {path}"
        return read(inside(self.root / path, self.root, called), called)

    def _picture(self, cells: list[str], where: str) -> Picture:
        wanted = [cells[i] for i in self.pixels]
        try:
            return np.frombuffer(bytes(map(int, wanted)), np.uint8).reshape(self.shape or ())
        except ValueError:
            i = next(i for i in self.pixels if not _is_pixel(cells[i]))
            raise BadInput(f"{where}: column {i + 1} is {shortened(cells[i])}; pixels are whole numbers in 0 … 255") from None

    def _places(self, header: list[str]) -> dict[str, int]:
        """The column of each field, by its name in the first line."""
        names = [cell.strip().lower() for cell in header]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise BadInput(f"{self.name} has two columns {twice!r}; each may be there once")
        found: dict[str, int] = {}
        for field, known in COLUMNS.items():
            places = [i for i, name in enumerate(names) if name in known]
            if len(places) > 1:
                both = " and ".join(repr(header[i]) for i in places)
                raise BadInput(f"{self.name} has the columns {both}, which both mean the {field}; leave one out")
            found |= dict.fromkeys([field], places[0]) if places else {}
        if "label" not in found:
            raise BadInput(
                f"{self.name} has no column {' or '.join(COLUMNS['label'])}. Its columns are {_some(header)}; they should be {FORM}"
            )
        return found

    def _shape(self, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
        n = len(self.pixels)
        if shape is None and n and (side := math.isqrt(n)) ** 2 == n:
            return 1, side, side
        if shape is None:
            raise BadInput(f"{self.name} has {n} columns of pixels, which are no square; give --shape C,H,W. Columns should be {FORM}")
        if math.prod(shape) != n:
            raise BadInput(f"--shape {','.join(map(str, shape))} needs {math.prod(shape)} columns of pixels; {self.name} has {n}")
        return shape

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The lines below the names of the columns, with their numbers; empty ones are left out."""
        with self._lines() as lines:
            if self.header:
                next(lines)
            for line, cells in lines:
                if not cells:
                    continue
                if len(cells) != self.width:
                    raise BadInput(f"{self.name}, line {line} has {len(cells)} columns, the first line has {self.width}")
                yield line, cells

    @contextmanager
    def _lines(self) -> Iterator[Iterator[tuple[int, list[str]]]]:
        try:
            with _text(self.path) as file:
                reader = csv.reader(file)
                yield ((reader.line_num, cells) for cells in reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"{self.name} cannot be read as CSV in UTF-8: {error}") from error
        except (OSError, EOFError) as error:
            raise BadInput(f"{self.name} cannot be read: {error}") from error


def _text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_pixel(cell: str) -> bool:
    try:
        return 0 <= int(cell) <= 255
    except ValueError:
        return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:OTHER]) + (", …" if len(names) > OTHER else "")
