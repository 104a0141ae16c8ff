"""Whether a run is to stop: a signal or a time limit."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")  # a launcher of MPI ranks sets one of them
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class StopSignal:
    """Whether the run is to stop: a signal came, or its time is over."""

    limit: float | None = None  # seconds
    signalled: bool = False
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return self.signalled or (self.limit is not None and time.monotonic() - self.began > self.limit)

    def listen(self) -> None:
        for name in SIGNALS:
            signal.signal(name, self._told)

    def _told(self, *_: Any) -> None:
        self.signalled = True
