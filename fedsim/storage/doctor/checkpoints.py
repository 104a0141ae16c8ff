"""The folder of checkpoints: which are whole, and the mending of those that are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import h5py
from fedsim_analysis import run_file

from fedsim.storage import checkpoint, manifest
from fedsim.storage.doctor.findings import Findings
from fedsim.storage.manifest import Manifest, OtherFormat


@dataclass(frozen=True)
class Stored:
    """One checkpoint."""

    path: Path  # of its manifest
    manifest: Manifest | None  # None: it cannot be read
    reason: str = ""  # why it cannot be used; empty: it is whole
    copied: dict[str, str] = field(default_factory=dict)  # damaged files, and the whole copy of each
    other: bool = False  # it is of another format, and not damaged

    @property
    def round(self) -> int:
        return int(self.path.stem)

    @property
    def job(self) -> str | None:
        """The SHA-256 of its job."""
        extra = self.manifest["extra"] if self.manifest else None
        found = extra.get("job_sha256") if isinstance(extra, dict) else None
        return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Folder:
    """RUN.h5.checkpoint."""

    path: Path
    stored: list[Stored]  # newest first
    beginning: bool  # whether the run file as it was before its first row is kept, and can be read
    leftovers: list[Path]

    @property
    def whole(self) -> list[Stored]:
        return [each for each in self.stored if not each.reason]

    @property
    def newest(self) -> int:
        """The round of the newest whole checkpoint; -1: there is none."""
        return self.whole[0].round if self.whole else -1


def folder_of(run: Path) -> Folder:
    """The checkpoints of a run, and what else stands among them. Nothing is changed."""
    path = checkpoint.folder_of(run)
    stored = [_stored(each) for each in manifest.manifests(path)] if path.is_dir() else []
    leftovers = sorted(each for each in path.glob("*.new") if each.name[:6].isdigit() and each.is_file()) if path.is_dir() else []
    return Folder(path, stored, _begins(path / checkpoint.BEGINNING), leftovers)


def _stored(path: Path) -> Stored:
    try:
        found = manifest.unseal(path)
        lost, copied = manifest.damaged(path.parent, found)
    except OtherFormat as error:
        return Stored(path, None, str(error), other=True)
    except manifest.FAULTS as error:
        return Stored(path, None, manifest.reason(error))
    return Stored(path, found, f"{lost[0]} is damaged or missing" if lost else "", copied)


def _begins(path: Path) -> bool:
    try:
        with beginning(path) as file:
            return bool(run_file.attributes(file))
    except (*run_file.FAULTS, run_file.Unreadable, FileNotFoundError):
        return False


def beginning(path: Path) -> h5py.File:
    """The run file as it was before its first row, open for reading."""
    return run_file.opened(path)


def look(folder: Folder, found: Findings) -> None:
    """Says which checkpoints are whole and which are not."""
    if folder.path.exists() and not folder.path.is_dir():
        found.add(f"{folder.path} is a file", "checkpoints need a folder of this name; remove the file", mendable=False)
    for each in folder.stored:
        kept = f"; round {folder.newest} is whole, and the run goes on from there" if folder.whole else ""
        if each.other:
            found.add(f"the checkpoint of round {each.round}", each.reason, mendable=False)
        elif each.reason:
            advice = f"--mend puts it aside{kept}" if folder.whole else "no other is whole, so that the run cannot be continued"
            found.add(f"the checkpoint of round {each.round} is damaged ({each.reason})", advice, mendable=bool(folder.whole))
        for name, other in each.copied.items():
            found.add(f"{name} is damaged or missing", f"--mend makes it anew from {other}, which is whole")
    for path in folder.leftovers:
        found.add(
            f"{path.name} among the checkpoints", "a write that did not end left it; nothing reads it, --mend removes it", harmless=True
        )
    if folder.whole:
        clients = len(manifest.places(folder.whole[0].manifest or {}))
        states = f", with the kept states of {clients:,} clients" if clients else ""
        found.seen.append(f"{len(folder.whole)} checkpoints by their SHA-256, the newest of round {folder.newest}{states}")


def mend(folder: Folder) -> list[str]:
    """Mends what can be mended; what was done."""
    done = list[str]()
    for each in folder.stored:
        for name, other in each.copied.items():
            if not (folder.path / name).is_dir():
                manifest.put(folder.path / name, (folder.path / other).read_bytes())
                done.append(f"{name} was made anew from {other}")
        if each.reason and not each.other and folder.whole:
            done.append(put_aside(each))
    for path in folder.leftovers:
        path.unlink(missing_ok=True)
        done.append(f"{path.name} was removed")
    return done


def put_aside(each: Stored) -> str:
    """Takes a checkpoint out of use: its manifest gets another name, and the next checkpoint that is saved removes it."""
    aside = each.path.with_name(each.path.stem + checkpoint.DAMAGED)
    each.path.rename(aside)
    return f"the checkpoint of round {each.round} was put aside ({aside.name})"
