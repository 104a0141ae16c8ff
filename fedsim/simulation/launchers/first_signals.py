"""Signals that ask a run to stop, from the first instant of its process. Imports nothing but `signal`: each import takes time."""

import signal
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_noted: list[int] = []


def note() -> None:
    """From now on a signal is noted and does not end the process; one that was blocked (`env --block-signal`) arrives now."""
    for name in SIGNALS:
        signal.signal(name, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def noted() -> bool:
    """Whether one has come."""
    return bool(_noted)


def first() -> int:
    """The number of the one that came first, 0 where none has."""
    return _noted[0] if _noted else 0


def all_noted() -> list[int]:
    """The numbers of all that have come."""
    return list(_noted)


def _note(number: int, _: Any) -> None:
    _noted.append(number)
