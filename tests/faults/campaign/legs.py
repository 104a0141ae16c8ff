"""One leg of a run, from its start until it is done or killed: on ranks under mpirun, or alone in a process that is warm already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from processes import MPIRUN, Ended, Running, _processes, _read

PATIENCE = 90.0  # seconds after which a leg counts as hung, and is ended
LOOK = 0.005
WARM = ("fedsim.cli.commands", "fedsim.simulation.launch", "fedsim.fleet.serial", "campaign.jobs")


STARTED: list[Leg] = []  # all that this campaign has started


@dataclass
class Leg:
    """A command that runs in a session of its own."""

    run: Path
    folder: Path
    session: int
    poll: Callable[[], int | None]
    ranks: int  # 0: alone, without mpirun
    began: float

    def __post_init__(self) -> None:
        STARTED.append(self)

    def members(self) -> list[int]:
        """All living processes of the session."""
        return [pid for pid, session, state in _processes() if session == self.session and state != "Z"]

    def rank(self, number: int) -> int | None:
        """The process of a rank; None before it has begun. The process that watches beside it began later."""
        if not self.ranks:
            return self.session
        mark = b"OMPI_COMM_WORLD_RANK=%d" % number
        return min((pid for pid in self.members() if mark in _read(pid, "environ").split(b"\0")), default=None)

    def kill(self, pids: list[int]) -> float:
        """Kills these processes; the instant."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def ended(self, within: float = PATIENCE) -> Ended | None:
        """Waits until the command and all its processes have ended; None where they have not: then they are ended."""
        give_up = time.monotonic() + within
        while self.poll() is None or self.members():
            if time.monotonic() > give_up:
                self.kill(self.members())
                return None
            time.sleep(LOOK)
        return Ended(self.poll() or 0, *((self.folder / name).read_text(errors="replace") for name in ("out.txt", "err.txt")))


def end_all() -> None:
    """Ends whatever a case has left running."""
    for leg in STARTED:
        leg.kill(leg.members())


def on_ranks(run: Path, job: str, ranks: int, *more: str, through: tuple[str, ...] = (), log: Path | None = None) -> Leg:
    """`mpirun -n RANKS fedsim run JOB.toml --out RUN …`. through: words before the command of a rank. log: for its output."""
    folder = log or run.parent
    shared = ("--mca", "btl_sm_backing_directory", str(folder))  # what killed ranks leave there is removed with the folder
    command = [str(MPIRUN), *shared, "-n", str(ranks), *through, sys.executable, "-m", "fedsim", *words(run, job, more)]
    began = time.monotonic()
    running = Running(folder, command, run)
    return Leg(run, folder, running.process.pid, running.process.poll, ranks, began)


def under(run: Path, job: str, ranks: int, before: tuple[str, ...], log: Path | None = None) -> Leg:
    """A leg all of whose processes are started by the words `before`; 0 ranks: without mpirun, and not warm."""
    if ranks:
        return on_ranks(run, job, ranks, through=before, log=log)
    return started(log or run.parent, [*before, sys.executable, "-m", "fedsim", *words(run, job, ())], run)


def started(folder: Path, command: list[str], run: Path) -> Leg:
    """Any command that writes the run file, without mpirun."""
    began = time.monotonic()
    running = Running(folder, command, run)
    return Leg(run, folder, running.process.pid, running.process.poll, 0, began)


def words(run: Path, job: str, more: tuple[str, ...]) -> list[str]:
    return ["run", str(run.with_name(f"{job}.toml")), "--out", str(run), *more]


def alone(run: Path, job: str, *more: str, before: Callable[[], object] | None = None, log: Path | None = None) -> Leg:
    """`fedsim run JOB.toml --out RUN …` in a process that is forked from one that has imported everything.

    before: called in the process first; a function of a module, with `functools.partial` where it has arguments.
    """
    began = time.monotonic()
    process: ForkServerProcess = _server().Process(target=_alone, args=(log or run.parent, words(run, job, more), before))
    process.start()
    assert process.pid is not None
    while process.exitcode is None and _session_of(process.pid) != process.pid:
        time.sleep(0.001)
    return Leg(run, log or run.parent, process.pid, lambda: process.exitcode, 0, began)


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    return context


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _alone(folder: Path, arguments: list[str], before: Callable[[], object] | None) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    if before is not None:
        before()
    from fedsim.cli import entry

    sys.argv = ["fedsim", *arguments]
    entry.main()
