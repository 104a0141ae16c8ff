"""A rank whose launcher was killed ends at once, also in the middle of an import or of MPI_Init.

A process of its own watches: a thread could not end the rank while a library is loaded or MPI starts, which hold Python's lock for
seconds. The kernel's own way (PR_SET_PDEATHSIG) would end ranks whose launcher only ends the thread that started them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

from fedsim.simulation.launchers.first_signals import SIGNALS
from fedsim.simulation.launchers.parent import Launcher, nearest, server_is_gone
from fedsim.simulation.launchers.ranks import launched

LOOK = 500  # milliseconds between two looks at the launcher
NAME = "fedsim-watch"  # of the process that watches


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


def _start(launcher: Launcher) -> None:
    rank = os.getpid()
    ended, _held = os.pipe()  # this process holds the other end as long as it lives
    if os.fork():
        os.close(ended)
        return
    try:
        _prepare(ended)
        _watch(launcher, rank, ended)
    finally:
        os._exit(0)


def _prepare(ended: int) -> None:
    """Signals are meant for the rank, and so are its files: a launcher waits until nobody holds the output of a rank."""
    for name in (*SIGNALS, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    for each in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if each not in (ended, 2):
            with suppress(OSError):
                os.close(each)
    Path("/proc/self/comm").write_text(NAME)


def _watch(launcher: Launcher, rank: int, ended: int) -> None:
    """Until the rank ends, or the launcher does and the rank with it."""
    look = select.poll()
    look.register(ended)
    while not look.poll(LOOK) and os.getppid() == rank:
        if not launcher.lives():
            with suppress(OSError):
                os.write(2, f"{_message(f'{launcher.name} (process {launcher.process})')}\n".encode())
            os.kill(rank, signal.SIGKILL)
            return


def _message(who: str) -> str:
    return f"{who} that started this rank has ended; the rank ends too"
