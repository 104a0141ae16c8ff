"""Where an export is written: aside, and then renamed, so that what stands there is whole; nothing of anybody else's is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Refused(ValueError):
    """The export cannot be written there; the message says why, and what would be right."""


@contextmanager
def aside(out: Path, is_folder: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Where to write a file, or a folder, that takes the place of `out` at the end. `is_ours`: whether what is there is a former export.

    Raises Refused where something else stands there, or where it cannot be written.
    """
    _check(out, is_folder, is_ours)
    beside = out.with_name(out.name + ".new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)
        if is_folder:
            beside.mkdir()
        yield beside
        if is_folder:
            _remove(out)
        beside.replace(out)
    except (OSError, RuntimeError) as error:  # the second of netCDF4, which gives no reason
        reason = (error.strerror if isinstance(error, OSError) else f"{error} (is the disk full?)") or error
        raise Refused(f"{out} cannot be written: {reason}; mend that, or choose another --out") from error
    finally:
        with suppress(OSError):
            _remove(beside)


def _check(out: Path, is_folder: bool, is_ours: Callable[[Path], bool]) -> None:
    try:
        if not out.exists():
            return
        if out.is_dir() != is_folder:
            wrong, right = ("a file", "a folder") if is_folder else ("a folder", "a file")
            raise Refused(f"{out} is {wrong}, and this export is {right}; choose another --out")
        if not is_ours(out):
            raise Refused(f"{out} holds something else than an export of fedsim; choose another --out")
    except OSError as error:
        raise Refused(f"{out} cannot be written: {error.strerror or error}; choose another --out") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
