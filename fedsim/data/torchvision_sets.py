"""Published data sets through torchvision: cifar10, cifar100, svhn, fashion_mnist, emnist.

torchvision finds, downloads and reads the files; their arrays are taken as they are, never through a transform. CIFAR's pickled
batches are read by `data/plain_pickle.py`, after torchvision has compared the checksum of every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import datasets

from fedsim.data import plain_pickle
from fedsim.data.image_sets import Stored
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput


class CIFAR10(datasets.CIFAR10):
    """Without torchvision's constructor, which unpickles."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        datasets.VisionDataset.__init__(self, root)
        if download:
            self.download()
        if not self._check_integrity():
            raise ValueError("Dataset not found or corrupted: the checksum of a file is another")
        folder = Path(root) / self.base_folder
        batches = [self._loaded(folder / name) for name, _ in (self.train_list if train else self.test_list)]
        self.data = np.vstack([plain_pickle.array(batch["data"]) for batch in batches]).reshape(-1, 3, 32, 32)
        self.targets = [int(label) for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
        meta = folder / self.meta["filename"]
        if not datasets.utils.check_integrity(str(meta), self.meta["md5"]):
            raise ValueError(f"{meta.name} is not found or corrupted: its checksum is another")
        self.classes = list(self._loaded(meta)[self.meta["key"]])

    def _loaded(self, path: Path) -> dict[str, Any]:
        try:
            found = plain_pickle.load(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path.name} holds no dictionary")
        return found


class CIFAR100(CIFAR10, datasets.CIFAR100):
    """The same, with the files and the checksums of CIFAR-100."""


class FashionMNIST(datasets.FashionMNIST):
    """From the raw files only: torchvision would prefer a pickled `processed` folder, which nothing vouches for."""

    def _check_legacy_exist(self) -> bool:
        return False


class EMNIST(datasets.EMNIST):
    """From the raw files only, as above."""

    def _check_legacy_exist(self) -> bool:
        return False


@dataclass(frozen=True)
class Source:
    """One published set: where its files lie under `root`, what they are called, where they come from."""

    folder: str
    files: tuple[str, ...]  # "{split}" is emnist's split
    origin: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[str, bool, DataSettings], Any]  # root, train -> torchvision's data set


def _mnist_files(prefixes: tuple[str, str]) -> tuple[str, ...]:
    return tuple(f"{prefix}-{kind}" for prefix in prefixes for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


SOURCES = {
    "cifar10": Source(
        "cifar-10-batches-py",
        ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"),
        "cifar-10-python.tar.gz of Krizhevsky's CIFAR-10 page, unpacked",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        lambda root, train, s: CIFAR10(root, train, s.download),
    ),
    "cifar100": Source(
        "cifar-100-python",
        ("train", "test", "meta"),
        "cifar-100-python.tar.gz of Krizhevsky's CIFAR-100 page, unpacked",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        lambda root, train, s: CIFAR100(root, train, s.download),
    ),
    "svhn": Source(
        "",
        ("train_32x32.mat", "test_32x32.mat"),
        "format 2 (cropped digits) of Stanford's Street View House Numbers page",
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        lambda root, train, s: datasets.SVHN(root, "train" if train else "test", download=s.download),
    ),
    "fashion_mnist": Source(
        "FashionMNIST/raw",
        _mnist_files(("train", "t10k")),
        "the four .gz files of zalandoresearch/fashion-mnist, unpacked",
        (0.2860,),
        (0.3530,),
        lambda root, train, s: FashionMNIST(root, train, download=s.download),
    ),
    "emnist": Source(
        "EMNIST/raw",
        _mnist_files(("emnist-{split}-train", "emnist-{split}-test")),
        "gzip.zip of NIST's EMNIST page, unpacked, and the .gz files in it unpacked",
        (0.1751,),
        (0.3332,),
        lambda root, train, s: EMNIST(root, split=s.split, train=train, download=s.download),
    ),
}


def open_published(settings: DataSettings) -> tuple[Stored, Stored]:
    """Training and test set of one of SOURCES. BadInput names the files that are missing, or that are not the published ones."""
    source = SOURCES[settings.name]
    if not settings.download:
        _check_present(source, settings)
    train, test = (_read(source, settings, part) for part in (True, False))
    return train, test


def _check_present(source: Source, settings: DataSettings) -> None:
    folder = Path(settings.root) / source.folder
    names = [name.format(split=settings.split) for name in source.files]
    try:
        missing = [name for name in names if not (folder / name).is_file()]
    except OSError as error:
        raise BadInput(f"[data] root: {folder} cannot be read: {error.strerror}") from error
    if missing:
        what = f"[data] {settings.name} is not complete: {', '.join(missing)} missing in {folder.absolute()}"
        raise BadInput(f"{what}. Put them there ({source.origin}), set data.root to where they are, or set data.download = true")


def _read(source: Source, settings: DataSettings, train: bool) -> Stored:
    try:
        images, labels, classes = _arrays(source.read(settings.root, train, settings), settings)
        return Stored(settings.name, images, labels, classes, source.mean, source.std)
    except Exception as error:  # whatever a broken file, folder or network makes torchvision raise
        tried = "downloaded to or read from" if settings.download else "read from"
        what = f"[data] {settings.name} cannot be {tried} {(Path(settings.root) / source.folder).absolute()}"
        raise BadInput(f"{what}: {error or type(error).__name__}. Its files must be the published ones ({source.origin})") from error


def _arrays(found: Any, settings: DataSettings) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(n, C, H, W) uint8, (n,) int64 and the number of classes of one of torchvision's data sets."""
    if settings.name.startswith("cifar"):
        return _tensor(found.data), torch.tensor(found.targets), len(found.classes)
    if settings.name == "svhn":
        return _tensor(found.data), torch.from_numpy(np.atleast_1d(found.labels)).long(), 10
    if settings.name == "fashion_mnist":
        return found.data.unsqueeze(1), found.targets.long(), 10
    first = 1 if settings.split == "letters" else 0  # letters counts its classes from 1
    upright = found.data.transpose(1, 2).contiguous().unsqueeze(1)  # NIST's files hold every image transposed
    return upright, found.targets.long() - first, len(found.classes) - first


def _tensor(array: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
