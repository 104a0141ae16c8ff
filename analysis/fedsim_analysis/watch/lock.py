"""Who writes a run file, as RUN.h5.lock says. The lock is asked about (F_GETLK) and never taken.

A run holds a POSIX lock on that file as long as it lives, has written into it which process it is, and touches it every BEAT seconds.
Where the lock of a process on another machine cannot be seen, whether it lives is told by whether the file is touched: `Pulse` watches
that by its own clock, since those of two machines differ. A note of an earlier fedsim has no token, and its file is touched once.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import monotonic

NOTE = 4096  # bytes of a note at most
FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux: type, whence, start, length, process
BEAT = 4.0  # seconds between two touches of a lock that is held
PATIENCE = 45.0  # seconds without a touch, after which a holder on another machine counts as ended


@dataclass(frozen=True)
class Note:
    """What a lock says of its holder; empty where it does not say it."""

    host: str = ""
    process: int | None = None
    since: str = ""
    began: str = ""  # when the process began, in the kernel's ticks
    token: str = ""  # drawn at random, unlike that of every other holder
    boot: str = ""  # which boot of which machine
    processes: str = ""  # the table that the number of the process is of; containers have their own
    locks: bool = False  # whether the file system gave it the kernel's lock
    job: str = ""  # of SLURM
    restarts: int = 0  # how often SLURM had requeued that job

    @classmethod
    def of(cls, content: bytes) -> Note:
        """The note in a lock; an empty one where there is something else."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(found, dict):
            return cls()
        kinds: dict[str, type] = {"process": int, "restarts": int, "locks": bool}
        kept = {name: found.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in kept.items() if type(value) is kinds.get(name, str)})  # type: ignore[arg-type]

    @property
    def here(self) -> bool:
        """Whether the process runs, or ran, under the kernel of this process."""
        return self.boot == boot() if self.boot else self.host == socket.gethostname()

    def lives(self) -> bool | None:
        """Whether that process lives; None where that cannot be seen from here."""
        if self.process is None or not self.here or self.processes not in ("", process_table()) or not sys.platform.startswith("linux"):
            return None
        found = began(self.process)
        return found != "" and self.began in ("", found)


@dataclass(frozen=True)
class Sight:
    """A lock as one look found it."""

    note: Note
    held: bool | None  # whether another process has the kernel's lock on it; None: that cannot be seen from here
    touched: int  # when, in nanoseconds
    mark: str  # unlike that of any other lock

    def same(self, other: Sight) -> bool:
        """Whether that look found the same lock, untouched."""
        return (self.mark, self.touched) == (other.mark, other.touched)


@dataclass(frozen=True)
class Holder:
    """What is known of the process that wrote, or writes, a run file."""

    writes: bool | None  # whether it still does; None: that cannot be seen from this machine
    process: int | None = None
    host: str = ""
    since: str = ""
    noted: float = 0.0  # when the lock was last written to, in seconds since 1970
    token: str = ""  # of a holder that touches its lock

    def __str__(self) -> str:
        who = "a process" if self.process is None else f"process {self.process}"
        return who + (f" on {self.host}" if self.host else "")


class Pulse:
    """Whether the lock of a process on another machine goes on being touched, as the looks of this process find."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._last, self._moved, self._began = ("", 0.0), 0.0, 0.0

    def judged(self, holder: Holder | None) -> Holder | None:
        """The holder; whether it writes is known after two looks of which the second found a touch, and after PATIENCE without one."""
        if holder is None or holder.writes is not None or not holder.token:
            return holder
        now, seen = self._clock(), (holder.token, holder.noted)
        if seen[0] != self._last[0]:
            self._began, self._moved = now, 0.0
        elif seen != self._last:
            self._began = self._moved = now
        self._last = seen
        if now - self._began > PATIENCE:
            return replace(holder, writes=False)
        return replace(holder, writes=True) if self._moved else holder


def holder_of(run: Path) -> Holder | None:
    """Who holds the lock of the run file; None where there is no lock, which is so after every end but a kill."""
    real = Path(os.path.realpath(run))
    path = real.with_name(real.name + ".lock")
    try:
        if _is_open_here(path):
            return Holder(True, os.getpid(), socket.gethostname(), noted=path.stat().st_mtime)
    except OSError:
        return None if not os.path.lexists(path) else Holder(None, noted=_mtime(path))
    found = look(path)
    if found is None:
        return None
    note = found.note
    by_kernel = found.held if found.held or (note.here and (note.locks or not note.token)) else None  # on another machine it may live
    writes = by_kernel if by_kernel is not None else note.lives()
    if writes is False and note.token and note.process != os.getpid() and note.lives():
        writes = None  # it has closed a copy of the file, with which the kernel's lock goes, and may touch it all the same
    return Holder(writes, note.process, note.host, note.since, found.touched / 1e9, note.token)


def look(path: Path) -> Sight | None:
    """What stands in the lock; None where there is none. Closing it lets go of a lock that this process has on it (POSIX)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # of another user, who lets nobody read it
        with suppress(OSError):
            return _sight(Note(), None, path.stat(), b"")
        return None
    try:
        try:
            content = os.pread(handle, NOTE, 0)
        except OSError:
            content = b""
        return _sight(Note.of(content), _held(handle), os.fstat(handle), content)
    except OSError:  # it was replaced on another machine just now
        return None
    finally:
        os.close(handle)


def _sight(note: Note, held: bool | None, there: os.stat_result, content: bytes) -> Sight:
    return Sight(note, held, there.st_mtime_ns, sha256(content or b"%d" % there.st_ino).hexdigest()[:24])


def boot() -> str:
    """Unlike for every two boots of any machines; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_table() -> str:
    """Which table the number of this process is of; empty where the system does not say."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _is_open_here(path: Path) -> bool:
    """Whether this process itself holds it, in another thread. To close the file a second time would let go of the lock (POSIX)."""
    there = path.stat()
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):
            if os.path.samestat(os.fstat(int(entry.name)), there):
                return True
    return False


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _held(handle: int) -> bool | None:
    """Whether another process has locked the file; None where the file system or this system has no such locks."""
    if not sys.platform.startswith("linux"):
        return None
    asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        found = fcntl.fcntl(handle, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)


def began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
