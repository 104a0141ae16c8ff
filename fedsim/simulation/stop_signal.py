"""Whether a run is to stop: a signal or a time limit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class StopSignal:
    """Whether the run is to stop: a signal came, or its time is over."""

    limit: float | None = None  # seconds
    signalled: bool = False
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return self.signalled or (self.limit is not None and time.monotonic() - self.began > self.limit)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals stop the run meanwhile; afterwards they do again what they did. Only a main thread can listen to signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self._note) for name in SIGNALS}
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
