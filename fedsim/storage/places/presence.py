"""Whether what a run writes is still there: folders are removed, file servers go away, and disks turn read-only while a run goes on.

An open file that was removed takes rows as before, and nobody will ever read them; so each write is preceded by a look.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

from fedsim.errors import BadInput, CannotWrite
from fedsim.storage.layout import Attributes
from fedsim.storage.reader import RunReader

HDF5 = re.compile(r"\(\w* ?\w+ failed\)|[Uu]nable to |[Cc]an't ")  # what h5py says of a write that failed
ERRNO = re.compile(r"errno = (\d+)")
ENDS = "the run has stopped"
WHY = {
    errno.EIO: "the disk or its file server has failed",
    errno.ESTALE: "its file server has forgotten it",
    errno.EROFS: "its disk can only be read now",
    errno.ENOENT: "it was removed",
    errno.ENOTDIR: "its folder was replaced",
    errno.ENOTCONN: "its file server is gone",
}


def check_file(handle: int, path: Path) -> None:
    """CannotWrite where the open file is not the one at `path` any more."""
    try:
        there = path.stat()
    except OSError as error:
        where = "" if path.parent.exists() else ", with its folder"
        raise CannotWrite(f"{path} is gone{where} ({_why(error)}); {ENDS}") from None
    if not os.path.samestat(os.fstat(handle), there):
        raise CannotWrite(f"{path} was replaced by another file while a run wrote it; {ENDS}, and leaves that file alone")


def check_checkpoint(manifest: Path) -> None:
    """CannotWrite where the manifest of the last checkpoint is not there any more: the next would lack what clients have kept."""
    if not manifest.exists():
        what = f"{manifest.parent} was emptied" if manifest.parent.exists() else f"{manifest.parent} is gone"
        raise CannotWrite(f"{what} while a run wrote its checkpoints there; {ENDS}; put it back, or choose another --out to start afresh")


@contextmanager
def writing(path: Path, also_refusals: bool = True) -> Iterator[None]:
    """An error of the operating system inside, or of HDF5, becomes CannotWrite; also one that a BadInput tells of, if `also_refusals`."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(Path(os.fsdecode(error.filename)) if error.filename else path, error) from error
    except RuntimeError as error:
        if not HDF5.search(str(error)):
            raise
        raise _cannot_write(path, OSError(*error.args)) from error
    except BadInput as error:
        if not (also_refusals and isinstance(error.__cause__, OSError)):
            raise
        raise _cannot_write(Path(error.__cause__.filename or path), error.__cause__) from error


def abandon(file: h5py.File, handle: int) -> None:
    """Closes a file, and `handle` of it, without a further write to it: it may be another's, or a write to it has failed.

    After a failed write HDF5 would end in a segmentation fault, had the next one not somewhere to go.
    """
    _lead_nowhere(handle)
    for step in (file.flush, file.close):
        with suppress(OSError, RuntimeError):
            step()
    os.close(handle)


def _lead_nowhere(kept: int) -> None:
    """What this process still writes to its open files of the file behind `kept` is thrown away from now on; `kept` itself stays."""
    there = os.fstat(kept)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for entry in list(Path("/dev/fd").iterdir()):
        number = int(entry.name)
        with suppress(OSError):
            if number != kept and os.path.samestat(os.fstat(number), there):
                os.dup2(nowhere, number, inheritable=False)
    os.close(nowhere)


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"{path} cannot be written any more: {_why(error)}; {ENDS}, and the same command goes on from there")


def _why(error: OSError) -> str:
    numbered = ERRNO.search(str(error))
    number = error.errno or (int(numbered[1]) if numbered else 0)
    return WHY.get(number) or (os.strerror(number) if number else " ".join(str(error).split()))


def refusal(path: Path, attributes: Attributes) -> str:
    """Why a run file cannot be created here, and what to do about it."""
    try:
        found = RunReader(path).attributes
    except BadInput:
        return f"{path} exists already and is no run file that can be read; choose another --out"
    method, seed, planned = (found.get(name, "?") for name in ("method", "seed", "rounds_planned"))
    about = f"{method}, seed {seed}, {max(found['rounds'], 0)} of {planned} rounds"
    if found.get("job") == attributes.get("job"):
        return f"{path} already holds this job ({about}); continue it with --resume must, or choose another --out"
    return f"{path} already holds another job: {about}; that one is continued by its own job file with --resume must; choose another --out"
