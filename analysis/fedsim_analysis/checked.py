"""Groups, datasets and attributes of an HDF5 file that nobody vouches for: right, or a `Damaged` that says what is wrong.

No link leads out of the file or in a circle, no dataset asks for much more memory than the file has bytes, and no text is longer or
deeper than a run file's.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from math import prod
from typing import Any
from unicodedata import category

import h5py
import numpy as np
from numpy.typing import NDArray

TEXT = 2**18  # characters of an attribute at most; tomllib takes a second for four times as many
DOTS = 200  # in a line of a job; tomllib's time grows with the square of the parts of a key
DEPTH = 32  # tables in tables
ENTRIES = 2**20  # of a group, at most
CHUNK = 2**26  # bytes of a chunk at most
DEFLATED = 1100  # zlib makes at most 1,032 bytes of one
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
KINDS = {
    "b": "a truth value",
    "i": "whole numbers",
    "u": "whole numbers",
    "f": "numbers",
    "S": "text",
    "O": "text or objects",
    "V": "a record",
}
NUMBERS = "fiu"
STEERING = ("Cc", "Cs")  # kinds of signs: of control, and halves of a sign
LABELS = 2**28  # bytes of all labels of a dimension


class Damaged(ValueError):
    """Something in a file is not what it must be; the message says what, not in which file."""


class Excessive(Damaged):
    """More than a run file has, which no later try will change."""


def need(fact: object, message: str) -> None:
    if not fact:
        raise Damaged(message)


def item(parent: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """What stands at `path`, or None; reached by entries of this file alone."""
    found: Any = parent
    for name in path.split("/"):
        need(isinstance(found, h5py.Group), f"{_name(found)} is no group")
        if not found.id.links.exists(name.encode()):
            return None
        link = found.id.links.get_info(name.encode()).type
        need(link == h5py.h5l.TYPE_HARD, f"{_join(found, name)} is a link to another place; a run file has none")
        found = found[name]
    return found


def group(parent: h5py.Group, path: str) -> h5py.Group | None:
    """The group at `path`, or None."""
    found = item(parent, path)
    need(found is None or isinstance(found, h5py.Group), f"{_join(parent, path)} is no group")
    if found is not None:
        need(len(found) <= ENTRIES, f"{_join(parent, path)} has {len(found):,} entries, more than a run file has")
    return found


def needed(parent: h5py.Group, path: str) -> h5py.Group:
    found = group(parent, path)
    need(found is not None, f"the group {_join(parent, path)} is missing")
    return found


def dataset(parent: h5py.Group, path: str, kinds: str, shape: tuple[int | None, ...] | None, filled: bool = False) -> h5py.Dataset:
    """The dataset at `path`, of one of the kinds of numpy's dtypes and of the shape, where None is any length.

    filled: whether entries may stand for many that were never stored.
    """
    found, name = item(parent, path), _join(parent, path)
    need(found is not None, f"{name} is missing")
    if not isinstance(found, h5py.Dataset):
        raise Damaged(f"{name} is no array of numbers or text")
    dtype = _dtype(found, name)
    expected = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
    need(dtype.kind in kinds and dtype.itemsize <= 16 and not dtype.fields, f"{name} holds {KINDS.get(dtype.kind, dtype)}, not {expected}")
    if shape is not None:
        fits = found.shape is not None and len(found.shape) == len(shape)
        fits = fits and all(want in (None, have) for want, have in zip(shape, found.shape, strict=True))
        need(fits, f"{name} has the shape {found.shape}, not {_described(shape)}")
    _check_storage(found, name, filled)
    return found


def numbers(parent: h5py.Group, path: str, kinds: str, shape: tuple[int | None, ...] | None) -> NDArray[Any]:
    """All of a dataset that is stored in full."""
    found: NDArray[Any] = dataset(parent, path, kinds, shape)[()]
    return found


def _described(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def _dtype(found: h5py.Dataset, name: str) -> np.dtype[Any]:
    try:
        return np.dtype(found.dtype)
    except (TypeError, ValueError, KeyError) as error:
        raise Damaged(f"{name} is of a type that numpy does not have") from error


def _check_storage(found: h5py.Dataset, name: str, filled: bool) -> None:
    """That the data lie in this file, that they can be decoded, and that they are not less than the shape says."""
    plan = found.id.get_create_plist()
    need(plan.get_layout() in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED), f"{name} lies in other files")
    need(plan.get_external_count() == 0, f"{name} lies in another file")
    used = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    need(FILTERS.issuperset(used), f"{name} is packed with the filters {used}; a run file has {sorted(FILTERS)}")
    if found.chunks is not None:
        size = prod(found.chunks) * found.dtype.itemsize
        need(size <= CHUNK, f"{name} has chunks of {size:,} bytes; a run file's have {CHUNK:,} at most")
    stored, claimed = found.id.get_storage_size(), prod(found.shape or (1,)) * found.dtype.itemsize
    need(stored <= _file_size(found), f"{name} has more bytes than the file")
    most = stored * (DEFLATED if used else 1)
    need(filled or claimed <= most, f"{name} says that it has {claimed:,} bytes, and {stored:,} are stored")


def _file_size(found: h5py.Dataset) -> int:
    size: int = found.file.id.get_filesize()
    return size


def _join(parent: h5py.Group, path: str) -> str:
    return f"{_name(parent)}/{path}".lstrip("/")


def _name(found: Any) -> str:
    return str(found.name or "").lstrip("/")


# --- attributes


def attribute(owner: h5py.Group | h5py.Dataset, name: str) -> Any:
    """A plain bool, number or text, or None where there is none."""
    if not h5py.h5a.exists(owner.id, name.encode()):
        return None
    held, where = h5py.h5a.open(owner.id, name.encode()), f"the attribute {name!r}" + (f" of {_name(owner)}" if _name(owner) else "")
    need(held.shape == () and held.get_space().get_simple_extent_type() == h5py.h5s.SCALAR, f"{where} is not a single value")
    try:
        kind = np.dtype(held.dtype)
    except (TypeError, ValueError, KeyError) as error:
        raise Damaged(f"{where} is of a type that numpy does not have") from error
    text = kind.kind == "S" or h5py.check_string_dtype(kind) is not None
    need((kind.kind in "biuf" and kind.itemsize <= 8) or text, f"{where} is neither a truth value nor a number nor text")
    need(kind.itemsize <= TEXT, f"{where} has {kind.itemsize:,} characters; a run file's has {TEXT:,} at most")
    if not text:
        number = np.empty((), kind)
        held.read(number)  # without the library's own way, which opens it once more
        return number.item()
    found = _plain(owner.attrs[name], where)
    return found.strip() if kind.kind == "S" else found  # which has one length whatever it says


def _plain(value: Any, where: str) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, bytes | str):
        return value
    if len(value) > TEXT:
        raise Excessive(f"{where} has {len(value):,} characters; a run file's has {TEXT:,} at most")
    try:
        return clean(value.decode() if isinstance(value, bytes) else value)
    except (UnicodeError, Damaged) as error:
        raise Damaged(f"{where} is no text that can be printed") from error


def clean(text: str) -> str:
    """The text itself; Damaged where a sign in it would steer a terminal. Ends of lines, tabs and all kinds of spaces may be there."""
    plain = text.replace("\n", "").replace("\t", "")
    need(plain.isprintable() or not any(category(sign) in STEERING for sign in plain), f"{text[:40]!a} is no text that can be printed")
    return text


# --- texts in texts


def from_json(text: Any, where: str, kind: type = dict) -> Any:
    """JSON whose outermost value is of the kind."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{where} is not JSON ({error})") from error
    need(type(value) is kind, f"{where} is JSON of a {type(value).__name__}, not of a {kind.__name__}")
    _check_depth(value, where)
    return value


def from_toml(text: Any) -> dict[str, Any]:
    """A job's table."""
    need(isinstance(text, str), "the job is no text")
    most = max((line.count(".") for line in text.splitlines()), default=0)
    need(most <= DOTS, f"the job has a line with {most:,} dots; a run file's has {DOTS} at most")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the job is not TOML ({error})") from error
    _check_depth(table, "the job")
    return table


def _check_depth(value: Any, where: str) -> None:
    """That no table lies deeper in others than DEPTH, and that all text can be printed."""
    level = [value]
    for _ in range(DEPTH):
        for entry in (entry for held in level for entry in (held if isinstance(held, dict) else [held])):
            if isinstance(entry, str):
                clean(entry)
        level = [entry for held in level if isinstance(held, dict | list) for entry in (held.values() if isinstance(held, dict) else held)]
    need(not level, f"{where} has tables in tables, {DEPTH} deep or deeper")


# --- labels


def labels(file: h5py.File, dimension: str) -> list[Any]:
    """What the rows of a dimension are called: numbers or texts."""
    found = dataset(file, dimension, f"{NUMBERS}OS", (None,))
    if found.dtype.kind in NUMBERS:
        numbers: list[Any] = found[()].tolist()
        return numbers
    need(h5py.check_string_dtype(found.dtype) is not None, f"{dimension} holds neither numbers nor text")
    return list(_texts(found, dimension))


def _texts(found: h5py.Dataset, name: str) -> Iterator[str]:
    """One after the other: many entries may stand for one long text."""
    left, count = LABELS, found.shape[0]
    at_once = count * _file_size(found) <= LABELS  # even if each is as long as the file
    for value in found[()] if at_once else (found[i] for i in range(count)):
        left -= len(value) + 8
        need(left > 0, f"the names in {name} have more than {LABELS:,} bytes")
        yield _plain(value, f"a name in {name}")
