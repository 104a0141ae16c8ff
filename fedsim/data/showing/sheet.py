"""A sheet of example images as a PNG: a row for each class, with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fedsim.data.conversion.image_files import as_image
from fedsim.errors import BadInput

SIDE = 56  # pixels of the sheet that the longer side of an image has at least; small images are enlarged by a whole number
LARGEST = 160  # at most; large images are made smaller
GAP, TEXT = 4, 14  # pixels between images; of the text
FONT = Path("mpl-data", "fonts", "ttf", "DejaVuSans.ttf")  # in matplotlib
LETTERS = 24  # of a class's name at most
ROWS = 200  # classes at most
INK, PAPER = "#262626", "white"


def write(examples: Mapping[int, Sequence[NDArray[np.uint8]]], names: Sequence[str] | None, out: Path) -> str:
    """Writes the sheet; a line about what it shows. BadInput where it cannot be written."""
    sheet = draw(examples, names)
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise BadInput(f"--sheet {out} cannot be written: {error.strerror or error}") from error
    shown = f"the first {ROWS} of {len(examples)} classes" if len(examples) > ROWS else f"{len(examples)} classes"
    return f"{out}: {shown}, up to {max(map(len, examples.values()))} images each"


def draw(examples: Mapping[int, Sequence[NDArray[np.uint8]]], names: Sequence[str] | None) -> Image.Image:
    """The sheet of images (C, H, W) by class."""
    classes = list(examples)[:ROWS]
    labels = [str(label) if names is None else _short(names[label]) for label in classes]
    font = _font()
    margin = int(max(font.getlength(label) for label in labels)) + 2 * GAP
    width, height = _cell(next(images[0] for images in examples.values() if images).shape)
    columns = max(map(len, examples.values()))
    sheet = Image.new("RGB", (margin + columns * (width + GAP), GAP + len(classes) * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (label, text) in enumerate(zip(classes, labels, strict=True)):
        top = GAP + row * (height + GAP)
        pen.text((GAP, top + height / 2), text, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(examples[label]):
            sheet.paste(_tile(picture, (width, height)), (margin + column * (width + GAP), top))
    return sheet


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A font with many scripts where matplotlib brings one; Pillow's own has the letters of English alone."""
    found = find_spec("matplotlib")
    path = Path(found.origin).parent / FONT if found and found.origin else None
    return ImageFont.truetype(path, TEXT) if path and path.is_file() else ImageFont.load_default(TEXT)


def _cell(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height that an image of (C, H, W) has on the sheet."""
    height, width = shape[1:]
    longer = max(height, width)
    scale = max(1, -(-SIDE // longer)) if longer <= LARGEST else LARGEST / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tile(picture: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """An image of 1 or 3 channels; of other numbers of channels the first is shown."""
    image = as_image(picture if len(picture) in (1, 3) else picture[:1]).convert("RGB")
    return image.resize(size, Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BILINEAR)


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
