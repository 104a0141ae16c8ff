"""A rank whose launcher was killed ends at once, also in the middle of an import or of MPI_Init.

So does one that waits in MPI_Init for another rank that has ended before: MPICH, Intel MPI and `srun` leave the others waiting for ever.

A process of its own watches: a thread could not end the rank while a library is loaded or MPI starts, which hold Python's lock for
seconds. The kernel's own way (PR_SET_PDEATHSIG) would end ranks whose launcher only ends the thread that started them.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.simulation.launchers.first_signals import SIGNALS
from fedsim.simulation.launchers.parent import Launcher, is_stopped, lacks_ranks, nearest, server_is_gone
from fedsim.simulation.launchers.ranks import launched, rank

LOOK = 500  # milliseconds between two looks at the launcher
NAME = "fedsim-watch"  # of the process that watches
PATIENCE = 8  # looks, until a rank that ended before MPI had started ends the others: they may be about to end by themselves
SESSION = "PMIX_SERVER_TMPDIR"  # the folder of the launcher, as Open MPI 5 tells its ranks
LOST = "another rank has ended before MPI had started; the run ends"
PIPE = 4096  # bytes that a pipe takes at once
STANDS_FOR = "stands for process "  # begins what a stand-in (launchers/forking) tells; no message begins so
_line: int | None = None  # where this process writes to the one that watches; None where nobody does


def begin() -> None:
    """Watches the launcher of this rank from now on. Does nothing in a process that no launcher of ranks started."""
    if not launched():
        return
    launcher = nearest(os.getppid())
    if server_is_gone():  # asked after `nearest`: this rank may have another parent by now, which launched something else
        sys.exit(_message("the launcher"))
    if launcher:
        with suppress(OSError):  # no further process is allowed here: then nobody watches
            _start(launcher)


@contextmanager
def expecting_no_end(message: str) -> Iterator[None]:
    """Where this rank's process ends inside, the process that watches writes `message`: MPI ends it without asking Python."""
    _tell(message)
    try:
        yield
    finally:
        _tell("")


def line() -> int | None:
    """The open file by which this process tells the one that watches."""
    return _line


def forget() -> list[int]:
    """In a rank that was forked from another one, which is watched itself: what it no longer needs open. Its stand-in is watched."""
    global _line
    files, _line = [] if _line is None else [_line], None
    return files


def stands_for(process: int) -> None:
    """This process stands for another one, which ends, stops and goes on with it. OSError where nobody watches."""
    if _line is None:
        raise OSError("no process watches this one")
    os.write(_line, f"{STANDS_FOR}{process}\n".encode())


def _tell(message: str) -> None:
    """Lets the watching process know what to write should this one end now; an empty line: MPI has started."""
    if _line is not None:
        with suppress(OSError):  # the watching process was killed
            os.write(_line, f"{' '.join(message.split())}\n".encode()[:PIPE])


def _start(launcher: Launcher) -> None:
    global _line
    process = os.getpid()
    pipe, _line = os.pipe()  # this process holds the other end as long as it lives
    if os.fork():
        os.close(pipe)
        return
    other = Other()
    try:
        _prepare(pipe)
        _watch(launcher, process, pipe, other)
        other.end()
        _remove_session(launcher)
    finally:
        os._exit(0)


def _prepare(pipe: int) -> None:
    """Signals are meant for the rank, and so are its files: a launcher waits until nobody holds the output of a rank."""
    for name in (*SIGNALS, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    for each in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if each not in (pipe, 2):
            with suppress(OSError):
                os.close(each)
    Path("/proc/self/comm").write_text(NAME)


class Other:
    """The process that the watched one stands for, if any: it stops, goes on and ends with that."""

    def __init__(self) -> None:
        self.process: int | None = None  # a file that names it, also when its number is another's
        self.held = False  # stopped here

    def begin(self, line: str) -> None:
        with suppress(OSError):  # it has ended
            self.process = os.pidfd_open(int(line.removeprefix(STANDS_FOR)))

    def follow(self, process: int) -> None:
        """Stops it where the watched process is stopped, and has it go on with that. Where it has ended, the watched one is to end too."""
        stands = self.process is not None and is_stopped(process)
        if stands and self._has_ended():
            os.kill(process, signal.SIGCONT)
        elif stands != self.held:
            self._send(signal.SIGSTOP if stands else signal.SIGCONT)
            self.held = stands

    def end(self) -> None:
        self._send(signal.SIGKILL)

    def _has_ended(self) -> bool:
        look = select.poll()
        look.register(self.process if self.process is not None else -1)
        return bool(look.poll(0))

    def _send(self, name: signal.Signals) -> None:
        if self.process is not None:
            with suppress(OSError):  # it has ended
                signal.pidfd_send_signal(self.process, name)


def _watch(launcher: Launcher, process: int, pipe: int, other: Other) -> None:
    """Until the rank ends, or its launcher does and the rank with it, or another rank before MPI has started."""
    look, line, starting, lacking = select.poll(), b"", True, 0
    look.register(pipe)
    while os.getppid() == process:
        other.follow(process)
        if look.poll(LOOK):
            if not (more := os.read(pipe, PIPE)):
                break
            line = more.splitlines()[-1]
            starting = bool(line)
            if line.startswith(STANDS_FOR.encode()):
                other.begin(line.decode())
                line = b""
        elif not launcher.lives():
            _end(process, _message(f"{launcher.name} (process {launcher.process})"))
            return
        elif starting and lacks_ranks(launcher):
            if (lacking := lacking + 1) > PATIENCE:
                _end(process, "" if rank() else LOST)
                return
        else:
            lacking = 0
    if line and not rank() and launcher.lives():
        _write(line.decode())


def _end(process: int, message: str) -> None:
    _write(message)
    os.kill(process, signal.SIGTERM)  # one that only waits to say what rank 0 has said goes without a word
    time.sleep(LOOK / 1000)
    if os.getppid() == process:
        os.kill(process, signal.SIGKILL)


def _remove_session(launcher: Launcher) -> None:
    """Removes the folder that Open MPI 5 leaves where its launcher was killed.

    It is named by the launcher's process. A later launcher with the same process number does not start while the folder is there
    (`findings/openmpi_does_not_start_beside_what_a_killed_one_left.sh`).
    """
    folder = os.environ.get(SESSION, "")
    if folder.endswith(f".{launcher.process}") and not launcher.lives():
        shutil.rmtree(folder, ignore_errors=True)


def _write(message: str) -> None:
    if message:
        with suppress(OSError):
            os.write(2, f"{message}\n".encode())


def _message(who: str) -> str:
    return f"{who} that started this rank has ended; the rank ends too"
