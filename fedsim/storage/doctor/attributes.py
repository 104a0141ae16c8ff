"""The attributes of a damaged run file, each from where its checksum says that it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import h5py
from fedsim_analysis import checked, checksums, run_file

from fedsim.core.tree import Tree, sha256_of
from fedsim.storage.doctor.complaints import FAULTS
from fedsim.storage.doctor.correction import corrected_value
from fedsim.storage.reader import stored_model

MENDED = "mended"  # what a mending could not keep, in words
CHANGED = ("ranks", "hosts", "torch_version", "peak_flops", "peak_bytes", "finished", "weights_sha256", MENDED)  # since the beginning
WRITTEN = ("rounds", "format_version", checksums.NAME)  # anew
TEXTS = ("job", "plan", "partition")


def salvaged(file: h5py.File | None, beginning: h5py.File | None) -> tuple[dict[str, Any], list[str]]:
    """The attributes that are right, `finished` and `weights_sha256` among them, and what is lost."""
    sums, first = _sums(file), {} if beginning is None else run_file.attributes(beginning)
    found: dict[str, Any] = {name: value for name, value in first.items() if name not in (*CHANGED, *WRITTEN)}
    lost = list[str]()
    names = [name for name in dict.fromkeys(["job", *run_file.TYPES, *sums]) if name not in {*found, *WRITTEN} and name[:1] != "/"]
    for name in [] if file is None else names:
        there = _there(file, name)
        right = next(_right(name, there, sums.get(name), found), None)
        if right is not None:
            found[name] = right
        elif name in sums or _stands(file, name):
            lost.append(f"the attribute {name!r}")
    if file is None:
        found |= {name: value for name, value in first.items() if name in CHANGED}
    found.setdefault("finished", 0 if file is None else _is_finished(file))
    lost = [line for line in lost if "'finished'" not in line and "'weights_sha256'" not in line]
    return found | {"finished": bool(found["finished"])}, lost


def _sums(file: h5py.File | None) -> Mapping[str, Any]:
    return {} if file is None or is_broken(file) else checksums.of_file(checked.attribute(file, checksums.NAME))


def is_broken(file: h5py.File) -> bool:
    """Whether the attribute with the checksums cannot be read, so that all that it vouches for is refused."""
    try:
        return checksums.of_file(checked.attribute(file, checksums.NAME)) is None
    except FAULTS:
        return True


def _stands(file: h5py.File, name: str) -> bool:
    """Whether the file has the attribute, whatever it is."""
    try:
        return bool(h5py.h5a.exists(file.id, name.encode()))
    except FAULTS:
        return True


def _there(file: h5py.File, name: str) -> Any:
    """The value of an attribute that may be one of its kind; None where it is not."""
    try:
        value = checked.attribute(file, name)
    except FAULTS:
        return None
    return value if type(value) in run_file.TYPES.get(name, (str, int, float, bool)) else None


def _right(name: str, there: Any, expected: Any, found: Mapping[str, Any]) -> Iterator[Any]:
    """What an attribute may have been, the likeliest first; `found`: the attributes that are known."""
    if type(expected) is not int:
        if there is not None and _reads(name, there):
            yield there
        return
    values = [there, *_implied(name, found)]
    yield from (value for value in values if value is not None and crc32(repr(value).encode()) == expected)
    if there is not None and (fixed := corrected_value(there, expected)) is not None:
        yield fixed


def _reads(name: str, value: Any) -> bool:
    """Whether a text that nothing vouches for is one of its kind."""
    try:
        if name == "job":
            run_file.job({"job": value, "format_version": run_file.FORMAT})
        elif name in TEXTS:
            checked.from_json(value, name)
    except FAULTS:
        return False
    return True


def _implied(name: str, found: Mapping[str, Any]) -> Iterator[Any]:
    """What follows from the job, and the values of a truth value."""
    if name == "finished":
        yield from (0, 1)
    try:
        job = run_file.job({"job": found["job"], "format_version": run_file.FORMAT})
    except FAULTS:
        return
    method = job.get("method", {}).get("name")
    yield {"seed": job.get("seed", 0), "rounds_planned": job.get("rounds"), "method": method}.get(name)


def _is_finished(file: h5py.File) -> bool:
    """Whether a run counts as finished whose mark is lost: it has final weights."""
    try:
        return checked.item(file, "model") is not None
    except FAULTS:
        return False


def sound_model(file: h5py.File, expected: str) -> Tree | None:
    """The final weights, if their SHA-256 is the expected one, or has the checksum of that."""
    tree = stored_model(file)
    known = sha256_of(tree)
    return tree if known == expected or crc32(repr(known).encode()) == _sums(file).get("weights_sha256") else None
