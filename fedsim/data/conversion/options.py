"""How a source is read: the options of `fedsim data`. This module imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = {"class": ("class",), "user/class": ("user", "class"), "class/user": ("class", "user")}  # of folders, down to the images


@dataclass(frozen=True)
class Options:
    """How a source is read. None and False leave it to the source."""

    levels: str | None = None  # image folders: one of LEVELS
    images: str | None = None  # CSV: the folder from which its paths go
    shape: tuple[int, int, int] | None = None  # CSV of pixels: (C, H, W)
    test: str | None = None  # a second source, of the test images
    test_share: float | None = None  # of each class; these are the test images
    size: int | None = None  # pixels, height = width, to which images are resized
    grey: bool = False
    rgb: bool = False
    relabel: bool = False  # number the labels that occur from 0, in sorted order
