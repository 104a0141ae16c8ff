"""A private folder on a node's own disk where a run writes, and from which its files are copied home after each checkpoint.

Home is the run file that `--out` names, with its checkpoints beside it. The run file is copied first, aside and renamed, then the files of
the checkpoints, and their manifests last: so what stands at home can be read at every instant, and its checkpoint is never ahead of it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from fedsim.errors import BadInput, CannotWrite, NoRoom, reason
from fedsim.storage import disk_room
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.places.presence import writing
from fedsim.storage.reader import RunReader

PREFIX, OF = "fedsim-", "of"  # of the folder's name; the file in it that says whose it is
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
OURS = re.compile(r"\d{6,}\..+")  # names in a folder of checkpoints
Written = tuple[int, int, int]  # number, bytes, time of a file


def expanded(text: str, variables: Mapping[str, str]) -> Path:
    """The folder that `[execution] scratch` names; BadInput where it names a variable that is not set."""
    names = [first or second for first, second in VARIABLE.findall(text)]
    if unset := [name for name in names if not variables.get(name)]:
        raise BadInput(f'[execution] scratch = "{text}": the environment variable {unset[0]} is not set on this node')
    return Path(VARIABLE.sub(lambda found: variables[found[1] or found[2]], text)).expanduser()


def recover(folder: Path, home: Path) -> int | None:
    """Copies home what a killed run of the same file left in `folder`, where that is newer; the round of its checkpoint.

    Only for who holds the lease on `home`. What is left there is removed.
    """
    newer = None
    for left in sorted(folder.glob(f"{PREFIX}*")):
        if not _is_private(left) or not _is_of(left, home):
            continue
        place = Scratch(left, home)
        found, known = _last(place.path), _last(home)
        if found is not None and (known is None or found > known) and _is_same_run(place.path, home):
            with writing(home):
                place.copy_back()
            newer = found
        shutil.rmtree(left, ignore_errors=True)
    return newer


class Scratch:
    """A folder that is this run's alone."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        self.path = folder / home.name
        self.behind = False  # whether home is, since a copy failed: then this folder stays, and the next run on this node copies it
        self._copied: dict[str, Written] = {}  # files of checkpoints that stand at home, as they were when they were copied

    @classmethod
    @contextmanager
    def made(cls, folder: Path, home: Path) -> Iterator[Scratch]:
        """A new one, with what stands at home; removed at the end unless home is behind.

        BadInput where none can be made, NoRoom where it is too small.
        """
        _check_writable(home)
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            made = Path(mkdtemp(prefix=PREFIX, dir=folder))
        place = cls(made, home)
        try:
            with _naming(folder), disk_room.as_no_room(made, _size(home)):
                (made / OF).write_text(str(home.resolve()))
                place._fetch()
            yield place
        finally:
            if not place.behind:
                shutil.rmtree(made, ignore_errors=True)

    def copy_back(self) -> None:
        """Brings home up to date. NoRoom where it does not fit there; any other OSError is the caller's."""
        if not self.path.exists():
            return
        self.behind = True
        self._copy_back()
        self.behind = False

    def _copy_back(self) -> None:
        _copy(self.path, self.home, self.path.stat().st_size)
        there, here = folder_of(self.home), folder_of(self.path)
        names = sorted(path.name for path in here.glob("*") if OURS.fullmatch(path.name) and not path.name.endswith(".new"))
        if names:
            with disk_room.as_no_room(there, 0):
                there.mkdir(exist_ok=True)
        written = {name: _written(here / name) for name in names}
        for name in sorted(names, key=lambda name: name.endswith(".json")):
            if self._copied.get(name) != written[name] or not (there / name).exists():
                _copy(here / name, there / name, (here / name).stat().st_size)
        if names:
            for path in sorted(there.glob("*"), key=lambda path: path.suffix != ".json"):
                if OURS.fullmatch(path.name) and path.name not in names:
                    path.unlink(missing_ok=True)
        self._copied = written

    def left(self) -> str:
        """Where what was written stands, as the end of the message of a run that cannot write."""
        newer = f", and {self.folder} what is newer: the next run on this node copies it" if self.behind and self.path.exists() else ""
        return f"; {self.home} holds what was copied back{newer}"

    def _fetch(self) -> None:
        if not self.home.exists():
            return
        shutil.copyfile(self.home, self.path)
        folder_of(self.path).mkdir()
        for path in folder_of(self.home).glob("*"):
            if OURS.fullmatch(path.name) and path.is_file():
                shutil.copyfile(path, folder_of(self.path) / path.name)
                self._copied[path.name] = _written(folder_of(self.path) / path.name)


@contextmanager
def copied_back(place: Scratch, check: Callable[[], None]) -> Iterator[None]:
    """At the end the last state is copied home; not from a disk that failed, and not where `check` says that the file is another's."""
    try:
        yield
    except CannotWrite as error:
        if isinstance(error, NoRoom):
            with suppress(OSError, CannotWrite):
                check()
                place.copy_back()
        raise
    except BaseException:
        with writing(place.home):
            check()
            place.copy_back()
        raise
    with writing(place.home):
        check()
        place.copy_back()


def _copy(source: Path, target: Path, size: int) -> None:
    """Copies a file aside, onto the disk, and renames it."""
    aside = target.with_name(target.name + ".new")
    with disk_room.as_no_room(target, size):
        try:
            with source.open("rb") as read, aside.open("wb") as write:
                shutil.copyfileobj(read, write, 1 << 20)
                write.flush()
                os.fsync(write.fileno())
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
    aside.rename(target)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"[execution] scratch = {folder} cannot be written: {reason(error)}; choose another folder") from error


def _check_writable(home: Path) -> None:
    """BadInput where the first copy would fail."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        aside = home.with_name(home.name + ".new")
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise BadInput(f"{home} cannot be written: {reason(error)}; choose another --out") from None


def _size(home: Path) -> int:
    return home.stat().st_size if home.exists() else 0


def _written(path: Path) -> Written:
    """Which writing of a file this is: each is a new file that was renamed."""
    there = path.stat()
    return there.st_ino, there.st_size, there.st_mtime_ns


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put something there."""
    about = folder.lstat()
    return folder.is_dir() and not folder.is_symlink() and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def _is_of(folder: Path, home: Path) -> bool:
    try:
        return (folder / OF).read_text() == str(home.resolve())
    except (OSError, ValueError):
        return False


def _last(run: Path) -> int | None:
    """The round of the newest checkpoint; None where there is none."""
    rounds = [int(path.stem) for path in folder_of(run).glob("*.json") if path.stem.isdigit()]
    return max(rounds, default=None)


def _is_same_run(one: Path, other: Path) -> bool:
    """Whether two files are of one run: the same job, begun at the same time."""
    try:
        first, second = RunReader(one).attributes, RunReader(other).attributes
    except BadInput:
        return False
    return all(first.get(name) == second.get(name) for name in ("job_sha256", "started_at"))
