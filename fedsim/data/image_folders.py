"""Data sets that are published as folders of image files: CINIC-10 (Darlow et al., arXiv:1810.03505) and Tiny ImageNet (Stanford CS231n).

Read once with Pillow into one uint8 tensor; images are in the order of their sorted paths. CINIC-10's `train` and `test` are
used, its `valid` is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedsim.data.image_sets import Stored
from fedsim.errors import BadInput

CINIC_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CINIC_MOMENTS = (0.47889522, 0.47227842, 0.43047404), (0.24205776, 0.23828046, 0.25874835)
TINY_MOMENTS = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

Labelled = list[tuple[Path, int]]


def open_folder(name: str, root: str) -> tuple[Stored, Stored]:
    """cinic10 or tiny_imagenet under `root`. BadInput names the folder or file that is missing or unreadable."""
    return {"cinic10": cinic10, "tiny_imagenet": tiny_imagenet}[name](Path(root))


def cinic10(root: Path) -> tuple[Stored, Stored]:
    """CINIC-10/{train,test}/<class>/*.png, 90,000 images each of 3x32x32 in 10 classes."""
    top = root / "CINIC-10"
    hint = f"Unpack CINIC-10.tar.gz (the CINIC-10 project, Edinburgh DataShare) into {top.absolute()}"
    parts = [_by_class(top / part, CINIC_CLASSES, "", "*.png", hint) for part in ("train", "test")]
    train, test = (_stored("cinic10", part, 32, len(CINIC_CLASSES), CINIC_MOMENTS) for part in parts)
    return train, test


def tiny_imagenet(root: Path) -> tuple[Stored, Stored]:
    """tiny-imagenet-200, 100,000 and 10,000 images of 3x64x64; its labelled `val` part is the test set; classes by sorted wnid."""
    top = root / "tiny-imagenet-200"
    hint = f"Unpack tiny-imagenet-200.zip (Stanford CS231n) into {root.absolute()}"
    wnids = sorted(_text(top / "wnids.txt", hint).split())
    number = {wnid: c for c, wnid in enumerate(wnids)}
    train = _by_class(top / "train", wnids, "images", "*.JPEG", hint)
    test = _annotated(top / "val", number, hint)
    parts = [_stored("tiny_imagenet", part, 64, len(wnids), TINY_MOMENTS) for part in (train, test)]
    return parts[0], parts[1]


def _by_class(folder: Path, classes: Sequence[str], inner: str, pattern: str, hint: str) -> Labelled:
    """The image files of one folder per class, with their class numbers."""
    found: Labelled = []
    for c, name in enumerate(classes):
        files = _images(folder / name / inner, Path(pattern).suffix)
        if not files:
            raise BadInput(f"[data] no {pattern} in {(folder / name / inner).absolute()}. {hint}, or set data.root")
        found += [(file, c) for file in files]
    return found


def _images(folder: Path, suffix: str) -> list[Path]:
    """The files with this ending, in capitals or not; hidden ones, which other systems leave beside them, are no images."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix.lower() and not file.name.startswith("."))


def _annotated(folder: Path, number: dict[str, int], hint: str) -> Labelled:
    """The files that val_annotations.txt names, a line each: file, wnid, box."""
    rows = [line.split("\t") for line in _text(folder / "val_annotations.txt", hint).splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2 or row[1] not in number or Path(row[0]).name != row[0]:
            line = f"the line {' '.join(row)!r} does not name an image and a class of wnids.txt"
            raise BadInput(f"[data] {folder / 'val_annotations.txt'}: {line}")
    return sorted((folder / "images" / row[0], number[row[1]]) for row in rows)


def _text(path: Path, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"[data] {path.absolute()} is missing or cannot be read. {hint}, or set data.root") from error


def _stored(name: str, files: Labelled, size: int, classes: int, moments: tuple[tuple[float, ...], tuple[float, ...]]) -> Stored:
    x = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for row, (file, _) in zip(x, files, strict=True):
        row.copy_(_image(file, size))
    return Stored(name, x, torch.tensor([label for _, label in files]), classes, *moments)


def _image(file: Path, size: int) -> torch.Tensor:
    """(3, size, size) uint8; grey images get three equal channels."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise BadInput(f"[data] {file} has pixels of mode {image.mode}; the published images have 8 bits")
            pixels = np.array(image.convert("RGB"))
    except BadInput:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"[data] {file} cannot be read as an image: {error}") from error
    if pixels.shape != (size, size, 3):
        raise BadInput(f"[data] {file} is {pixels.shape[1]}x{pixels.shape[0]} pixels; the published images are {size}x{size}")
    return torch.from_numpy(pixels).permute(2, 0, 1)
