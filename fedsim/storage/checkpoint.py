"""Checkpoints: the state after a round as safetensors and a JSON manifest, in a folder beside the run file.

    000012.state.safetensors   tensors of the method's state           000012.kept.safetensors   what the clients touched since keep
    000012.json                {"sha256": …, "manifest": {round, state, extra, files: {name: bytes, sha256}, kept: {name: clients}}}

Everything is written aside, synced and renamed, the manifest last, so a manifest vouches for complete files by their size and
hash. Kept states that were not touched are referred to where they lie. The two newest manifests and their files stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedsim.core.serialization import Json, dump, load
from fedsim.errors import BadInput

Tree = dict[str, Tensor]
Manifest = dict[str, Any]

FORMAT = 2  # of the manifest; its envelope and the keys format_version and fedsim_version stay in every later one
SUFFIXES = (".json", ".state.safetensors", ".kept.safetensors", ".new")  # all that a folder of ours holds


@dataclass(frozen=True)
class Checkpoint:
    """What `latest` finds."""

    round: int
    state: Any  # as it was given to `save`
    extra: Json
    kept: Mapping[int, Tree]  # client -> what it keeps, read from the disk on demand


class StoredStates(Mapping[int, Tree]):
    """The kept states of all clients ever visited, read on demand; a file is opened once."""

    def __init__(self, folder: Path, places: Mapping[int, str]) -> None:
        self._folder, self._places = folder, places
        self._open: dict[str, tuple[Any, dict[int, list[str]]]] = {}

    def __getitem__(self, client: int) -> Tree:
        file, names = self._index(self._places[client])
        # Cloned, since the library's tensors lie in the mapped file: writing to one would change what is read next.
        return {name.split("/", 2)[2]: file.get_tensor(name).clone() for name in names.get(client, [])}

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _index(self, name: str) -> tuple[Any, dict[int, list[str]]]:
        """The open file and the names of each client's tensors in it, in the order they were given."""
        if name not in self._open:
            file: Any = safe_open(self._folder / name, framework="pt")
            names: dict[int, list[str]] = {}
            for key in sorted(file.keys()):
                names.setdefault(int(key.partition("/")[0]), []).append(key)
            self._open[name] = file, names
        return self._open[name]


def folder_of(run: str | Path) -> Path:
    """RUN.h5.checkpoint/ beside RUN.h5: the whole name, so that no two runs share a folder."""
    return Path(run).with_name(Path(run).name + ".checkpoint")


def save(folder: Path, r: int, state: Any, extra: Json, kept: Mapping[int, Tree] | None = None) -> StoredStates:
    """The checkpoint of round `r` >= 0: `state` as `plain` dumps it, `extra` as JSON, `kept` of the clients touched since the last save.

    Returns the kept states of all clients ever visited, which may then leave the memory. Once it returns, `latest` gives this
    round, whatever happens to the machine; until then, the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _before(folder, r)
    plain, tensors = dump(state)
    manifest: Manifest = {"format_version": FORMAT, "fedsim_version": _version(), "round": r, "state": plain, "extra": extra}
    manifest["files"] = {f"{r:06d}.state.safetensors": _put(folder / f"{r:06d}.state.safetensors", _bytes(tensors))}
    manifest["kept"] = _keep(folder, r, kept or {}, manifest["files"], before)
    _sync(folder)
    _put(folder / f"{r:06d}.json", _seal(manifest))
    _sync(folder)
    _clean(folder, [manifest, before] if before else [manifest])
    return StoredStates(folder, _places(manifest))


def latest(folder: Path, device: str = "cpu") -> Checkpoint | None:
    """The newest checkpoint whose files are all whole, or None in a folder without any.

    Raises BadInput where there are manifests but every one is damaged, and for one in a newer format than ours.
    """
    reasons: list[str] = []
    for path in _manifests(folder):
        try:
            manifest = _unseal(path)
            _verify(folder, manifest)
            return _checkpoint(folder, manifest, device)
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(f"{path.name}: {error}")
    if reasons:
        raise BadInput(f"no checkpoint in {folder} is whole ({'; '.join(reasons)}); start afresh with another --out")
    return None


def clear(folder: Path) -> None:
    """Removes the checkpoints in the folder, newest last, and the folder if nothing else is in it."""
    _clean(folder, [])
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@cache
def _version() -> str:
    try:
        return version("fedsim")
    except PackageNotFoundError:
        return "of no version (not installed)"


def _places(manifest: Manifest) -> dict[int, str]:
    return {client: name for name, clients in manifest["kept"].items() for client in clients}


def _checkpoint(folder: Path, manifest: Manifest, device: str) -> Checkpoint:
    stored = from_bytes((folder / f"{manifest['round']:06d}.state.safetensors").read_bytes())
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    return Checkpoint(manifest["round"], load(manifest["state"], tensors), manifest["extra"], StoredStates(folder, _places(manifest)))


def _manifests(folder: Path) -> list[Path]:
    """All manifests, newest first."""
    return sorted((path for path in folder.glob("*.json") if path.stem.isdigit()), key=lambda path: -int(path.stem))


def _before(folder: Path, r: int) -> Manifest | None:
    """The newest sound manifest of an earlier round: later ones belong to a future that this run has left."""
    for path in _manifests(folder):
        if int(path.stem) < r:
            try:
                return _unseal(path)
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None


def _keep(folder: Path, r: int, kept: Mapping[int, Tree], files: Manifest, before: Manifest | None) -> dict[str, list[int]]:
    """Where every client's kept state lies: the touched ones in a new file, the others where they were; notes these in `files`."""
    places: dict[str, list[int]] = {}
    for name, clients in (before["kept"] if before else {}).items():
        untouched = [client for client in clients if client not in kept]
        if before and untouched:
            places[name], files[name] = untouched, before["files"][name]
    if kept:
        # Numbered, since safetensors forgets the order of the keys.
        tensors = {f"{client}/{i:04d}/{key}": tree[key] for client, tree in kept.items() for i, key in enumerate(tree)}
        name = f"{r:06d}.kept.safetensors"
        places[name], files[name] = list(kept), _put(folder / name, _bytes(tensors))
    return places


def _bytes(tensors: Tree) -> bytes:
    """safetensors refuses tensors that share memory; those that do not own theirs are copied."""
    own: Tree = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        own[name] = tensor
    return to_bytes(own)


def _seal(manifest: Manifest) -> bytes:
    body = json.dumps(manifest)
    return f'{{"sha256": "{sha256(body.encode()).hexdigest()}", "manifest": {body}}}\n'.encode()


def _unseal(path: Path) -> Manifest:
    """The manifest; ValueError where its hash differs, BadInput where its format is newer."""
    envelope = json.loads(path.read_text(encoding="utf-8"))
    manifest: Manifest = envelope["manifest"]
    if sha256(json.dumps(manifest).encode()).hexdigest() != envelope["sha256"]:
        raise ValueError("the manifest is damaged")
    if manifest["format_version"] > FORMAT:
        raise BadInput(
            f"{path} was written by fedsim {manifest['fedsim_version']} in format {manifest['format_version']};"
            f" this is fedsim {_version()}, which reads up to format {FORMAT}: upgrade fedsim, or choose another --out"
        )
    if manifest["format_version"] < FORMAT:
        raise BadInput(
            f"{path} was written by fedsim {manifest['fedsim_version']} in format {manifest['format_version']}, whose classes have other"
            f" names now: finish the run with that version, or start afresh with --resume never and another --out"
        )
    return manifest


def _verify(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest["files"].items():
        content = (folder / name).read_bytes()
        if _sum(content) != expected:
            raise ValueError(f"{name} is damaged")


def _sum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def _put(path: Path, content: bytes) -> dict[str, Any]:
    """Writes the file aside, onto the disk, and renames it; what to verify it by."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    return _sum(content)


def _sync(folder: Path) -> None:
    """A rename is safe on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(folder: Path, manifests: list[Manifest]) -> None:
    """Removes what none of the manifests refers to: other manifests first, so that none is left without its files."""
    wanted = {name for manifest in manifests for name in (f"{manifest['round']:06d}.json", *manifest["files"])}
    unwanted = [path for path in folder.glob("*") if path.name.endswith(SUFFIXES) and path.name[:6].isdigit() and path.name not in wanted]
    for path in sorted(unwanted, key=lambda path: (path.suffix != ".json", path.name)):
        path.unlink(missing_ok=True)
