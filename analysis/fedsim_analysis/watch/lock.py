"""Who writes a run file, as RUN.h5.lock says. The lock is asked about (F_GETLK) and never taken.

A run holds a POSIX lock on that file as long as it lives, and has written into it which process it is. Other machines see the lock on
file systems that share such locks. Where a file system does not, only the note is left, and whether the process of another machine lives
cannot be known from here.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTE = 4096  # bytes of a note at most
FLOCK = "hhqqi4x"  # struct flock of a 64-bit Linux: type, whence, start, length, process


@dataclass(frozen=True)
class Holder:
    """What is known of the process that wrote, or writes, a run file."""

    writes: bool | None  # whether it still does; None: that cannot be seen from this machine
    process: int | None = None
    host: str = ""
    since: str = ""
    noted: float = 0.0  # when the lock was last written to, in seconds since 1970

    def __str__(self) -> str:
        who = "a process" if self.process is None else f"process {self.process}"
        return who + (f" on {self.host}" if self.host else "")


def holder_of(run: Path) -> Holder | None:
    """Who holds the lock of the run file; None where there is no lock, which is so after every end but a kill."""
    real = Path(os.path.realpath(run))
    path = real.with_name(real.name + ".lock")
    try:
        noted = path.stat().st_mtime
        if _is_open_here(path):
            return Holder(True, os.getpid(), socket.gethostname(), noted=noted)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # of another user, who lets nobody read it
        return Holder(None, noted=_mtime(path))
    try:
        held, note = _held(handle), _note(handle)
    finally:
        os.close(handle)
    process, host = note.get("process"), _text(note, "host")
    process = process if type(process) is int else None
    writes = held if held or host == socket.gethostname() else None  # on another machine it may live
    if writes is None and host == socket.gethostname():
        writes = _lives(process)
    return Holder(writes, process, host, _text(note, "since"), noted)


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


def _note(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, NOTE, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(note: dict[str, Any], name: str) -> str:
    found = note.get(name)
    return found if isinstance(found, str) else ""


def _lives(process: int | None) -> bool | None:
    """Whether a process of this machine lives; None where that cannot be known."""
    return None if process is None or not sys.platform.startswith("linux") else began(process) != ""


def began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
