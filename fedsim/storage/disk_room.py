"""Room on the disk, reserved before HDF5 writes: HDF5 cannot close a file of which a write failed (it ends in a segmentation fault).

`posix_fallocate` asks the file system itself, so a full disk, a quota and `ulimit -f` are all seen before anything has changed, and what
is reserved no other program can take. Reserved bytes lie after the end that HDF5 knows, where no reader looks; `give_back` cuts them off.
Files that are written in one piece are written aside by `put`, and a part of one is removed.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

from fedsim.errors import FULL, NoRoom

STEP = 256_000  # bytes reserved at once where they are free, so that not every row asks
AGAIN = "the same command goes on from there"


@contextmanager
def as_no_room(path: Path, needed: int, again: str = AGAIN) -> Iterator[None]:
    """An error for want of room inside becomes NoRoom. `needed`: bytes that `path` would have needed more than it has."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoRoom(f"{NoRoom.BEGINS} for {path}: {_why(path, needed, error.errno)}, and {again}") from None


def reserve(file: h5py.File, path: Path, needed: int, called: Path) -> None:
    """Sees to it that the file at `path` can grow by `needed` bytes; NoRoom where it cannot, and then nothing has changed.

    called: what the message calls it.
    """
    end = file.id.get_filesize()
    if end + needed <= path.stat().st_size:
        return
    with as_no_room(called, needed):
        try:
            _allocate(path, end, needed + STEP)
        except OSError:
            _allocate(path, end, needed)


def give_back(handle: int, end: int) -> None:
    """Cuts off what was reserved after the `end` of a file, and closes it. By its handle: another may have its name by now."""
    try:
        if os.fstat(handle).st_size > end:
            os.ftruncate(handle, end)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Puts what was written to a file, by whichever handle, or which names a folder has, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(path: Path, content: bytes, again: str = AGAIN, called: Path | None = None) -> None:
    """Writes a file aside, onto the disk, and renames it; NoRoom where it does not fit, and then nothing has changed.

    again: what is to be done when there is room. called: what the message calls the file.
    """
    aside = path.with_name(path.name + ".new")
    with as_no_room(called or path, len(content), again):
        try:
            aside.unlink(missing_ok=True)  # a rest of a write that was killed, or a link that somebody laid there
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
        except OSError:
            with suppress(OSError):  # a folder of this name is left alone
                aside.unlink(missing_ok=True)
            raise


def _allocate(path: Path, begin: int, size: int) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(handle, begin, size)
    except OSError as error:
        os.ftruncate(handle, begin)  # a part may have been reserved
        if error.errno in FULL:
            raise
    finally:
        os.close(handle)


def _why(path: Path, needed: int, number: int) -> str:
    """What is missing, and what to do about it."""
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        size = needed + (path.stat().st_size if path.exists() else 0)
        return f"it needs {size:,} bytes, and a file may have {limit:,} at most (ulimit -f); raise the limit"
    if number == errno.EDQUOT:
        return f"it needs {needed:,} bytes, and your disk quota has fewer left; make room"
    disk = os.statvfs(next(folder for folder in path.parents if folder.exists()))
    if disk.f_files and not disk.f_favail:
        return "the disk cannot take another file; remove some"
    return f"it needs {needed:,} bytes, and {disk.f_bavail * disk.f_frsize:,} are free; make room"
