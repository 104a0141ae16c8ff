"""The first rank of a node: it listens from the first instant, imports what all need, and forks the others."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.simulation.launchers import watch
from fedsim.simulation.launchers.forking import place
from fedsim.simulation.launchers.forking.message import peer, receive, send
from fedsim.simulation.launchers.forking.stand_in import open_files

LATE = 0.5  # seconds that others may come after all is imported
ANSWER = 5.0  # seconds in which another rank must say what it has; it asks only when it is ready
HIGH = 512  # file numbers from here on are free for a moment

_door: socket.socket | None = None  # where others ask; None where nobody may
_mine: list[int] = []  # open files that the launcher gave to this rank
_link: socket.socket | None = None  # to the stand-in of this rank, where it was forked


def listen() -> None:
    """Lets the other ranks of this node ask from now on."""
    global _door
    _mine.extend(number for number in open_files() if number != watch.line())
    door = socket.socket(socket.AF_UNIX)
    try:
        door.bind(place.address())
        door.listen(place.ranks_here())
        _door = door
    except OSError:  # another process has the address
        door.close()


def share(modules: Sequence[str]) -> None:
    """Imports the modules and forks the ranks that ask. Returns in each of them, as in this one. Does nothing where nobody may ask."""
    global _door
    door, _door = _door, None
    if door is None:
        return
    import_module("numpy")
    threads = _threads()
    for name in modules:
        import_module(name)
    guests = _guests(door) if _threads() == threads else []
    door.close()
    gc.freeze()  # what is there stays: the collector would write to it, and memory that is written to is no longer shared
    sys.stdout.flush()
    sys.stderr.flush()
    while guests:
        guest = guests.pop()
        if _forked(guest):
            for other in guests:
                other.close()
            return
        guest.close()


def tell(code: object) -> None:
    """Tells the stand-in of this rank the exit code: it may not see how the rank ended, where the first rank has ended before."""
    if _link is not None and isinstance(code, int):
        with suppress(OSError):
            send(_link, {"code": code})


def _threads() -> int:
    """How many threads this process has. A fork copies the calling one alone; numpy's OpenBLAS starts its own anew in the copy."""
    return len(list(Path("/proc/self/task").iterdir()))


def _guests(door: socket.socket) -> list[socket.socket]:
    """The ranks that have asked."""
    guests, give_up = list[socket.socket](), time.monotonic() + LATE
    while len(guests) < place.ranks_here() - 1:
        door.settimeout(max(give_up - time.monotonic(), 0.001))
        try:
            guest, _ = door.accept()
        except TimeoutError:
            break
        if peer(guest)[1] == os.getuid():
            guest.settimeout(ANSWER)
            guests.append(guest)
    return guests


def _forked(guest: socket.socket) -> bool:
    """Forks a rank; True in that rank. It begins when its stand-in lets it."""
    try:
        request, files = receive(guest)
    except (OSError, EOFError, ValueError):
        return False
    numbers = request["files"]
    taken = set(open_files()) - {*_mine, *files, guest.fileno(), watch.line()}
    if len(files) != len(numbers) or taken & set(numbers) or _fork():
        for each in files:
            os.close(each)
        return False
    try:
        _become(guest, request, files)
    except BaseException:
        os._exit(1)
    return True


def _fork() -> int:
    """As os.fork; another process where no further one is allowed here."""
    try:
        return os.fork()
    except OSError:
        return -1


def _become(guest: socket.socket, request: dict[str, Any], files: Sequence[int]) -> None:
    """Makes this process the rank that asked: its process group, processors, variables and files."""
    global _link
    os.setpgid(0, request["group"])
    os.sched_setaffinity(0, request["processors"])
    _link = socket.socket(fileno=fcntl.fcntl(guest.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH))
    _link.settimeout(ANSWER)
    guest.close()
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, HIGH) for each in files]
    for each in {*_mine, *files, *watch.forget()}:
        os.close(each)
    for each, number in zip(high, request["files"], strict=True):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["variables"])
    send(_link, {"process": os.getpid()})
    if not receive(_link)[0]["go"]:
        os._exit(1)
