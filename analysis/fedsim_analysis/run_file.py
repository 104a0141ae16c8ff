"""The one place that opens and checks a run file, for every command of fedsim and for the analysis. It needs h5py and numpy alone.

What is damaged, hostile or no run file is an `Unreadable` of one message, within a second or two and without much memory.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked, checksums, former_names
from fedsim_analysis.checked import NUMBERS, Damaged, attribute, dataset, need

Result = TypeVar("Result")

FORMAT = 3  # of the run file; what is newer is refused. Since 3 `finished` is 0 or 1, and the file has neither bools nor half precision
RENAMED = 2  # the format since which columns and fields have their present names; format 1 is read under them
DIMENSIONS = {
    "rounds": ("round",),
    "clients": ("round", "client"),
    "layers": ("round", "layer"),
    "timing": ("round",),
    "speed": ("round",),
}
NEEDED = ("format_version", "rounds", "finished")
TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("format_version", "rounds", "rounds_planned", "seed", "ranks"), (int,)),
    **dict.fromkeys(("peak_flops", "peak_bytes"), (int, float)),
    "finished": (int, bool),  # 0 or 1; a bool in files of former writers, which netCDF4 and ncdump leave out
    **dict.fromkeys(("job", "job_sha256", "plan", "partition", "partition_sha256", "data_sha256"), (str,)),
    **dict.fromkeys(("own_code_sha256", "weights_sha256"), (str,)),
    **dict.fromkeys(("method", "fedsim_version", "git_commit", "hosts", "torch_version", "started_at", "mended"), (str,)),
}
ATTRIBUTES = 1000  # at most
TRIES, PAUSE = 20, 0.1  # of a file met half-written; seconds between two
SETTLED = 600  # seconds; clocks of a network's machines differ by less
WHOLE = 2**30  # bytes of a column that are read at once, however few of them are stored
FILLED = 1000  # or this many times what is stored
READING = threading.RLock()  # HDF5 opens no file for writing that another thread of the process has open, by `apart`, for reading
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class Unreadable(ValueError):
    """A file that cannot be read as a run file, and why."""


class Absent(KeyError):
    """A sound run file lacks what was asked for; the message says what it has."""

    def __str__(self) -> str:
        return str(self.args[0])


def read(path: str | Path, what: Callable[[h5py.File], Result], sleep: Callable[[float], object] | None = None) -> Result:
    """`what` of the run file at `path`. A file met half-written is tried again for 2 s, if there is a `sleep`.

    Raises FileNotFoundError, Unreadable, and Absent if `what` does.
    """
    for attempt in range(TRIES if sleep else 1):
        if attempt and sleep:
            sleep(PAUSE)
        try:
            with READING, opened(Path(path)) as file:
                return what(file)
        except (Absent, Unreadable, FileNotFoundError):
            raise
        except Damaged as error:
            reason = f"{path} is damaged: {error}"
            if isinstance(error, checked.Excessive):
                break
        except FAULTS as error:
            reason = f"{path} cannot be read: {message_of(error)}; is it a run file of fedsim?"
        if _is_settled(Path(path)):
            break
    raise Unreadable(reason)


def _is_settled(path: Path) -> bool:
    """Whether nobody has written to the file for so long that it is not half-written."""
    return path.exists() and time.time() - path.stat().st_mtime > SETTLED


def message_of(error: Exception) -> str:
    text = "it asks for more memory than there is" if isinstance(error, MemoryError) else str(error).strip("\"'") or type(error).__name__
    return " ".join(text.split())[:300]


def opened(path: Path) -> h5py.File:
    """The run file, for reading, its counter and its format checked."""
    _check_place(path)
    try:
        file = apart(path)
    except OSError as error:
        raise OSError("it was cut short or is damaged: HDF5 cannot open it") from error
    try:
        _check_format(file, path)
        known = {name: attribute(file, name) for name in NEEDED}
        _check_types(known)
        _check_rounds(file, known["rounds"])
    except BaseException:
        file.close()
        raise
    return file


def apart(path: str | Path) -> h5py.File:
    """An HDF5 file for reading, as it stands now, whatever else has it open in this process.

    HDF5 joins all opens of a file by the same driver in a process: a later one must name the same `locking`, and sees the sizes that the
    first one saw. xarray, h5py and netCDF4 open by the driver "sec2". By "stdio" this is an open of its own.
    """
    return h5py.File(path, "r", driver="stdio", locking=False)


def _check_place(path: Path) -> None:
    """Before HDF5 opens it: it would wait at a pipe for ever."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            with path.open("rb") as file:
                begin = file.read(8)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no run file {path}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(kind):
        raise Unreadable(f"{path} is a folder; give a run file in it")
    if not stat.S_ISREG(kind):
        raise Unreadable(f"{path} is a pipe or a device, and no run file")
    if not begin:
        raise Unreadable(f"{path} cannot be read: it is empty")
    if begin != b"\x89HDF\r\n\x1a\n":
        raise Unreadable(f"{path} cannot be read: it is no HDF5 file; is it a run file of fedsim?")


def _check_format(file: h5py.File, path: Path) -> None:
    version = attribute(file, "format_version")
    if version is None:
        raise Unreadable(f"{path} cannot be read: it has no format_version; is it a run file of fedsim?")
    need(type(version) is int and version > 0, f"its format_version is {version!r}, not a whole number from 1 to {FORMAT}")
    if version > FORMAT:
        writer = attribute(file, "fedsim_version") or "a newer fedsim"
        raise Unreadable(f"{path} was written by fedsim {writer} in a newer format than this fedsim reads ({FORMAT}); upgrade fedsim")


def _check_rounds(file: h5py.File, last: int) -> None:
    """That the file has the rows that its counter vouches for."""
    need(last >= -1, f"its counter of rounds is {last}; it is -1 or more")
    found = dataset(file, "round", "iu", (None,), filled=True)
    have = min(found.shape[0], found.id.get_storage_size() // found.dtype.itemsize)
    need(have > last, f"it says that round {last} is done, and has the rows of {have} rounds")
    wrong = np.flatnonzero(found[: last + 1] != np.arange(last + 1))
    need(not len(wrong), f"the numbers of the rounds are damaged at {checksums.rounds(wrong)}")


# --- attributes


def attributes(file: h5py.File) -> dict[str, Any]:
    """All attributes, as plain values; those that fedsim writes are of their type, and as they were written."""
    need(len(file.attrs) <= ATTRIBUTES, f"it has {len(file.attrs):,} attributes, more than a run file has")
    found = {name: attribute(file, name) for name in file.attrs}
    _check_types(found)
    checksums.check_attributes(found)
    found.pop(checksums.NAME, None)
    return found | {"finished": bool(found["finished"])}


def _check_types(found: Mapping[str, Any]) -> None:
    for name in NEEDED:
        need(found.get(name) is not None, f"the attribute {name!r} is missing")
    for name, kinds in TYPES.items():
        value = found.get(name)
        need(value is None or type(value) in kinds, f"the attribute {name!r} is {value!r:.60}, not {_kind(kinds)}")
    need(found["finished"] in (0, 1), f"the attribute 'finished' is {found['finished']}, neither 0 nor 1")


def _kind(kinds: tuple[type, ...]) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kinds[-1]]


def one(known: Mapping[str, Any], name: str) -> Any:
    """An attribute that not every sound file has."""
    need(known.get(name) is not None, f"the attribute {name!r} is missing")
    return known[name]


def is_former(file: h5py.File) -> bool:
    """Whether the file was written before its columns had their present names."""
    return int(attribute(file, "format_version")) < RENAMED


def job(known: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved job among the attributes, under the present names."""
    table = checked.from_toml(one(known, "job"))
    need(isinstance(table.get("method", {}), dict), "the job's [method] is no table")
    need(isinstance(table.get("execution", {}), dict), "the job's [execution] is no table")
    return former_names.job(table) if known["format_version"] < RENAMED else table


# --- columns


def names(file: h5py.File, group: str) -> list[str]:
    """The columns of a group under their present names; none where an older writer has not made it."""
    place = checked.group(file, group)
    found = [] if place is None else [checked.clean(name) for name in place if name not in DIMENSIONS[group]]
    return [former_names.COLUMNS.get(f"{group}/{name}", name) for name in found] if is_former(file) else found


def all_names(file: h5py.File, group: str) -> list[str]:
    """The same; Damaged where one is missing that was written."""
    found, known = names(file, group), checksums.columns(file)
    there = checked.group(file, group) or ()
    scales = [f"{group}/{name}" for name in DIMENSIONS[group] if known and name not in there]  # another name passes for a column
    for path in [*checksums.missing(group, found, known), *scales]:
        raise Damaged(f"{path} is missing")
    return found


def stored_name(file: h5py.File, group: str, name: str) -> str:
    """What a column is called in the file."""
    old = {new: path for path, new in former_names.COLUMNS.items() if path.startswith(f"{group}/")} if is_former(file) else {}
    return old.get(name, f"{group}/{name}").partition("/")[2]


def column(file: h5py.File, group: str, name: str) -> h5py.Dataset:
    """The column, of the right kind and width; Absent where there is none."""
    path = f"{group}/{stored_name(file, group, name)}"
    if not _has(file, group, name):
        need(path not in checksums.columns(file), f"{path} is missing")
        raise Absent(f"{file.filename} has no {group}/{name}; it has {', '.join(names(file, group)) or 'none'}")
    found = dataset(file, path, NUMBERS, (None, *_wide(file, group)), filled=True)
    last = attribute(file, "rounds")
    need(found.shape[0] > last, f"{group}/{name} has {found.shape[0]} rows, and round {last} is done")
    return found


def _has(file: h5py.File, group: str, name: str) -> bool:
    if is_former(file):
        return name in names(file, group)
    return name not in DIMENSIONS[group] and checked.group(file, group) is not None and checked.item(file, f"{group}/{name}") is not None


def _wide(file: h5py.File, group: str) -> tuple[int, ...]:
    return tuple(dataset(file, dimension, f"{NUMBERS}OS", (None,)).shape[0] for dimension in DIMENSIONS[group][1:])


def values(
    file: h5py.File, group: str, name: str, r: int | range | None = None, client: int | None = None, known: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """Rows 0 … `rounds` of a column, or the row of round `r`, or those of a range of rounds, or of one client alone.

    known: what has checksums, if the caller knows.
    """
    found, done = column(file, group, name), int(attribute(file, "rounds")) + 1
    where = str(found.name).lstrip("/")
    begin, end = (0, done) if r is None else (r.start, r.stop) if isinstance(r, range) else (r, r + 1)
    if r is not None and not 0 <= begin < end <= found.shape[0]:
        raise Absent(f"{file.filename} has no round {r}; its rounds are 0 to {done - 1}")
    known = checksums.columns(file) if known is None else known
    if client is not None:
        return _of_client(file, found, client, done, known)
    size = (end - begin) * 8 * int(np.prod(found.shape[1:]))
    most = max(WHOLE, FILLED * found.id.get_storage_size())
    need(size <= most, f"{where} has {size:,} bytes in all, and hardly any are stored; read the clients of one round at a time")
    rows = _rows(found, where, slice(begin, end))
    checksums.check_rows(file, where, rows[: max(done - begin, 0)], begin, known)
    return rows[0] if isinstance(r, int) else rows


def about(file: h5py.File, group: str, name: str) -> tuple[str, str]:
    """The unit of a column, and what it is."""
    return _about(column(file, group, name), checksums.abouts(file, checksums.columns(file)))


def abouts(file: h5py.File, group: str, known: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The unit of each column of a group, and what it is. `known`: what has checksums."""
    there, sums = names(file, group), checksums.abouts(file, known)
    for path in checksums.missing(group, there, known):
        raise Damaged(f"{path} is missing")
    stored = {name: stored_name(file, group, name) for name in there} if is_former(file) else dict(zip(there, there, strict=True))
    place = checked.group(file, group)
    return {name: _about(checked.item(place, at), sums) for name, at in stored.items()}


def _about(found: h5py.Group | h5py.Dataset, sums: Mapping[str, int]) -> tuple[str, str]:
    """sums: the checksums, by path."""
    units, text = (attribute(found, key) for key in ("units", "long_name"))
    checksums.check_about(str(found.name).lstrip("/"), units, text, sums)
    return str(units or ""), str(text or "")


def _of_client(file: h5py.File, found: h5py.Dataset, client: int, rows: int, known: Sequence[str]) -> NDArray[np.float64]:
    where = str(found.name).lstrip("/")
    if where not in known:
        return _rows(found, where, (slice(0, rows), client))
    try:
        return checksums.client(file, where, client, rows, known)
    except (OSError, RuntimeError) as error:
        raise Damaged(f"{where} is damaged in round {_first_damaged(found, slice(0, rows))}; other rounds can be read") from error


def sound_columns(file: h5py.File, group: str) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """Rows 0 … `rounds` of all columns of a group that can be read, and what is wrong with each of the others."""
    found, wrong = dict[str, NDArray[np.float64]](), list[str]()
    try:
        known = checksums.columns(file)
    except Damaged:
        known = None  # each column says so
    there = names(file, group)
    wrong += [f"{path} is missing" for path in checksums.missing(group, there, known or ())]
    for name in there:
        try:
            found[name] = values(file, group, name, known=known)
        except Damaged as error:
            wrong.append(str(error))
        except FAULTS as error:
            wrong.append(f"{group}/{name} cannot be read: {message_of(error)}")
    return found, wrong


def _rows(found: h5py.Dataset, where: str, part: Any) -> NDArray[np.float64]:
    try:
        rows: NDArray[np.float64] = found[part].astype(np.float64, copy=False)
    except OSError as error:
        raise Damaged(f"{where} is damaged in round {_first_damaged(found, part)}; other rounds can be read") from error
    return rows


def _first_damaged(found: h5py.Dataset, part: Any) -> int:
    rows = part if isinstance(part, slice) else part[0]
    for r in range(rows.start, rows.stop):
        try:
            found[r]
        except OSError:
            return r
    return int(rows.start)
