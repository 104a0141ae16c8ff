"""What all ranks of a run agree on: whether to begin, which errors end them together, and the codes that they end with."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from fedsim.errors import BadInput, ClientFault, MethodFault, Stopped
from fedsim.simulation.launchers.alike import blamed, difference, facts_of_this_rank
from fedsim.simulation.resume import host

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator

Made = TypeVar("Made")
PASSED_ON = 1.0  # seconds that a launcher gets to pass on the last message
CODES: dict[int, type[Exception]] = {1: ClientFault, 2: BadInput, 3: Stopped}


@contextmanager
def ending_all_ranks(communicator: Communicator | None) -> Iterator[None]:
    """An error that the ranks have not agreed on ends every rank, lest the others wait for this one for ever."""
    try:
        yield
    except (BadInput, Stopped, ClientFault):
        raise
    except MethodFault as fault:
        if communicator:
            abort(communicator, f"{fault.full_message}\n")
        raise
    except BaseException:
        if communicator:
            abort(communicator, traceback.format_exc())
        raise


def end_all_ranks_with_this_one(communicator: Communicator) -> None:
    """From now on an exception that ends this process ends every rank: the next run, and MPI's own end, would wait for it for ever."""
    shown = sys.excepthook
    if getattr(shown, "ends_all_ranks", False):
        return

    def show_and_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        abort(communicator, "")

    show_and_end.ends_all_ranks = True  # type: ignore[attr-defined]
    sys.excepthook = show_and_end


def abort(communicator: Communicator, message: str, code: int = 1) -> None:
    """Prints why, and ends every rank. A launcher drops what it has not passed on when ranks abort, hence the pause."""
    write_error(message)
    time.sleep(PASSED_ON)
    communicator.abort(code)


def write_error(message: str) -> None:
    sys.stderr.write(message)
    sys.stderr.flush()


def agreed(communicator: Communicator | None, make: Callable[[], Made]) -> Made:
    """What `make` returns on this rank. A BadInput or Stopped of any rank is raised on all of them, so that no rank waits for another."""
    made, code, message = None, 0, ""
    try:
        made = make()
    except (BadInput, Stopped) as error:
        code, message = code_of(error), str(error)
    said = communicator.allgather_text(f"{code}{host()}\n{message}") if communicator else [f"{code}\n{message}"]
    if code := next((int(text[0]) for text in said if text[0] != "0"), 0):
        hosts, messages = zip(*(text[1:].split("\n", 1) for text in said), strict=True)
        raise CODES[code](blamed(messages, hosts))
    return made  # type: ignore[return-value]


def refuse_unlike(communicator: Communicator | None, facts: dict[str, str]) -> None:
    """BadInput on all ranks where the facts of one differ from those of rank 0."""
    if communicator and (found := difference(communicator.allgather_text(facts_of_this_rank(facts)))):
        raise BadInput(f"the ranks of a run must be alike, but {found}; give all nodes the same environment and files")


def code_of(error: Exception | None) -> int:
    """The exit code of an error; 0 where there is none."""
    return next((code for code, kind in CODES.items() if isinstance(error, kind)), 0)
