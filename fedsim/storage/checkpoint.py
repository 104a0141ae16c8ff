"""Checkpoints: the state after a round as safetensors and a JSON manifest, in a folder beside the run file.

    000012.state.safetensors   tensors of the method's state           000012.kept.safetensors   what the clients touched since keep
    000012.json                {"sha256": …, "manifest": {round, state, extra, files: {name: bytes, sha256}, kept: {name: clients}}}

Everything is written aside, synced and renamed, the manifest last, so a manifest vouches for complete files by their size and
hash. Kept states that were not touched are referred to where they lie, in a file of an earlier round; since two checkpoints depend on
such a file, it gets a copy, 000012.kept.copy.safetensors, when the second one begins to, and either of the two will do. So damage to
one file loses at most one checkpoint. The two newest manifests and their files stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedsim.core.serialization import Json, dump, load
from fedsim.errors import BadInput, CannotWrite
from fedsim.storage import disk_room
from fedsim.storage import manifest as manifests
from fedsim.storage.known_classes import KnownClasses
from fedsim.storage.manifest import COPY, FAULTS, FORMAT, KEPT, Manifest, OtherFormat, put, sum_of

Tree = dict[str, Tensor]

BEGINNING = "000000.begun"  # the run file as it was before its first row, for `fedsim doctor`
DAMAGED = ".json.damaged"  # of a manifest that the doctor has put aside
SUFFIXES = (".json", DAMAGED, ".state.safetensors", KEPT, COPY, ".new")  # all that a folder of ours holds, but for BEGINNING


@dataclass(frozen=True)
class Checkpoint:
    """What `latest` finds."""

    round: int
    state: Any  # as it was given to `save`
    extra: Json
    kept: Mapping[int, Tree]  # client -> what it keeps, read from the disk on demand
    passed: tuple[str, ...] = ()  # newer checkpoints that are damaged, and how


class Taken(NamedTuple):
    """A state as it was at one moment, in memory of its own: the one it was taken of may change while this is saved."""

    plain: Json
    tensors: Tree

    @classmethod
    def of(cls, state: Any) -> Taken:
        """TypeError where `state` holds what no checkpoint can hold."""
        plain, tensors = dump(state)
        return cls(plain, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})


class StoredStates(Mapping[int, Tree]):
    """The kept states of all clients ever visited, read on demand; a file is opened once."""

    def __init__(self, folder: Path, places: Mapping[int, str]) -> None:
        self._folder, self._places = folder, places
        self._open: dict[str, tuple[Any, dict[int, list[str]]]] = {}

    def __getitem__(self, client: int) -> Tree:
        try:
            file, names = self._index(self._places[client])
        except OSError as error:
            where = self._folder / self._places[client]
            raise CannotWrite(f"{where} is gone, which holds what clients keep ({error.strerror}); the run has stopped") from error
        # Cloned, since the library's tensors lie in the mapped file: writing to one would change what is read next.
        return {name.split("/", 2)[2]: file.get_tensor(name).clone() for name in names.get(client, [])}

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _index(self, name: str) -> tuple[Any, dict[int, list[str]]]:
        """The open file and the names of each client's tensors in it, in the order they were given."""
        if name not in self._open:
            manifests.check_header(self._folder / name)
            file: Any = safe_open(self._folder / name, framework="pt")
            names: dict[int, list[str]] = {}
            for key in sorted(file.keys()):
                names.setdefault(int(key.partition("/")[0]), []).append(key)
            self._open[name] = file, names
        return self._open[name]


def folder_of(run: str | Path) -> Path:
    """RUN.h5.checkpoint/ beside RUN.h5: the whole name, so that no two runs share a folder."""
    return Path(run).with_name(Path(run).name + ".checkpoint")


def save(folder: Path, r: int, state: Any, extra: Json, kept: Mapping[int, Tree] | None = None, before: int | None = None) -> StoredStates:
    """The checkpoint of round `r` >= 0: `state`, or what was `Taken` of it, `extra` as JSON, `kept` of the clients touched since
    the last save.

    before: the round of the checkpoint that this run saved last or began from, -1: none. The other clients' kept states are those of it
    and of no other: BadInput where it is damaged. Without it, it is the newest sound one of an earlier round.
    Returns the kept states of all clients ever visited, which may then leave the memory. Once it returns, `latest` gives this
    round, whatever happens to the machine; until then, the one before. NoRoom where the disk is full, BadInput where the folder cannot be
    written.
    """
    with naming_unwritable(folder):
        return _save(folder, r, state, extra, kept or {}, before)


def check_writable(folder: Path) -> None:
    """BadInput where the folder is there and checkpoints cannot be written to it."""
    _refuse_file(folder)
    if folder.is_dir():
        with naming_unwritable(folder):
            disk_room.put(folder / "000000.new", b"")
            (folder / "000000.new").unlink()


@contextmanager
def naming_unwritable(folder: Path) -> Iterator[None]:
    """An OSError inside becomes a BadInput that says where checkpoints cannot be written."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise BadInput(f"{folder} cannot take checkpoints: {error.strerror}{where}; mend that, or choose another --out") from error


def _save(folder: Path, r: int, state: Any, extra: Json, kept: Mapping[int, Tree], known: int | None) -> StoredStates:
    with disk_room.as_no_room(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
    before = _before(folder, r) if known is None else _of_round(folder, known)
    plain, tensors = state if isinstance(state, Taken) else dump(state)
    manifest: Manifest = {"format_version": FORMAT, "fedsim_version": manifests.own_version(), "round": r, "state": plain, "extra": extra}
    name = manifests.state_of(manifest)
    manifest["files"] = {name: put(folder / name, _bytes(tensors))}
    manifest["kept"] = _keep(folder, r, kept, manifest["files"], before)
    disk_room.sync(folder)  # a rename is safe on the disk only when its folder is
    put(folder / manifests.name_of(r), manifests.seal(manifest))
    disk_room.sync(folder)
    clean(folder, [manifest, before] if before else [manifest])
    return StoredStates(folder, manifests.places(manifest))


def latest(
    folder: Path, device: str = "cpu", check: Callable[[Checkpoint], None] = lambda found: None, own: Collection[str] = ()
) -> Checkpoint | None:
    """The newest checkpoint whose files are all whole and which passes `check`, or None in a folder without any.

    own: the imported modules of the job's author, of which its states may be too; see `storage/known_classes.py`.
    Raises BadInput where there are manifests but every one is damaged, and for one in a newer format than ours.
    """
    _refuse_file(folder)
    reasons: list[str] = []
    known = KnownClasses(own)
    for path in manifests.manifests(folder):
        try:
            manifest = manifests.unseal(path)
            manifests.verify(folder, manifest)
            found = replace(_checkpoint(folder, manifest, device, known), passed=tuple(reasons))
            check(found)
            return found
        except OtherFormat as error:
            raise BadInput(str(error)) from error
        except FAULTS as error:
            reasons.append(f"{path.name}: {manifests.reason(error)}")
    if reasons:
        raise BadInput(f"no checkpoint in {folder} is whole ({'; '.join(reasons)}); start afresh with another --out")
    return None


def keep_beginning(folder: Path, run: Path) -> None:
    """Keeps a copy of the run file, which has no row yet: from it and a checkpoint a lost run file can be made anew."""
    with naming_unwritable(folder):
        with disk_room.as_no_room(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)
        put(folder / BEGINNING, run.read_bytes())


def clear(folder: Path) -> None:
    """Removes the checkpoints in the folder, newest last, and the folder if nothing else is in it. BadInput where it is a file."""
    _refuse_file(folder)
    clean(folder, [])
    if not folder.is_dir():
        return
    (folder / BEGINNING).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, and the checkpoints need a folder of this name; remove it, or choose another --out")


def _checkpoint(folder: Path, manifest: Manifest, device: str, known: KnownClasses) -> Checkpoint:
    path = folder / manifests.state_of(manifest)
    manifests.check_header(path)
    stored = from_bytes(path.read_bytes())
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    kept = StoredStates(folder, manifests.places(manifest))
    return Checkpoint(manifest["round"], load(manifest["state"], tensors, known), manifest["extra"], kept)


def _before(folder: Path, r: int) -> Manifest | None:
    """The newest sound manifest of an earlier round: later ones belong to a future that this run has left."""
    for path in manifests.manifests(folder):
        if int(path.stem) < r:
            try:
                return manifests.unseal(path)
            except FAULTS:
                continue
    return None


def _of_round(folder: Path, r: int) -> Manifest | None:
    """The manifest of round `r`; None for -1."""
    path = folder / manifests.name_of(r)
    try:
        return manifests.unseal(path) if r >= 0 else None
    except OSError:
        raise
    except FAULTS as error:
        raise BadInput(f"{path} is damaged on the disk ({manifests.reason(error)}); restart the run with --resume must") from error


def _keep(folder: Path, r: int, kept: Mapping[int, Tree], files: Manifest, before: Manifest | None) -> dict[str, list[int]]:
    """Where every client's kept state lies: the touched ones in a new file, the others where they were; notes these in `files`."""
    places: dict[str, list[int]] = {}
    for name, clients in (before["kept"] if before else {}).items():
        untouched = [client for client in clients if client not in kept]
        if before and untouched:
            places[name], files[name] = untouched, before["files"][name]
            files[name.replace(KEPT, COPY)] = _copy(folder, name, before["files"])
    if kept:
        # Numbered, since safetensors forgets the order of the keys.
        tensors = {f"{client}/{i:04d}/{key}": tree[key] for client, tree in kept.items() for i, key in enumerate(tree)}
        name = f"{r:06d}.kept.safetensors"
        places[name], files[name] = list(kept), put(folder / name, _bytes(tensors))
    return places


def _copy(folder: Path, name: str, files: Manifest) -> dict[str, Any]:
    """Sees to it that a file of kept states has its copy; what to verify it by."""
    copy, expected = folder / name.replace(KEPT, COPY), files[name]
    if copy.name not in files or not copy.is_file():
        content = (folder / name).read_bytes()
        if sum_of(content) != expected:
            raise BadInput(f"{folder / name} is damaged on the disk, and holds kept states of clients; restart the run with --resume must")
        put(copy, content)
    found: dict[str, Any] = expected
    return found


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


def clean(folder: Path, keep: list[Manifest]) -> None:
    """Removes what no manifest to `keep` refers to: other manifests first, so that none is left without its files."""
    wanted = {name for manifest in keep for name in (manifests.name_of(manifest["round"]), *manifest["files"])}
    ours = [path for path in folder.glob("*") if path.name.endswith(SUFFIXES) and path.name[:6].isdigit() and not path.is_dir()]
    unwanted = [path for path in ours if path.name not in wanted]
    for path in sorted(unwanted, key=lambda path: (path.suffix != ".json", path.name)):
        path.unlink(missing_ok=True)
