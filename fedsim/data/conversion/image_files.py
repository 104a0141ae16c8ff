"""One image file as (C, H, W) bytes with 1 or 3 channels, and paths that must not lead out of their folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.data.conversion.source import Picture
from fedsim.errors import BadInput

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
GREY = ("1", "L", "LA", "La")  # Pillow's modes of grey images; those below have more than 8 bits
DEEP = ("I", "F")


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that other systems leave beside images."""
    return name.startswith(".") or name == "__MACOSX"


def read(path: Path, where: str) -> Picture:
    """(1, H, W) of a grey image, (3, H, W) of one in colours; transparency is left away. BadInput names an image that cannot be read."""
    if path.exists() and not path.is_file():  # reading a pipe could wait without end
        raise BadInput(f"{where} is no file; remove it")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.mode.startswith(DEEP):
                raise BadInput(f"{where} has pixels of more than 8 bits (mode {image.mode}); write it with 8 bits first")
            return channels_first(image.convert("L" if image.mode in GREY else "RGB"))
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{where} is not there") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{where} cannot be read as an image: {error}") from error


def channels_first(image: Image.Image) -> Picture:
    """(C, H, W) of a Pillow image with 1 or 3 channels."""
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_image(picture: Picture) -> Image.Image:
    """The Pillow image of 1 or 3 channels."""
    return Image.fromarray(picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0)))


def inside(path: Path, root: Path, where: str) -> Path:
    """The path without links, which must lie below `root`, a path without links; BadInput names one that leads out of it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{where} cannot be followed: {error}") from error
    if not real.is_relative_to(root):
        raise BadInput(f"{where} leads out of the folder, to {real}; links and paths are followed inside of {root} alone")
    return real
