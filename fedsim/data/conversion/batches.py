"""The second reading of a source: the pixels, in batches of some images that are alike in size and channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsim.data.conversion.image_files import as_image, channels_first
from fedsim.data.conversion.options import Options
from fedsim.data.conversion.source import Picture, Source
from fedsim.data.conversion.survey import Survey
from fedsim.errors import BadInput

BYTES, IMAGES = 1 << 22, 1024  # that a batch has at most, but for one image
KINDS = {1: "grey", 3: "in colours"}


@dataclass(frozen=True)
class Batch:
    """Some images of one part."""

    test: bool
    images: NDArray[np.int64]  # (b,) their places in the source
    x: NDArray[np.uint8]  # (b, C, H, W)
    y: NDArray[np.int64]  # (b,)


def batches(source: Source, found: Survey, options: Options) -> Iterator[Batch]:
    """All images, the test images apart. At most two batches are held at a time, whatever the source has."""
    waiting: dict[bool, list[tuple[int, Picture]]] = {False: [], True: []}
    for i, picture in enumerate(_alike(source, options, len(found.y))):
        held = waiting[bool(found.test[i])]
        held.append((i, picture))
        if len(held) >= min(IMAGES, max(1, BYTES // picture.nbytes)):
            yield _batch(held, found)
            held.clear()
    for held in waiting.values():
        if held:
            yield _batch(held, found)


def _batch(held: list[tuple[int, Picture]], found: Survey) -> Batch:
    images = np.array([i for i, _ in held])
    return Batch(bool(found.test[images[0]]), images, np.stack([picture for _, picture in held]), found.y[images])


def _alike(source: Source, options: Options, n: int) -> Iterator[Picture]:
    """The images after --grey, --rgb and --size. BadInput names the first two that differ."""
    first: tuple[str, Picture] | None = None
    count = 0
    for count, (where, picture) in enumerate(source.pictures(), 1):
        fitted = _fitted(source, where, picture, options)
        first = first or (where, fitted)
        if fitted.shape != first[1].shape:
            raise _differ(source, first, (where, fitted))
        if count > n:
            break
        yield fitted
    if count != n:
        raise BadInput(f"{source.name} had {n:,} images at first and has another number now: it changes while it is read")


def _fitted(source: Source, where: str, picture: Picture, options: Options) -> Picture:
    if not (options.grey or options.rgb or options.size):
        return picture
    if len(picture) not in KINDS:
        raise BadInput(f"{source.name}: {where} has {len(picture)} channels; --grey, --rgb and --size are for images with 1 or 3")
    image = as_image(picture)
    if options.grey or options.rgb:
        image = image.convert("L" if options.grey else "RGB")
    if options.size:
        image = image.resize((options.size, options.size), Image.Resampling.BILINEAR)
    return channels_first(image)


def _differ(source: Source, a: tuple[str, Picture], b: tuple[str, Picture]) -> BadInput:
    """The error for two images that are not alike."""
    if len(a[1]) != len(b[1]):
        kinds = [f"{where} is {KINDS.get(len(picture), f'of {len(picture)} channels')}" for where, picture in (a, b)]
        return BadInput(f"{source.name}: {' and '.join(kinds)}; --grey or --rgb makes all images alike")
    sizes = [f"{where} has {picture.shape[2]}x{picture.shape[1]} pixels" for where, picture in (a, b)]
    return BadInput(f"{source.name}: {' and '.join(sizes)}; all must have the same size, and --size N resizes them to NxN")
