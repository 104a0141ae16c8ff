"""One run writes a run file at a time: a lock on RUN.h5.lock, which says who holds it.

The lock is the kernel's (`fcntl.lockf`, POSIX): it ends with its process, however that ends, so what a kill leaves behind is a file
that nobody holds, and the next run takes it. Other machines see it on file systems that share POSIX locks: NFS 4 does, NFS 3 with its
lock daemon, Lustre mounted with `flock`, GPFS and CephFS. Where a file system has no locks, the note in the file tells of a living
process on the same machine, and nothing tells of other machines. A process that is forked does not inherit the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.errors import BadInput, naming_path
from fedsim.storage.checkpoint import folder_of

HELD = (errno.EACCES, errno.EAGAIN)  # what lockf says of a lock that another process has
LOOK, LOOKS = 0.1, 100  # seconds between two looks at a holder that is ending, and how many there are
OURS: set[tuple[int, Path]] = set()  # (process, lock): the kernel lets a process take its own lock twice


@contextmanager
def holding(run: Path, since: str, sleep: Callable[[float], object]) -> Iterator[None]:
    """Until its end no other run may write the run file; `since` tells others when that began. BadInput where one writes it already.

    A folder that cannot be written has no lock: whoever writes the run file there gets that error.
    """
    if not run.name:
        raise BadInput(f"{run} is a folder, not a run file; choose another --out")
    with naming_path(run, "; choose another --out"):
        folder_of(run).exists()  # the longest of its names
    path = lock_of(run)
    if (mine := (os.getpid(), path)) in OURS:
        raise BadInput(_refusal(run, path))
    made = [folder for folder in path.parents if not folder.exists()]
    handle = _taken(run, path, sleep)
    OURS.add(mine)
    try:
        if handle is not None:
            _note(handle, since)
        yield
    finally:
        OURS.discard(mine)
        if handle is not None:
            if _is(handle, path):  # or somebody removed it, and it is the lock of another run
                path.unlink(missing_ok=True)  # while it is held: `_taken` sees that its file is gone
            os.close(handle)
        for folder in made:
            with suppress(OSError):  # it is in use now
                folder.rmdir()


def lock_of(run: Path) -> Path:
    """RUN.h5.lock beside the run file, the same whichever name the file is called by."""
    real = run.resolve()
    return real.with_name(real.name + ".lock")


def _taken(run: Path, path: Path, sleep: Callable[[float], object]) -> int | None:
    """The lock, held; None where there can be none. BadInput where another process holds it.

    A process that was killed keeps its lock until its last thread has ended, and is waited for.
    """
    looks = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            if path.is_dir():
                raise BadInput(
                    f"{path} is a folder, and the lock of {run} needs a file of this name; remove it, or choose another --out"
                ) from None
            return None
        if not (refused := _refused(handle)) and _is(handle, path):
            return handle
        lives = _lives(path)
        if refused not in HELD and not lives and _is(handle, path):  # a file system without locks
            return handle
        os.close(handle)
        if refused and (lives is not False or looks == LOOKS):
            raise BadInput(_refusal(run, path))
        if refused:
            looks += 1
            sleep(LOOK)


def _refused(handle: int) -> int:
    """Locks the file; the number of the error, or 0."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno or errno.EAGAIN
    return 0


def _is(handle: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _note(handle: int, since: str) -> None:
    """Writes down who holds the lock. A disk without room has none for a note either, and the lock holds without it."""
    text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since})
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _noted(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(path: Path) -> bool | None:
    """Whether the process that the note names lives; None where that cannot be seen from this machine."""
    note = _noted(path)
    if note.get("host") != socket.gethostname() or not sys.platform.startswith("linux"):
        return None
    if note.get("process") == os.getpid():  # one before had our number, as in a container that was started again
        return False
    try:
        return Path(f"/proc/{note.get('process')}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _refusal(run: Path, path: Path) -> str:
    note = _noted(path) if (os.getpid(), path) not in OURS else {"process": os.getpid(), "host": socket.gethostname()}
    who = f"process {note['process']} on {note['host']}" if {"process", "host"} <= note.keys() else "another process"
    since = f", since {note['since']}" if "since" in note else ""
    return f"{run} is being written by another run ({who}{since}); wait until that has ended, or choose another --out"
