"""Manifests of checkpoints: read and checked as files that nobody vouches for, or a `ValueError` that says what is wrong.

{"sha256": …, "manifest": {format_version, fedsim_version, round, state, extra, files: {name: {bytes, sha256}}, kept: {name: [client, …]}}}

A manifest names files of its own folder alone, by the names that fedsim gives them. Nothing is read into the memory that is much larger
than what lies on the disk, and no text is longer or deeper than a checkpoint's.
"""

from __future__ import annotations

import json
import re
from functools import cache
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedsim.storage import disk_room

Manifest = dict[str, Any]

FORMAT = 2  # of the manifest; its envelope and the keys format_version and fedsim_version stay in every later one
KEPT, COPY = ".kept.safetensors", ".kept.copy.safetensors"
NAME = re.compile(r"[0-9]{6,18}\.(state|kept|kept\.copy)\.safetensors")  # of a file that a manifest may name
TEXT = 2**26  # bytes of a manifest at most
NESTED = 2**22  # lists and objects in it at most
HEADER = 2**26  # bytes of the header of a file of tensors at most
SPARSE = 2**30  # bytes, from which on most of a file must lie on the disk
DENSE = 1024  # bytes of a file for one on the disk, at most: a file system may compress
FAULTS = (
    ImportError,
    AttributeError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
)


class OtherFormat(ValueError):
    """A sound checkpoint of a newer or an older format."""


def manifests(folder: Path) -> list[Path]:
    """All manifests, newest first."""
    return sorted((path for path in folder.glob("*.json") if _is_number(path.stem)), key=lambda path: -int(path.stem))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def name_of(r: int) -> str:
    """The name of the manifest of round `r`."""
    return f"{r:06d}.json"


def state_of(manifest: Manifest) -> str:
    """The name of the file with the tensors of its state."""
    return f"{manifest['round']:06d}.state.safetensors"


def seal(manifest: Manifest) -> bytes:
    """The manifest as text, with its hash."""
    body = json.dumps(manifest)
    return f'{{"sha256": "{sha256(body.encode()).hexdigest()}", "manifest": {body}}}\n'.encode()


def unseal(path: Path) -> Manifest:
    """The manifest; ValueError where its hash differs or it is none, OtherFormat where its format is another."""
    envelope = json.loads(_text(path))
    manifest: Manifest = envelope["manifest"]
    if sha256(json.dumps(manifest).encode()).hexdigest() != envelope["sha256"]:
        raise ValueError("the manifest is damaged")
    if manifest["format_version"] > FORMAT:
        raise OtherFormat(
            f"{path} was written by fedsim {manifest['fedsim_version']} in format {manifest['format_version']};"
            f" this is fedsim {own_version()}, which reads up to format {FORMAT}: upgrade fedsim, or choose another --out"
        )
    if manifest["format_version"] < FORMAT:
        raise OtherFormat(
            f"{path} was written by fedsim {manifest['fedsim_version']} in format {manifest['format_version']}, whose classes have other"
            f" names now: finish the run with that version, or start afresh with --resume never and another --out"
        )
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    """That the parts of a manifest of our format are of their kinds, and that it names files of its folder alone."""
    r, files, kept = manifest["round"], manifest["files"], manifest["kept"]
    if type(r) is not int or r != int(path.stem):
        raise ValueError(f"it says that it is of round {r!r:.40}")
    if not isinstance(files, dict) or not isinstance(kept, dict):
        raise ValueError("its files or its kept states are no tables")
    for name, expected in files.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"it names the file {name!r:.80}, and a checkpoint has none of such a name")
        if not isinstance(expected, dict) or type(expected.get("bytes")) is not int or expected["bytes"] < 0:
            raise ValueError(f"it does not say how long {name} is")
    for needed in (state_of(manifest), *kept):
        if needed not in files:
            raise ValueError(f"it does not list {needed!r:.80}")
    if any(type(clients) is not list or any(type(client) is not int for client in clients) for clients in kept.values()):
        raise ValueError("its kept states are not those of clients")


def _text(path: Path) -> bytes:
    refuse_other_kinds(path)
    if path.stat().st_size > TEXT:
        raise ValueError(f"the manifest has {path.stat().st_size:,} bytes; a checkpoint's has {TEXT:,} at most")
    text = path.read_bytes()
    if (nested := text.count(b"[") + text.count(b"{")) > NESTED:
        raise ValueError(f"the manifest has {nested:,} lists and objects; a checkpoint's has {NESTED:,} at most")
    return text


def refuse_other_kinds(path: Path) -> None:
    """ValueError for what is there and no file: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no file")


def places(manifest: Manifest) -> dict[int, str]:
    """The file in which each client's kept state lies."""
    return {client: name for name, clients in manifest["kept"].items() for client in clients}


def damaged(folder: Path, manifest: Manifest) -> tuple[list[str], dict[str, str]]:
    """The files that are damaged or missing and have no whole copy; and those that have one, with its name."""
    lost, copied = list[str](), dict[str, str]()
    files: Manifest = manifest["files"]
    for name in (name for name in files if not name.endswith(COPY)):
        ways = [way for way in dict.fromkeys((name, name.replace(KEPT, COPY))) if way in files]
        whole = [way for way in ways if is_whole(folder / way, files[way])]
        lost += [] if whole else [name]
        copied |= {way: whole[0] for way in ways if whole and way not in whole}
    return lost, copied


def verify(folder: Path, manifest: Manifest) -> None:
    """ValueError where a file is damaged; a file of kept states that is damaged, or its copy, is made anew from the other."""
    lost, copied = damaged(folder, manifest)
    if lost:
        raise ValueError(f"{lost[0]} is damaged or missing")
    for name, other in copied.items():
        if not (folder / name).is_dir():
            put(folder / name, (folder / other).read_bytes())
        elif name in manifest["kept"]:
            raise ValueError(f"{name} is a folder; remove it")


def is_whole(path: Path, expected: Manifest) -> bool:
    """Whether the file has the bytes that the manifest expects."""
    try:
        refuse_other_kinds(path)
        there = path.stat()
        if there.st_size != expected["bytes"] or (there.st_size > SPARSE and there.st_size > DENSE * 512 * there.st_blocks):
            return False
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest() == expected.get("sha256")
    except (OSError, ValueError):
        return False


def check_header(path: Path) -> None:
    """ValueError where a file of tensors says that its header is longer than a checkpoint's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER:
        raise ValueError(f"the header of {path.name} has {length:,} bytes; a checkpoint's has {HEADER:,} at most")


def sum_of(content: bytes) -> dict[str, Any]:
    """What to verify a file by."""
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def put(path: Path, content: bytes) -> dict[str, Any]:
    """Writes the file; what to verify it by."""
    disk_room.put(path, content)
    return sum_of(content)


def reason(error: Exception) -> str:
    """What is wrong with a checkpoint."""
    if isinstance(error, ImportError | AttributeError):
        return f"a class of its state cannot be imported ({error}); was it renamed or moved?"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).split())[:200] or type(error).__name__


@cache
def own_version() -> str:
    """The version of fedsim that is installed."""
    try:
        return version("fedsim")
    except PackageNotFoundError:
        return "of no version (not installed)"
