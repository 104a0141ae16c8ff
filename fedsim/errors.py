"""The faults a user meets, and the exit codes they end with."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the limit on the size of a file


class BadInput(ValueError):
    """The job, the data or the command line asks for what cannot be: exit code 2, one clear message, nothing written."""


class LonelyRanks(BadInput):
    """Several processes were started for one run and do not know of each other. Each sees that by itself; rank 0 alone tells it."""


class ClientFault(RuntimeError):
    """An exception in a client's work, reported with its rank, client, round and step: exit code 1."""


class MethodFault(RuntimeError):
    """An exception in a method's own code on the server, or a wrong value that it returned: exit code 1."""

    @property
    def full_message(self) -> str:
        """The message, and below it the traceback of the exception that led to it."""
        trace = "".join(traceback.format_exception(self.__cause__)) if self.__cause__ else ""
        return f"{self}\n{trace}".rstrip()


class TooFewAnswers(Exception):
    """Too few clients answered in a round under emulated devices: the round is repeated with a new cohort."""


class NobodyThere(TooFewAnswers):
    """Nobody could be asked; some time later somebody may be."""


class Stopped(Exception):
    """A signal, a time limit or a full disk ended the run; the checkpoint of the last complete round stands: exit code 3."""


class CannotWrite(Stopped):
    """A run that goes on may not or cannot write its files any more: exit code 3, one message; what was written before stands."""


class SilentRanks(Stopped):
    """A run is to stop, and some ranks do not answer: exit code 3; what was written stands, and the ranks are ended by force."""


class NoRoom(CannotWrite):
    """The disk is full: exit code 3, one message that says for which file; what was written before stands."""

    BEGINS = "no room"


def reason(error: OSError) -> str:
    """Why a file cannot be written, in words; a file that stands where a folder should be is named."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and error.filename:
        found = next((path for path in (Path(error.filename), *Path(error.filename).parents) if path.is_file()), None)
        if found:
            return f"{found} is a file, not a folder"
    return error.strerror or str(error)


@contextmanager
def naming_job(name: object) -> Iterator[None]:
    """A BadInput inside, of the data, the model or the run file, begins with the name of the job, as errors in the job itself do."""
    try:
        yield
    except BadInput as error:
        raise type(error)(f"{name}: {error}") from error


@contextmanager
def naming_path(path: object, advice: str = "") -> Iterator[None]:
    """An OSError inside becomes a BadInput: the name of a path is too long, or it lies in a folder that this user may not enter."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path} cannot be reached: {error.strerror}{advice}") from error
