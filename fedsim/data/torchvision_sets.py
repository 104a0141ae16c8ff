"""Published data sets that torchvision can download: cifar10, cifar100, svhn, fashion_mnist, emnist.

Their files are read here, and CIFAR's and SVHN's only after their checksums were compared. torchvision is imported for a download alone:
its import takes as long as torch's, and 160 MB on every rank.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data import plain_pickle
from fedsim.data.conversion import idx_files
from fedsim.data.image_sets import Stored
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], int]  # images (n, C, H, W), labels (n,), number of classes
EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}


@dataclass(frozen=True)
class Source:
    """One published set: where its files lie under `root`, what they are called, where they come from."""

    torchvision: str  # the name of its class there
    folder: str
    files: Mapping[str, str]  # name, with "{split}" for emnist's -> MD5; "" where the published file is a packed one
    origin: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[Callable[[str], bytes], Path, bool, str], Arrays]  # of checked contents by name, the folder, train, split


def _cifar(key: str, classes: str, content: Callable[[str], bytes], folder: Path, train: bool, split: str) -> Arrays:
    """Pickled batches; CIFAR-10 has five to train, CIFAR-100 has one."""
    meta, names = ("batches.meta", [f"data_batch_{i}" for i in range(1, 6)]) if key == "labels" else ("meta", ["train"])
    names = names if train else ["test_batch" if key == "labels" else "test"]
    batches = [_unpickled(name, content(name)) for name in names]
    images = np.vstack([plain_pickle.array(batch["data"]) for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.array([int(label) for batch in batches for label in batch[key]], np.int64)
    return images, labels, len(_unpickled(meta, content(meta))[classes])


def _unpickled(name: str, content: bytes) -> dict[str, Any]:
    try:
        found = plain_pickle.load(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no dictionary")
    return found


def _svhn(content: Callable[[str], bytes], folder: Path, train: bool, split: str) -> Arrays:
    """A MAT file of images (32, 32, 3, n) and labels (n, 1), in which the digit 0 has the label 10."""
    from scipy.io import loadmat

    found = loadmat(io.BytesIO(content("train_32x32.mat" if train else "test_32x32.mat")))
    return found["X"].transpose(3, 2, 0, 1), found["y"].reshape(-1).astype(np.int64) % 10, 10


def _idx(prefixes: tuple[str, str], content: Callable[[str], bytes], folder: Path, train: bool, split: str) -> Arrays:
    prefix = prefixes[0 if train else 1].format(split=split)
    images, labels = idx_files.read(folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte")
    return images[:, None], labels, 10


def _emnist(content: Callable[[str], bytes], folder: Path, train: bool, split: str) -> Arrays:
    """NIST's files hold every image transposed, and `letters` counts its classes from 1."""
    images, labels, _ = _idx(EMNIST, content, folder, train, split)
    return images.swapaxes(2, 3), labels - (split == "letters"), EMNIST_CLASSES[split]


def _unpacked(prefixes: tuple[str, str]) -> dict[str, str]:
    return {f"{prefix}-{kind}": "" for prefix in prefixes for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")}


MNIST, EMNIST = ("train", "t10k"), ("emnist-{split}-train", "emnist-{split}-test")
SOURCES = {
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        "cifar-10-python.tar.gz of Krizhevsky's CIFAR-10 page, unpacked",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        partial(_cifar, "labels", "label_names"),
    ),
    "cifar100": Source(
        "CIFAR100",
        "cifar-100-python",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        "cifar-100-python.tar.gz of Krizhevsky's CIFAR-100 page, unpacked",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        partial(_cifar, "fine_labels", "fine_label_names"),
    ),
    "svhn": Source(
        "SVHN",
        "",
        {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        "format 2 (cropped digits) of Stanford's Street View House Numbers page",
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        _svhn,
    ),
    "fashion_mnist": Source(
        "FashionMNIST",
        "FashionMNIST/raw",
        _unpacked(MNIST),
        "the four .gz files of zalandoresearch/fashion-mnist, unpacked",
        (0.2860,),
        (0.3530,),
        partial(_idx, MNIST),
    ),
    "emnist": Source(
        "EMNIST",
        "EMNIST/raw",
        _unpacked(EMNIST),
        "gzip.zip of NIST's EMNIST page, unpacked, and the .gz files in it unpacked",
        (0.1751,),
        (0.3332,),
        _emnist,
    ),
}


def open_published(settings: DataSettings) -> tuple[Stored, Stored]:
    """Training and test set of one of SOURCES. BadInput names the files that are missing, or that are not the published ones."""
    source = SOURCES[settings.name]
    folder = Path(settings.root) / source.folder
    missing = _missing(source, settings, folder)
    if missing and not settings.download:
        what = f"[data] {settings.name} is not complete: {', '.join(missing)} missing in {folder.absolute()}"
        raise BadInput(f"{what}. Put them there ({source.origin}), set data.root to where they are, or set data.download = true")
    try:
        if missing:
            _download(source, settings)
        train, test = (_stored(source, settings, folder, part) for part in (True, False))
    except Exception as error:  # whatever a broken file, folder or network makes its reader raise
        what = f"[data] {settings.name} cannot be {'downloaded to' if missing else 'read from'} {folder.absolute()}"
        why = " ".join(str(error).split()) or type(error).__name__  # torchvision's own have several lines
        raise BadInput(
            f"{what}: {why.rstrip(' .')}{'' if why.endswith('?') else '.'} Its files must be the published ones ({source.origin})"
        ) from error
    return train, test


def _missing(source: Source, settings: DataSettings, folder: Path) -> list[str]:
    """The files that are not there; those of a download that was cut short too, where they can be downloaded again."""
    files = {name.format(split=settings.split): published for name, published in source.files.items()}
    try:
        there = {name for name in files if (folder / name).is_file()}
        if settings.download:
            there = {name for name in there if not files[name] or _md5((folder / name).read_bytes()) == files[name]}
    except OSError as error:
        raise BadInput(f"[data] root: {folder} cannot be read: {error.strerror}") from error
    return [name for name in files if name not in there]


def _stored(source: Source, settings: DataSettings, folder: Path, train: bool) -> Stored:
    images, labels, classes = source.read(partial(_content, source, folder), folder, train, settings.split)
    x, y = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)
    return Stored(settings.name, x, y, classes, source.mean, source.std)


def _content(source: Source, folder: Path, name: str) -> bytes:
    """Of one of the files that have a checksum. ValueError for another one."""
    content = (folder / name).read_bytes()
    found, published = _md5(content), source.files[name]
    if found != published:
        what = f"{name} is corrupted or another file: its MD5 checksum is {found}, the published one's is {published}"
        raise ValueError(f"{what}; data.download = true fetches that one")
    return content


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(source: Source, settings: DataSettings) -> None:
    """By torchvision. Its constructors, which are left out, would read the files as well, and unpickle some."""
    from torchvision import datasets

    kind = getattr(datasets, source.torchvision)
    for train, part in ((True, "train"), (False, "test")):
        found = kind.__new__(kind)
        datasets.VisionDataset.__init__(found, settings.root)
        vars(found).update(train=train, split=settings.split if settings.name == "emnist" else part)
        if settings.name == "svhn":
            found.url, found.filename, found.file_md5 = kind.split_list[part]
        found.download()
