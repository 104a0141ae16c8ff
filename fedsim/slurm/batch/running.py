"""The launcher as a process: it is started, gets the signals of this process, and is waited for."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

from fedsim_analysis.foreign_text import printable

from fedsim.simulation.launchers import first_signals

AGAIN = 10.0  # seconds; mpirun loses a signal that comes before its ranks exist, so it is sent again
PR_SET_PDEATHSIG = 1


class Running:
    """The ranks of a run. A signal to this process asks them to end their packs and stop."""

    def __init__(self) -> None:
        self.warned = ""  # the name of the signal that came first
        self.process: subprocess.Popen[bytes] | None = None

    def listen(self, before: bool) -> None:
        """Hears signals for the rest of this process, those too that came earlier. before: the shell that began the job heard one."""
        for name in first_signals.SIGNALS:
            signal.signal(name, self._heard)
        signal.signal(signal.SIGALRM, self._again)
        if number := first_signals.first() or (signal.SIGUSR1 if before else 0):
            self._heard(number, None)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int | None:
        """The exit code, negative for a signal that ended the launcher itself; None where a signal came first and nothing was started.

        Raises OSError.
        """
        if self.warned:
            return None
        self.process = subprocess.Popen(command, env=dict(environment), preexec_fn=_ends_with_this_process(os.getpid()))
        self._again()  # one may have come meanwhile, when there was no process yet
        code = self.process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return code

    def _heard(self, number: int, _: FrameType | None) -> None:
        if not self.warned:
            self.warned = signal.Signals(number).name
            say(f"{self.warned} came; the run stops when the packs that run now are done")
        self._pass_on()

    def _again(self, *_: object) -> None:
        if self.warned:
            self._pass_on()

    def _pass_on(self) -> None:
        """As SIGUSR1, whatever came: mpirun and srun end their ranks at once on SIGTERM, and hand them SIGUSR1."""
        if self.process:
            self.process.send_signal(signal.SIGUSR1)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)


def say(message: str) -> None:
    """One line in the output of the job. By a system call of its own: a handler of signals says it too."""
    with suppress(OSError):  # nobody can read it any more
        os.write(2, f"fedsim batch: {printable(message)}\n".encode(errors="backslashreplace"))


def _ends_with_this_process(parent: int) -> Callable[[], None]:
    """For the new process: SIGTERM when this one is killed, so that no rank outlives it."""
    system = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        system.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return prepare
