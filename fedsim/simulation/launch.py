"""How a run is started and how it ends: ranks, signals, resume, and errors that all ranks agree on.

`run` raises BadInput, Stopped or, without other ranks, ClientFault; `main` turns them into the exit codes of the command line: 0 done,
1 fault, 2 bad input, 3 stopped. A fault under an MPI launcher ends all ranks, lest one waits for another for ever.
"""

from __future__ import annotations

import os
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from fedsim.config.job import Job
from fedsim.core.trace import span
from fedsim.errors import BadInput, CannotWrite, ClientFault, MethodFault, SilentRanks, Stopped
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import make_fleet
from fedsim.simulation import malloc
from fedsim.simulation.checking import longer
from fedsim.simulation.devices.clock import add_clock
from fedsim.simulation.devices.forecast import refuse_hopeless
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.finished_round import Callback
from fedsim.simulation.launchers.agreement import CODES, abort, agreed, code_of, ending_all_ranks, refuse_unlike, write_error
from fedsim.simulation.launchers.alike import software
from fedsim.simulation.launchers.belonging import refuse_lonely_ranks, started_library
from fedsim.simulation.launchers.parent import nearest
from fedsim.simulation.launchers.ranks import launched, refuse_lonely_tasks
from fedsim.simulation.launchers.silence import Silence
from fedsim.simulation.launchers.tracing import refuse_foreign, tracing
from fedsim.simulation.loop import RoundWriter, simulate
from fedsim.simulation.mirrors.sender import Mirror
from fedsim.simulation.planning.idle_fleet import idle_fleet
from fedsim.simulation.planning.plan import resolve, unlike
from fedsim.simulation.progress import Progress, output
from fedsim.simulation.resume import RunStart, find_start, host
from fedsim.simulation.stop_signal import StopSignal, stopped
from fedsim.storage.places.presence import writing
from fedsim.storage.places.scratch import Scratch, copied_back, expanded, recover
from fedsim.storage.reader import RunReader
from fedsim.storage.run_lock import Lease, followed, holding

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator


@dataclass(frozen=True)
class Observer:
    """Who follows a run on rank 0: where progress is printed, what sees each finished round, and what gets an error before ranks end."""

    console: Console | None = None  # None: the output of the process
    callback: Callback | None = None
    report: Callable[[Exception], None] = lambda error: None
    summary: bool = False  # whether the summary of the run file is printed at the end
    trace: Path | None = None  # a file for what every rank did when


def main(job: Job, out: Path, resume: str, origin: object = "", trace: Path | None = None, first: Path | None = None) -> int:
    """Runs the job on this rank for the command line; the exit code. A BadInput or Stopped before the first round is raised on rank 0.

    origin: how messages name the job. trace: a file for what every rank did when. first: a finished run of fewer rounds to go on from.
    """
    communicator, reported = connect(), list[Exception]()

    def report(error: Exception) -> None:
        reported.append(error)
        write_error(f"{origin}: {error}\n" if origin and isinstance(error, BadInput) else f"{error}\n")

    try:
        run(job, out, resume, communicator, Observer(report=report, summary=True, trace=trace), first)
    except (BadInput, Stopped) as error:
        if reported or (communicator and communicator.rank):
            return code_of(error)
        raise
    except ClientFault:
        return 1
    return 0


def run(job: Job, out: Path, resume: str, communicator: Communicator | None, observer: Observer, first: Path | None = None) -> None:
    """Runs the job on this rank until it is done, on all ranks alike. Raises BadInput, Stopped, and ClientFault where there is one rank."""
    torch.set_num_threads(job.execution.threads)
    malloc.hold()
    worker = bool(communicator and communicator.rank)
    stop = _stop_signal(communicator, job.execution.limit, observer)
    finished = stop.ending_at_once(lambda: out, lambda message: abort(communicator, message, 3) if communicator else None)
    with ExitStack() as held, stop.listening(), ending_all_ranks(communicator), finished:
        agreed(communicator, lambda: stop.refuse_to_begin(out))
        out = agreed(communicator, lambda: out if worker else followed(out))
        if trace := observer.trace:
            agreed(communicator, lambda: None if worker else refuse_foreign(trace, out))
            held.enter_context(tracing(trace, communicator))
        refuse_unlike(communicator, software())
        lease = agreed(communicator, lambda: None if worker else held.enter_context(_held(out, stop, observer)))
        with span("data and model"):
            experiment = agreed(communicator, lambda: _experiment(job, communicator, stop))
        if communicator:
            refuse_unlike(communicator, experiment.facts())
        with span("start or resume"):
            start = agreed(communicator, lambda: RunStart(out) if worker else _found(experiment, out, resume, lease, first))
        agreed(communicator, lambda: stop.refuse_to_begin(out))
        hosts = communicator.allgather_text(host()) if communicator else [host()]
        if communicator and worker:
            _serve(experiment, communicator)
        else:
            start.lease = lease
            lead(experiment, start, communicator, hosts, observer)


def _stop_signal(communicator: Communicator | None, limit: float | None, observer: Observer) -> StopSignal:
    """limit: seconds. Rank 0 alone has a limit, tells that the run is going to stop, and ends all ranks at a second Ctrl-C."""
    if communicator and communicator.rank:
        return StopSignal(raises=False)
    stop = StopSignal(limit, say=_say(observer))
    if communicator:
        stop.stopping = "stopping after the packs in flight"  # at Ctrl-C a launcher ends all ranks by itself
    return stop


def _say(observer: Observer) -> Callable[[str], None]:
    return lambda line: (observer.console or output()).print(line, highlight=False, markup=False, soft_wrap=True)


def _held(out: Path, stop: StopSignal, observer: Observer) -> AbstractContextManager[Lease]:
    """The right to write the run file. Stopped where a signal comes while it is waited for."""

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        stop.refuse_to_begin(out)

    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    name = f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}" if job else ""
    return holding(out, _now(), sleep, _say(observer), name, int(restarts) if restarts.isdecimal() else 0)


def _found(parts: Experiment, out: Path, resume: str, lease: Lease | None, first: Path | None) -> RunStart:
    """Where the run begins; what a killed one left in its scratch folder on this node is brought home first.

    first: a finished run of fewer rounds, from which a new one goes on.
    """
    if lease:
        lease.check()  # it may be another's since the data were read
    if (name := parts.job.execution.scratch) and out.is_file():
        recover(expanded(name, os.environ), out)
    if first is not None:
        longer.begin(parts, first, out)
    return find_start(parts, out, resume)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _experiment(job: Job, communicator: Communicator | None, stop: StopSignal) -> Experiment:
    """The parts of the run. Rank 0 goes first where data are downloaded."""
    waits = communicator is not None and job.data.download
    if communicator and waits and communicator.rank:
        communicator.allgather_text("")
    try:
        return build_experiment(job, communicator.node_rank() if communicator else 0, stop)
    finally:
        if communicator and waits and not communicator.rank:
            communicator.allgather_text("")


def connect() -> Communicator | None:
    """The ranks this process was started among; None when it is alone. LonelyRanks where it should not be."""
    refuse_lonely_tasks()
    if not launched():
        return None
    library = started_library()
    from fedsim.fleet.mpi import communicator  # imports MPI

    link = communicator.connect(time.perf_counter, time.sleep)
    link.mpi = str(library)
    refuse_lonely_ranks(link.ranks, library)
    return link if link.ranks > 1 else None


def _terminal(link: Communicator | None) -> bool:
    """Whether a person watches. mpirun gives its ranks terminals of its own, so there its own output decides."""
    if link is None:
        return sys.stdout.isatty()
    launcher = nearest(os.getppid())
    try:
        return launcher is not None and str(Path(f"/proc/{launcher.process}/fd/1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def _serve(experiment: Experiment, communicator: Communicator) -> None:
    """A rank that trains, until rank 0 ends the run; raises what rank 0 raises."""
    from fedsim.fleet.mpi.worker import Worker

    code, message = Worker(experiment.site, communicator).serve()
    if code:
        raise CODES[code](message)


def lead(experiment: Experiment, start: RunStart, communicator: Communicator | None, hosts: list[str], observer: Observer) -> None:
    """Rank 0: does the rounds, reports how they ended, and has the other ranks end too. Raises BadInput, ClientFault or Stopped."""
    console = observer.console or output(_terminal(communicator))
    progress = Progress(experiment, len(hosts), start, console)
    if isinstance(stop := experiment.site.stopped, StopSignal):
        stop.say = progress.say  # which knows how to print beside a bar
    if communicator:
        progress.mpi, communicator.silence = f" of {communicator.mpi}", Silence(progress.say, hosts, experiment.site.stopped)
    failure: Exception | None = None
    try:
        if not start.finished:
            _rounds(experiment, start, communicator, hosts, progress, observer.callback)
    except CannotWrite as error:
        failure = type(error)(f"{error}{start.scratch.left()}") if start.scratch else error
    except Stopped as error:
        failure = stopped(start.out)
        if communicator and isinstance(error, SilentRanks):
            abort(communicator, f"{error}\n{failure}\n", 3)
    except BadInput as error:
        failure = error
    except ClientFault as error:
        failure = ClientFault(f"{error}\n{_remains(start)}")
    except MethodFault as error:
        raise MethodFault(f"{error}\n{_remains(start)}") from error.__cause__
    finally:
        progress.close()
    if failure and communicator and isinstance(failure, ClientFault):
        abort(communicator, f"{failure}\n")
    if failure:
        observer.report(failure)
    if communicator:
        communicator.send_order({"do": "end", "code": code_of(failure), "message": str(failure or "")})
    if failure:
        raise failure
    if observer.summary:
        progress.show()


def _remains(start: RunStart) -> str:
    """What stands after a fault."""
    rounds = RunReader(start.out).rounds if start.out.exists() else -1
    return f"{start.out} keeps the rounds before" if rounds >= 0 else "no round was complete"


def _rounds(
    parts: Experiment,
    start: RunStart,
    link: Communicator | None,
    hosts: list[str],
    progress: Progress,
    callback: Callback | None,
) -> None:
    with ExitStack() as stack:
        if name := parts.job.execution.scratch:
            start.scratch = stack.enter_context(Scratch.made(expanded(name, os.environ), start.out))
            stack.enter_context(copied_back(start.scratch, start.check))
        mirror = _mirror(parts, start, progress, stack)
        if parts.devices and start.first_state is not None:
            refuse_hopeless(parts, start.first_state, idle_fleet(parts), progress.say)
        with span("plan"):
            plan = start.plan or resolve(parts, progress.say, start.first_state)
        if other := unlike(plan, parts):
            progress.say(f"note: the run goes on under the plan it began with; the job and this machine say {other}")
        fleet = _fleet(parts, plan, link, start)
        with writing(start.path, also_refusals=False):
            start.check()
            record = stack.enter_context(start.record(parts, plan, hosts))
        progress.begin(plan)
        if mirror:
            mirror.begin(start.round)
        try:
            simulate(parts, fleet, RoundWriter(parts, record, start, plan.text(), mirror), start, progress, callback)
        except BadInput:
            fleet.drain()  # a row may still wait to be written
            if record.rounds < 0:  # a method may refuse in round 0, and then nothing is left behind
                start.check()
                record.check()
                record.discard()
            raise
        finally:
            fleet.drain()


def _mirror(parts: Experiment, start: RunStart, progress: Progress, stack: ExitStack) -> Mirror | None:
    """The tracker that the job names, if any, before anything is measured or written."""
    name = parts.job.record.mirror
    return stack.enter_context(Mirror(name, start.out, progress.say)) if name else None


def _fleet(parts: Experiment, plan: Plan, link: Communicator | None, start: RunStart) -> LocalFleet:
    """The fleet of the plan, in this process or on the other ranks."""
    kept: Any = {} if start.checkpoint is None else ChainMap({}, start.checkpoint.kept)  # type: ignore[arg-type]
    account = parts.account(plan.pack(parts.setting.cohort))
    fleet = make_fleet(plan, parts.site, account, time.perf_counter, kept, link, parts.job.execution.cuda_aware_mpi)
    return add_clock(fleet, parts.devices)
