"""A folder of image files, a folder for each class, as torchvision's ImageFolder reads it, and perhaps one for each user.

    train/CLASS/*.png, test/CLASS/*.png            levels = "class"
    train/USER/CLASS/*.png                         levels = "user/class"
    train/CLASS/USER/*.png                         levels = "class/user"

Without a folder `train` the folder itself holds the classes. `val` is the test part where there is no `test`. Images are in the order of
their sorted paths. One folder is listed at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedsim.data.conversion.image_files import inside, is_hidden, is_image, read
from fedsim.data.conversion.options import LEVELS
from fedsim.data.conversion.source import Picture, Row
from fedsim.errors import BadInput

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first of them that is there
OTHER = 3  # files that are no images, which a note names
USUAL = ".png, .jpg, .bmp"  # endings of image files, of which a message gives examples


class ImageTree:
    """See the module."""

    numbers, classes = "names", 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, folder: str, levels: str | None = None) -> None:
        self.name, self.root = folder, Path(folder).resolve()
        self.levels = LEVELS[levels or "class"]
        self.notes: list[str] = []
        self.others: list[str] = []

    def rows(self) -> Iterator[Row]:
        self.notes, self.others = [], []
        for _, where, names, test in self._files():
            fields = dict(zip(self.levels, names, strict=True))
            yield Row(where, fields["class"], fields.get("user"), test)
        if self.others:
            shown = ", ".join(self.others[:OTHER]) + (", …" if len(self.others) > OTHER else "")
            self.notes.append(f"files that are no images are left out: {len(self.others)}, such as {shown}")

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        for path, where, _, _ in self._files():
            yield where, read(path, f"{self.name}: {where}")

    def _files(self) -> Iterator[tuple[Path, str, tuple[str, ...], bool]]:
        """Each image file, its path below the root, the names of the folders above it, and whether it is a test image."""
        for part, test in self._parts():
            found = False
            inside(self.root / part, self.root, self._called(self.root / part))
            for path, names in self._below(self.root / part if part else self.root, ()):
                found = True
                yield path, text(path.relative_to(self.root)), tuple(map(text, names)), test
            if not found:
                raise BadInput(f"{self._called(self.root / part)} is empty; {self._expected()}")

    def _parts(self) -> list[tuple[str, bool]]:
        """The folders of the training and the test images, and which of them is which."""
        folders = self._folders(self.root)
        train = next((name for name in TRAIN if name in folders), None)
        tests = [name for name in TEST if name in folders]
        if train is None:
            if tests and set(folders) <= set(TEST):
                raise BadInput(f"{self.name} has {tests[0]} but no train; {self._expected()}")
            return [("", False)]
        if left := [name for name in folders if name not in (train, *tests[:1])]:
            self.notes.append(f"of {self.name} these folders are left out: {', '.join(left)}")
        return [(train, False), *((name, True) for name in tests[:1])]

    def _folders(self, folder: Path) -> list[str]:
        return [name for name in self._listed(folder) if (folder / name).is_dir()]

    def _listed(self, folder: Path) -> list[str]:
        try:
            return sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
        except OSError as error:
            raise BadInput(f"{self._called(folder)} cannot be listed: {error.strerror}") from error

    def _below(self, folder: Path, names: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
        """The image files below a folder that lies as deep as there are names."""
        here = self._listed(folder)
        if not here and names:
            raise BadInput(f"{self._called(folder)} is an empty folder; remove it, or put its images there")
        images = 0
        for name in here:
            path = folder / name
            if path.is_symlink():
                inside(path, self.root, self._called(path))
            if path.is_dir():
                if len(names) == len(self.levels):
                    raise BadInput(f"{self._called(path)} is a folder where images should be; {self._expected()}")
                yield from self._below(path, (*names, name))
            elif not is_image(name):
                self.others.append(text(path.relative_to(self.root)))
            elif len(names) < len(self.levels):
                raise BadInput(f"{self._called(path)} lies in no folder of a {self.levels[len(names)]}; {self._expected()}")
            else:
                images += 1
                yield path, names
        if len(names) == len(self.levels) and not images:
            raise BadInput(f"{self._called(folder)} has no image (a file whose name ends in {USUAL} …)")

    def _called(self, path: Path) -> str:
        below = path.relative_to(self.root)
        return self.name if below == Path() else f"{self.name}: {text(below)}"

    def _expected(self) -> str:
        form = "/".join(level.upper() for level in self.levels)
        other = " or ".join(f"--levels {levels}" for levels, names in LEVELS.items() if names != self.levels)
        return f"images are expected in {self.name}/train/{form}/, or in {self.name}/{form}/; {other} says that they lie otherwise"


def text(name: str | Path) -> str:
    """A name of the file system as text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
