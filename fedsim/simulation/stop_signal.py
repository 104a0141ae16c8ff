"""Whether a run is to stop: a signal or a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.errors import Stopped
from fedsim.simulation.launchers.first_signals import SIGNALS, noted


@dataclass
class StopSignal:
    """Whether the run is to stop: a signal came, or its time is over."""

    limit: float | None = None  # seconds
    signalled: bool = field(default_factory=noted)  # it may have come before this object was made
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return self.signalled or (self.limit is not None and time.monotonic() - self.began > self.limit)

    def refuse_to_begin(self, out: Path) -> None:
        """Stopped where a signal has come already, before the first round."""
        if self.signalled:
            raise stopped(out)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals stop the run meanwhile; afterwards they do again what they did. Only a main thread can listen to signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self._note) for name in SIGNALS}
        self.signalled = self.signalled or noted()  # one may have come since this object was made
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def listen(self) -> None:
        """The same for the rest of the process."""
        for name in SIGNALS:
            signal.signal(name, self._note)

    def _note(self, *_: Any) -> None:
        self.signalled = True


def stopped(out: Path) -> Stopped:
    """The message of a run that was stopped. `fedsim batch`, on the machine of rank 0, sees by a file of its own that it was."""
    if note := os.environ.get("FEDSIM_STOP_NOTE"):
        with suppress(OSError):
            Path(note).touch()
    if not out.exists():
        return Stopped("stopped before the first round; the same command starts the run")
    return Stopped(f"stopped; {out} holds all complete rounds, and the same command goes on from there")
