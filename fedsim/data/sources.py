"""Where images come from: every name of the job's [data] section becomes a training and a test set."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import interpolate

from fedsim.core import entry_points
from fedsim.data.image_sets import Fake, Stored, fifth, moments, parted, reduced
from fedsim.data.settings import AUGMENTS, DRAWN, DataSettings
from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.core.types import Data


__all__ = ["Fake", "Stored", "digits", "fake", "fifth", "moments", "open_data", "parted"]

NEEDED = ("name", "shape", "classes", "mean", "std", "images", "labels", "__len__")  # of a data set: fedsim.core.types.Data


def open_data(settings: DataSettings, seed: int) -> tuple[Data, Data]:
    """The training and the test set. The seed matters to `fake` and to functions that draw. BadInput if files are missing or unreadable."""
    if settings.factory is None and settings.name not in AUGMENTS:
        return _open_installed(settings, seed)
    if settings.factory is None and settings.name in DRAWN:
        return _drawn(settings, seed)
    train, test = _stored(settings) if settings.factory is None else _made(settings, seed)
    return reduced(train, settings.train_images, "train_images"), reduced(test, settings.test_images, "test_images")


def _drawn(settings: DataSettings, seed: int) -> tuple[Data, Data]:
    """Images that are made here, as many as the job says."""
    if settings.name == "fake":
        return fake(settings, seed)
    from fedsim.data.drawn_shapes import shapes

    return shapes(settings)


def _stored(settings: DataSettings) -> tuple[Stored, Stored]:
    """All images of a set that is stored in files."""
    if settings.name == "digits":
        return digits(settings.image_size or 8)
    if settings.name in ("cinic10", "tiny_imagenet"):
        from fedsim.data import image_folders

        return image_folders.open_folder(settings.name, settings.root)
    if settings.name == "file":
        from fedsim.data.own_file.opening import open_file

        return open_file(settings)
    from fedsim.data.torchvision_sets import open_published

    return open_published(settings)


def _made(settings: DataSettings, seed: int) -> tuple[Stored, Stored]:
    """What a function of the user's own gives."""
    from fedsim.data.own_file.made import open_made

    return open_made(settings, seed)


def _open_installed(settings: DataSettings, seed: int) -> tuple[Data, Data]:
    """A data set that an installed package offers by the entry point `fedsim.datasets`."""
    entry = entry_points.find(entry_points.DATASETS, settings.name, "[data] name")
    if entry is None:
        raise entry_points.unknown("[data] name", settings.name, [*AUGMENTS, *entry_points.names(entry_points.DATASETS)])
    function = entry_points.load(entry, "[data] name")
    try:
        train, test = function(settings, seed)
    except Exception as error:  # whatever the package raises, the message names it
        what = f"[data] name = {settings.name!r}: {entry_points.source(entry)} failed"
        raise BadInput(f"{what}: {type(error).__name__}: {error}") from error
    for data in (train, test):
        if missing := [name for name in NEEDED if not hasattr(data, name)]:
            raise BadInput(f"[data] name = {settings.name!r}: {type(data).__name__} of {entry_points.source(entry)} has no {missing[0]}")
    return train, test


def digits(size: int) -> tuple[Stored, Stored]:
    """scikit-learn's 1,797 real handwritten digits, 8x8 with 17 grey levels (UCI, Alpaydin and Kaynak 1998): 1,437 to train, 360 to test.

    The test set is a fixed fifth of each class. A size above 8 is reached by bilinear interpolation.

    Training and test images share their writers. The rows are 14 filled forms in a row, no column names the writer, and the test set is
    drawn from all rows, so each form is on both sides. Accuracies are therefore for people whose writing was seen in training. On
    forms that were not seen, a nearest-neighbour classifier makes more than three times as many errors
    (findings/digits_rows_lie_in_blocks.sh).
    """
    pixels, labels = _scikit_learns_digits()
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    if size != 8:
        x = interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return parted("digits", x.round().to(torch.uint8), torch.from_numpy(labels).long(), 10)


def _scikit_learns_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 64), 0 to 16, and labels (n,), from the file that scikit-learn brings: importing it takes a second, reading 20 ms."""
    found = find_spec("sklearn")
    path = (
        Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
        if found and found.submodule_search_locations
        else None
    )
    if path is None or not path.is_file():  # a scikit-learn that keeps it elsewhere finds it itself
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.data, bunch.target
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return rows[:, :-1], rows[:, -1]


def fake(settings: DataSettings, seed: int) -> tuple[Fake, Fake]:
    """Random images for benchmarks; 50,000 and 10,000 of 3x32x32 in 10 classes where the job does not say otherwise."""
    size = settings.image_size or 32
    shape = (settings.channels or 3, size, size)
    classes = settings.classes or 10
    return Fake(settings.train_images or 50_000, shape, classes, seed), Fake(settings.test_images or 10_000, shape, classes, seed, "test")
