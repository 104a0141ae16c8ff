"""The process that the launcher started, where the rank itself was forked from another one: it stands for the rank.

It hands on signals and ends as the rank ends. Where it ends first, killed, the process that watches it ends the rank
(`launchers/watch.py`), which also stops and continues the rank with it.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.simulation.launchers import first_signals, watch
from fedsim.simulation.launchers.forking import place
from fedsim.simulation.launchers.forking.message import peer, receive, send

PATIENCE = 2.0  # seconds until the first rank of the node must listen, which began at the same time
AGAIN = 0.02  # seconds between two attempts
EXIT_CODE = 49  # the last field of /proc/PROCESS/stat, after the name
SIGNALS = (*first_signals.SIGNALS, signal.SIGHUP, signal.SIGQUIT)


def stand_in() -> None:
    """Has the first rank of this node fork this rank, stands for it and ends with it. Returns where this rank must start by itself."""
    link = _connected()
    if link is None:
        return
    with link:
        process = _handed_over(link)
        if process is not None:
            _stand(process, link)


def _connected() -> socket.socket | None:
    """A line to the first rank, where that is this user's and stands in the same place."""
    link, give_up = socket.socket(socket.AF_UNIX), time.monotonic() + PATIENCE
    while True:
        try:
            link.connect(place.address())
            break
        except OSError:
            if time.monotonic() > give_up:
                link.close()
                return None
            time.sleep(AGAIN)
    process, user = peer(link)
    with suppress(OSError):
        if user == os.getuid() and place.of(process) == place.of(os.getpid()):
            return link
    link.close()
    return None


def _handed_over(link: socket.socket) -> int | None:
    """The process that was forked with the variables and files of this one; None where it was not."""
    files = [number for number in open_files() if number not in (link.fileno(), watch.line())]
    request = {
        "variables": dict(os.environ),
        "group": os.getpgid(0),
        "processors": sorted(os.sched_getaffinity(0)),
        "files": files,
    }
    try:
        send(link, request, files)
        return receive(link)[0]["process"]
    except (OSError, EOFError, ValueError):
        return None


def open_files() -> list[int]:
    """Numbers of all open files of this process."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - before anything is imported
    return sorted(number for number in numbers if _is_open(number))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # the folder itself, closed since
        return False
    return True


def _stand(process: int, link: socket.socket) -> None:
    """Lets the rank go on, and ends as it ends. Returns where nobody can watch: then the rank has ended before it began."""
    try:
        ends = os.pidfd_open(process)
        watch.stands_for(process)
    except OSError:
        return

    def hand_on(name: int, _: Any) -> None:
        with suppress(OSError):  # it has ended
            signal.pidfd_send_signal(ends, name)

    for name in SIGNALS:
        signal.signal(name, hand_on)
    for number in first_signals.all_noted():
        hand_on(number, None)
    send(link, {"go": True})
    look = select.poll()
    look.register(ends)
    look.poll()
    _end(_status(process), link)


def _status(process: int) -> int | None:
    """How a process has ended, as `wait` tells; None where nobody knows any more, since its parent has ended too."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[EXIT_CODE])
    except OSError:
        return None


def _end(status: int | None, link: socket.socket) -> None:
    """Ends this process as the rank has ended; where nobody knows how, by the exit code that the rank told, or else as one killed."""
    told = None
    if status is None:
        with suppress(OSError, EOFError):
            told = int(receive(link)[0]["code"])
    if told is None and (name := 9 if status is None else os.WTERMSIG(status)):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has left one
        if name != 9:  # which nothing can hear
            signal.signal(name, signal.SIG_DFL)
        os.kill(os.getpid(), name)
    os._exit(os.WEXITSTATUS(status or 0) if told is None else told)
