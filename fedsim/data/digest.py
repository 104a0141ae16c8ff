"""What tells whether two places, or two days, have the same images: a hash of them that takes a moment, also of a large set."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.data.settings import DRAWN

if TYPE_CHECKING:
    from fedsim.core.types import Data

MOST = 64 * 2**20  # bytes of images that are read
MOST_LABELS = 4_000_000
FEW = 256  # images that are read of a set which may make each when it is asked for


def digest(train: Data, test: Data) -> str:
    """SHA-256 over both sets: shapes, classes, mean and deviation, labels, and images. Empty for images that fedsim draws by itself.

    A set of more than 64 MiB, or of more than 4,000,000 labels, gives evenly spaced ones, from the first to the last; a set that an
    installed package makes gives 256 images.
    """
    if train.name in DRAWN:
        return ""
    whole = sha256()
    for data in (train, test):
        whole.update(repr((tuple(data.shape), data.classes, len(data), tuple(data.mean), tuple(data.std))).encode())
        if ":" in data.name and (users := getattr(data, "users", None)) is not None:  # of a function, which may give others each time
            whole.update(users.numpy().astype("<i8").data)
        whole.update(data.labels(_spaced(len(data), MOST_LABELS)).to(torch.int64).numpy().astype("<i8").data)
        for index in _spaced(len(data), _images(data)).split(1024):
            whole.update(data.images(index).contiguous().numpy().data)
    return whole.hexdigest()


def _images(data: Data) -> int:
    """How many are read."""
    channels, height, width = data.shape
    return max(1, MOST // (channels * height * width)) if hasattr(data, "x") else FEW


def _spaced(n: int, most: int) -> Tensor:
    """(≤ most,) int64: all of 0 … n-1, or evenly spaced ones from the first to the last."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).round().long()
