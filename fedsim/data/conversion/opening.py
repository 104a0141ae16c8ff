"""Which form a source has, by what it holds: image folders, CSV, IDX, or the HDF5 and npz files that jobs read themselves."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from fedsim.data.conversion import idx_files
from fedsim.data.conversion.csv_table import CsvTable
from fedsim.data.conversion.idx_files import IdxFiles
from fedsim.data.conversion.image_tree import ImageTree
from fedsim.data.conversion.options import Options
from fedsim.data.conversion.source import Source, Together
from fedsim.errors import BadInput

CSV = (".csv", ".csv.gz")


def open_source(path: str, options: Options) -> Source | None:
    """Images to convert; None where a job reads the file as it stands. BadInput for options that do not apply."""
    found = _one(path, options)
    if found is None or options.test is None:
        return found
    other = _one(options.test, options)
    if other is None or type(other) is not type(found):
        raise BadInput(f"--test {options.test} should have the same form as {path}")
    return Together(found, other)


def _one(path: str, options: Options) -> Source | None:
    place = Path(path)
    if not place.exists():
        raise BadInput(f"there is no file or folder {path}")
    if not (place.is_file() or place.is_dir()):
        raise BadInput(f"{path} is neither a file nor a folder; give images, or a file of them")
    is_csv = place.is_file() and place.name.lower().endswith(CSV)
    is_idx = idx_files.has_idx(place) if place.is_dir() else not is_csv and idx_files.is_idx(place)
    is_tree = place.is_dir() and not is_idx
    kinds = {"levels": (is_tree, "folders of images"), "images": (is_csv, "a CSV of paths"), "shape": (is_csv, "a CSV of pixels")}
    for name, (applies, kind) in kinds.items():
        if getattr(options, name) is not None and not applies:
            raise BadInput(f"--{name} is for {kind}, which {path} is not; leave it out")
    if is_idx:
        return IdxFiles(path)
    if is_tree:
        return ImageTree(path, options.levels)
    if is_csv:
        return CsvTable(path, options.images, options.shape)
    return None


def refuse_other(name: str, options: Options) -> None:
    """BadInput for options of sources that are converted, where a job reads the source itself."""
    for option in ("levels", "images", "shape", "test"):
        if getattr(options, option) is not None:
            raise BadInput(f"--{option} is for folders of images, CSV and IDX files; leave it out for {name}")


def is_convertible(path: Path) -> bool:
    """Whether this is a folder, a CSV or IDX, which a job cannot read."""
    return path.is_dir() or path.name.lower().endswith(CSV) or idx_files.is_idx(path)


def refuse_archive(path: Path) -> None:
    """An npz file is a zip archive too, of arrays."""
    is_zip = zipfile.is_zipfile(path) and path.suffix.lower() != ".npz" and not _holds_arrays(path)
    if is_zip or tarfile.is_tarfile(path):
        raise BadInput(f"{path} is an archive; unpack it, and give the folder")


def _holds_arrays(path: Path) -> bool:
    with zipfile.ZipFile(path) as file:
        return any(name.endswith(".npy") for name in file.namelist())
