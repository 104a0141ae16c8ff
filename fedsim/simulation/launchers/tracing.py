"""`fedsim run --trace FILE`: what every rank did when, in the trace event format that Perfetto and Chrome show.

Every rank notes its spans (`fedsim/core/trace.py`) and sends them to rank 0 when the run has ended or was stopped. Clocks of several
machines are as far apart as their system clocks are.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.core import trace
from fedsim.errors import BadInput, Stopped
from fedsim.simulation.launchers.agreement import write_error
from fedsim.simulation.resume import host

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator

Event = dict[str, Any]
BEGINNING = '{"traceEvents"'  # of such a file
MICRO = 1e6  # microseconds of a second
BESIDE = 1  # number of the thread that writes the run file; 0 is the main one


@contextmanager
def tracing(out: Path | None, communicator: Communicator | None) -> Iterator[None]:
    """Notes what this rank does, and has rank 0 write what all did; nothing where `out` is None."""
    if out is None:
        yield
        return
    began = time.time() - time.perf_counter()  # what turns the clock of this process into that of the machine
    mine = trace.begin(time.perf_counter)
    together = False
    try:
        yield
        together = True
    except (BadInput, Stopped):  # which all ranks raise
        together = True
        raise
    finally:
        trace.end()
        events = _events(mine, began, communicator.rank if communicator else 0)
        if communicator and together:
            events = communicator.gathered(events)
        if not (communicator and communicator.rank):
            _write(out, events)


def refuse_foreign(trace_file: Path, out: Path) -> None:
    """BadInput where the trace cannot be written there, or would replace another file than a trace."""
    if trace_file.absolute() == out.absolute():
        raise BadInput(f"--trace {trace_file}: this is the run file; give the trace a name of its own, such as {out.with_suffix('.json')}")
    if trace_file.is_dir():
        raise BadInput(f"--trace {trace_file}: this is a folder; give a file, such as {trace_file / 'trace.json'}")
    if not trace_file.parent.is_dir():
        raise BadInput(f"--trace {trace_file}: there is no folder {trace_file.parent}")
    place, needed = (trace_file, os.R_OK | os.W_OK) if trace_file.exists() else (trace_file.parent, os.W_OK)
    if not os.access(place, needed):
        raise BadInput(f"--trace {trace_file}: no permission to write there")
    if trace_file.exists() and not _is_trace(trace_file):
        raise BadInput(f"--trace {trace_file}: this file is no trace, and is not replaced; give another name")


def _is_trace(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) in (b"", BEGINNING.encode())


def _events(noted: trace.Trace, began: float, rank: int) -> list[Event]:
    """The spans of this rank, and what the viewer is to call it."""
    events: list[Event] = [
        _name("process_name", f"rank {rank} on {host()}{', the server' if rank == 0 else ''}", rank),
        _name("thread_name", "rounds" if rank == 0 else "clients", rank),
    ]
    if any(span.thread == "beside" for span in noted.spans):
        events.append(_name("thread_name", "beside", rank, BESIDE))
    if noted.left_out:
        events.append(_name("process_labels", f"{noted.left_out:,} later spans are left out", rank))
    for span in noted.spans:
        times = {"ts": round(MICRO * (span.begin + began), 1), "dur": round(MICRO * span.seconds, 1)}
        thread = BESIDE if span.thread == "beside" else 0
        events.append({"name": span.name, "ph": "X", **times, "pid": rank, "tid": thread, "args": span.about})
    return events


def _name(what: str, text: str, rank: int, thread: int = 0) -> Event:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"labels" if what == "process_labels" else "name": text}}


def _write(out: Path, events: list[Event]) -> None:
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    moved = [event | {"ts": round(event["ts"] - first, 1)} if "ts" in event else event for event in events]
    try:
        out.write_text(BEGINNING + f': {json.dumps(moved)}, "displayTimeUnit": "ms"}}\n')
    except OSError as error:  # the run is worth more than its trace
        write_error(f"the trace {out} is not written: {error.strerror}\n")
