"""The user's cache folder: what is there may be removed at any time, and costs time alone.

What another user could have put there is never read: a file and its folder must belong to this user, or to root, and nobody else may
write to them. A folder above that others may write to does no harm: what they put in its place belongs to them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

NOWHERE = Path(os.devnull)  # no folder can be made in it
FOLDER, FILE = 0o755, 0o644  # modes at most: the user's umask may take more away
OTHERS = stat.S_IWGRP | stat.S_IWOTH
ROOT = 0  # who can write everywhere anyway


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/fedsim`, or `~/.cache/fedsim`; a folder that cannot be made where the user has no home."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "fedsim"
    try:
        return Path.home() / ".cache" / "fedsim"
    except RuntimeError:
        return NOWHERE / "fedsim"


def make(folder: Path) -> None:
    """Makes a folder of the cache, with those above it; PermissionError where it is one that others may have written to."""
    folder.mkdir(FOLDER, parents=True, exist_ok=True)
    if not is_own(folder):
        raise PermissionError(f"{folder} belongs to another user, or others may write to it")


def is_own(folder: Path) -> bool:
    """Whether nobody but this user, or root, can have written to the folder; True where it is not there yet."""
    try:
        return _is_ours(folder.stat())
    except OSError:
        return True


def content(path: Path) -> bytes:
    """The bytes of a file in the cache. OSError where it cannot be read, and where others may have written it."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        there = os.fstat(handle)
        if not (stat.S_ISREG(there.st_mode) and _is_ours(there) and is_own(path.parent)):
            raise PermissionError(f"{path} may have been written by another user")
        return file.read()


def put(path: Path, data: bytes) -> None:
    """Writes a file of the cache aside, and renames it. OSError where that cannot be."""
    aside = path.with_name(f"{path.name}.{os.urandom(16).hex()}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE), "wb") as file:
            file.write(data)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _is_ours(there: os.stat_result) -> bool:
    return there.st_uid in (os.geteuid(), ROOT) and not there.st_mode & OTHERS
