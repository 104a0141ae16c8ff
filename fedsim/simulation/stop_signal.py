"""Whether a run is to stop: a signal or a time limit. A second Ctrl-C ends it at once, a third one kills the process."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from fedsim.errors import Stopped
from fedsim.simulation.launchers.first_signals import SIGNALS, noted

AGAIN = 0.3  # seconds after which a signal is another key press: one Ctrl-C may reach a process twice, from the terminal and a launcher


@dataclass
class StopSignal:
    """Whether the run is to stop: a signal came, or its time is over."""

    limit: float | None = None  # seconds
    signalled: bool = field(default_factory=noted)  # it may have come before this object was made
    began: float = field(default_factory=time.monotonic)
    say: Callable[[str], None] | None = None  # tells that the run is going to stop, in a thread of its own
    stopping: str = "stopping after the pack in flight; a second Ctrl-C ends the run at once"  # what it tells
    raises: bool = True  # whether a second Ctrl-C raises KeyboardInterrupt here; a rank that is not the first leaves that to rank 0
    forced: bool = False  # it has come
    _since: float = 0.0  # when the signal before came

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

    @contextmanager
    def ending_at_once(self, out: Callable[[], Path], abort: Callable[[str], None]) -> Iterator[None]:
        """The KeyboardInterrupt of a second Ctrl-C becomes Stopped; `abort` is given its message before. A thread may still write rows."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.forced:
                raise
            failure = stopped(out(), "ended at once")
            abort(f"{failure}\n")
            raise failure from None

    def _note(self, number: int, _: Any) -> None:
        """Called between two steps of the main thread, which may be in the middle of a print; so another thread prints."""
        before, self._since = self._since, time.monotonic()
        if not self.signalled:
            self.signalled = True
            if self.say:
                _thread.start_new_thread(self.say, (self.stopping,))
        elif number == signal.SIGINT and self._since - before > AGAIN:
            if self.forced and parent_process() is None:  # a worker of a sweep gets one from the terminal and one from the sweep
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            first, self.forced = not self.forced, True
            if first and self.raises:
                raise KeyboardInterrupt


def stopped(out: Path, how: str = "stopped") -> Stopped:
    """The message of a run that was stopped. `fedsim batch`, on the machine of rank 0, sees by a file of its own that it was."""
    if note := os.environ.get("FEDSIM_STOP_NOTE"):
        with suppress(OSError):
            Path(note).touch()
    if not out.exists():
        return Stopped(f"{how} before the first round; the same command starts the run")
    return Stopped(f"{how}; {out} holds all complete rounds, and the same command goes on from there")
