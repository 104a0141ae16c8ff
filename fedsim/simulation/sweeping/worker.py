"""The processes of a sweep: one has imported what a run needs, the workers are forked from it, and each does one run after the other."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

from fedsim.config.job import Job
from fedsim.errors import BadInput, NoRoom, Stopped
from fedsim.simulation import launch
from fedsim.simulation.launchers.first_signals import SIGNALS
from fedsim.storage.reader import RunReader

AGAIN = "the same command goes on from there"
GRACE = 20.0  # seconds that a worker is left to end by itself
SERVER: Any = forkserver._forkserver  # Python's own, which it lets nobody stop otherwise


@dataclass(frozen=True)
class Run:
    """One of the sweep's runs, and where it is written."""

    job: Job
    out: Path

    @property
    def name(self) -> str:
        return self.job.name


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code of `fedsim run`, and what it said when that is not 0."""

    code: int
    message: str = ""
    seconds: float = 0.0
    already: bool = False  # it had been finished before

    @property
    def full(self) -> bool:
        """Whether the disk was full."""
        return self.code == 3 and self.message.startswith(NoRoom.BEGINS)


class Nest:
    """The process that workers are forked from: it has imported what a run needs, and has no threads. It ends with the sweep.

    Another fork server of this process, of whoever called, is used as it is: then each worker imports by itself.
    """

    def __init__(self) -> None:
        self.context = get_context("forkserver")
        self._ours = SERVER._forkserver_pid is None
        self._others = SERVER._preload_modules
        if self._ours:
            self.context.set_forkserver_preload([__name__])

    def close(self) -> None:
        """Ends the process, once its workers have ended: a later sweep may begin with other variables."""
        if self._ours:
            SERVER._stop()
            self.context.set_forkserver_preload(self._others)


class Worker:
    """A process that carries out the runs it is sent, seen from the process that sends them."""

    run: Run
    dead = forced = False  # forced: it has been told to end at once

    def __init__(self, nest: Nest, with_script: bool) -> None:
        resource_tracker.ensure_running()  # which unblocks signals when it is started
        self.pipe, theirs = nest.context.Pipe()
        self.process = nest.context.Process(target=serve, args=(theirs,), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with nullcontext() if with_script else _script_hidden():
            self.process.start()  # deaf until it can hear: Ctrl-C reaches every process of a terminal, and this one has no handler yet
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, run: Run) -> None:
        self.run = run
        with suppress(BrokenPipeError):  # it is dead, which `outcome` tells
            self.pipe.send(run)

    def stop(self, at_once: bool) -> None:
        """at_once: without its pack in flight, once; a Ctrl-C in a terminal may have reached it already."""
        self.process.terminate()
        if at_once and not self.forced and self.process.pid:
            os.kill(self.process.pid, signal.SIGINT)
        self.forced |= at_once

    def outcome(self, stopping: bool) -> Outcome:
        """How its run ended; when the process died with it, what became of that."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.end()
            self.dead = True
            return Outcome(3) if stopping else Outcome(1, f"lost: its process {self._death()}; its checkpoint stands, and {AGAIN}")

    def _death(self) -> str:
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self) -> None:
        self.pipe.close()
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()


@contextmanager
def _script_hidden() -> Iterator[None]:
    """A process that starts meanwhile does not import the script of this one: the script needs no `if __name__ == "__main__":`."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def serve(pipe: Connection) -> None:
    """A worker's life: one run after the other, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a run listens; the process that sends the runs says when to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_done(pipe.recv()))


def _end_with_parent() -> None:
    """Stops the run in flight when the process that sent it was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _done(run: Run) -> Outcome:
    """Carries out a run and keeps what it says."""
    began, said = time.perf_counter(), io.StringIO()
    already = False
    try:
        already = finished(run.out)
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            code, message = launch.main(run.job, run.out, "auto"), said.getvalue().strip()
    except BadInput as error:
        code, message = 2, str(error)
    except Stopped:
        code, message = 3, ""
    except Exception:
        code, message = 1, traceback.format_exc().strip()
    return Outcome(code, message if code else "", time.perf_counter() - began, already)


def finished(out: Path) -> bool:
    return out.exists() and bool(RunReader(out, time.sleep).attributes["finished"])
