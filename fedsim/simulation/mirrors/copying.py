"""The process of a mirror: `python -m fedsim.simulation.mirrors.copying NAME RUN.h5 REPLY`.

Its standard input is told by rank 0 which rows stand in the run file, "begin R" once and then "row R"; the end of the input is the end of
the run, however that came. It answers on the file descriptor REPLY with a line of JSON: that the library is there, or why it stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.simulation.mirrors.names import PLACES
from fedsim.simulation.mirrors.rows import described, rows
from fedsim.simulation.mirrors.tracker import Opening, Tracker

PATIENCE = 20.0  # seconds that the process of a run that was just killed has to end
PAUSE = 0.25  # seconds between two looks at the run file, each of which takes 10 ms: short rounds are copied several at a time
CHUNK = 1000  # rows that are copied before the tracker is flushed
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # they are meant for the run


def main(name: str, out: Path, reply: int) -> int:
    """Copies until the input ends; the exit code."""
    for each in IGNORED:
        signal.signal(each, signal.SIG_IGN)
    os.nice(5)
    place = PLACES[name]
    try:
        opening: Opening = getattr(import_module(f"fedsim.simulation.mirrors.{place.module}"), place.kind)
    except Exception as error:  # a library that is broken raises what it will
        _answer(reply, missing=f"{type(error).__name__}: {error}")
        return 2
    _answer(reply, ready=True)
    try:
        alone = _alone(out, name)
        _copy(opening, place.path(out), out)
        alone.close()
    except Exception as error:  # whatever a tracker raises
        _answer(reply, failed=_reason(error))
        return 1
    _answer(reply, done=True)
    return 0


def _copy(opening: Opening, target: Path, out: Path) -> None:
    tracker: Tracker | None = None
    for done, last in _orders():
        tracker = tracker or opening(target, described(out), done, out)
        for first in range(tracker.last + 1, last + 1, CHUNK):
            for r, row in rows(out, first, min(last, first + CHUNK - 1)):
                tracker.write(r, row)
            tracker.flush()
    if tracker is not None:
        tracker.close(described(out))


def _orders() -> Iterator[tuple[int, int]]:
    """(the last round whose row was valid at the start, the last round whose row is), each time when it is told of more."""
    rest, done = b"", -1
    while part := os.read(0, 1 << 16):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            word, number = line.split()
            done = int(number) if word == b"begin" else done
        if lines:
            yield done, int(lines[-1].split()[1])
            time.sleep(PAUSE)


def _alone(out: Path, name: str) -> socket.socket:
    """Held by one process of this machine at a time, and given back by the kernel when it ends."""
    held, began = socket.socket(socket.AF_UNIX), time.monotonic()
    address = f"\0fedsim-mirror-{hashlib.sha256(f'{out.resolve()} {name}'.encode()).hexdigest()[:40]}"
    while True:
        try:
            held.bind(address)
            return held
        except OSError:
            if time.monotonic() - began > PATIENCE:
                raise RuntimeError("another process still writes there") from None
            time.sleep(0.1)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _answer(reply: int, **facts: Any) -> None:
    with suppress(OSError):  # nobody may be there any more
        os.write(reply, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
