"""How a run is started and how it ends: ranks, signals, resume, exit codes (0 done, 1 fault, 2 bad input, 3 stopped)."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from fedsim.config.job import Job
from fedsim.errors import BadInput, ClientFault, Stopped
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.registry import FLEETS
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.loop import RoundWriter, simulate
from fedsim.simulation.planning.plan import Plan, resolve
from fedsim.simulation.progress import Progress
from fedsim.simulation.resume import RunStart, find_start, host
from fedsim.simulation.stop_signal import LAUNCHED, StopSignal
from fedsim.storage.reader import RunReader

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator

SAID = 1.0  # seconds that a launcher is left to pass on the last words
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "srun", "slurmstepd", "hydra_pmi_proxy")


def main(job: Job, out: Path, resume: str) -> int:
    """Runs the job on this rank; the exit code."""
    torch.set_num_threads(job.execution.threads)
    malloc.hold()
    link = connect()
    limit = job.execution.time_limit
    brake = StopSignal(None if limit is None or (link and link.rank) else 60 * limit)
    brake.listen()
    with _together(link):
        made = _made(job, out, resume, link, brake)
    told = [text for text in (link.told(made if isinstance(made, str) else "") if link else [made]) if text and isinstance(text, str)]
    if told:
        if link and link.rank:
            return 2  # rank 0 says it
        raise BadInput(told[0])
    assert not isinstance(made, str)
    with _together(link):
        hosts = link.told(host()) if link else [host()]
        return _serve(made[0], link) if link and link.rank else _lead(*made, link, hosts)


@contextmanager
def _together(link: Communicator | None) -> Iterator[None]:
    """What goes wrong on this rank ends every rank, lest the others wait for it for ever."""
    try:
        yield
    except BaseException:
        if link:
            _abort(link, traceback.format_exc())
        raise


def _abort(link: Communicator, message: str) -> None:
    """Says why, and ends every rank. A launcher drops what it has not passed on when it is told to abort, hence the pause."""
    sys.stderr.write(message)
    sys.stderr.flush()
    time.sleep(SAID)
    link.abort(1)


def _made(job: Job, out: Path, resume: str, link: Communicator | None, brake: StopSignal) -> tuple[Experiment, RunStart] | str:
    """The parts and, on rank 0, where to begin; or what is wrong. Rank 0 goes first where data are downloaded."""
    if link and link.rank and job.data.download:
        link.told("")
    try:
        parts = build_experiment(job, link.node_rank() if link else 0, brake)
        return parts, find_start(parts, out, resume) if not (link and link.rank) else RunStart(out)
    except BadInput as error:
        return str(error)
    finally:
        if link and not link.rank and job.data.download:
            link.told("")


def connect() -> Communicator | None:
    """The ranks this process was started among; None when it is alone."""
    if not any(name in os.environ for name in LAUNCHED):
        return None
    try:
        from fedsim.fleet.mpi import communicator
    except ImportError as error:
        raise BadInput(f"started by an MPI launcher, but MPI is missing here ({error}); pip install 'fedsim[mpi]'") from error
    link = communicator.connect(time.perf_counter, time.sleep)
    return link if link.ranks > 1 else None


def _terminal(link: Communicator | None) -> bool:
    """Whether a person watches. mpirun gives its ranks terminals of its own, so there its own output decides."""
    if link is None:
        return sys.stdout.isatty()
    try:
        return str(Path(f"/proc/{_launcher(os.getppid())}/fd/1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def _launcher(process: int) -> int:
    """The nearest process above that launches ranks: a wrapper may stand between."""
    name = Path(f"/proc/{process}/comm").read_text().strip()
    if name in LAUNCHERS:
        return process
    return _launcher(int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]))


def _serve(parts: Experiment, link: Communicator) -> int:
    """A rank that trains."""
    from fedsim.fleet.mpi.worker import Worker

    return Worker(parts.site, link).serve()


def _lead(parts: Experiment, start: RunStart, link: Communicator | None, hosts: list[str]) -> int:
    """Rank 0: runs, says how it ended, and has the other ranks end too."""
    progress = Progress(parts, len(hosts), start, Console(force_terminal=_terminal(link)))
    code, message = 0, ""
    try:
        if not start.finished:
            _run(parts, start, link, hosts, progress)
    except Stopped:
        code, message = 3, f"stopped; {start.out} holds all complete rounds, and the same command goes on from there"
    except BadInput as error:
        code, message = 2, str(error)
    except ClientFault as fault:
        code, message = 1, f"{fault}\n{_left(start)}"
    except Exception:
        code, message = 1, traceback.format_exc()
    progress.close()
    if link and code == 1:
        _abort(link, f"{message}\n")
    if message:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    if link:
        link.order({"do": "end", "code": code})
    if code == 0:
        progress.show()
    return code


def _left(start: RunStart) -> str:
    """What stands after a fault."""
    rounds = RunReader(start.out).rounds if start.out.exists() else -1
    return f"{start.out} keeps the rounds before" if rounds >= 0 else "no round was complete"


def _run(parts: Experiment, start: RunStart, link: Communicator | None, hosts: list[str], progress: Progress) -> None:
    plan = start.plan or resolve(parts, progress.say, start.state[0])
    if other := plan.unlike(parts):
        progress.say(f"note: the run goes on under the plan it began with; the job and this machine say {other}")
    fleet = _fleet(parts, plan, link, start)
    with start.record(parts, plan, hosts) as record:
        progress.begin(plan)
        try:
            simulate(parts, fleet, RoundWriter(parts, record, start, plan.text()), start, progress)
        except BadInput:
            if record.rounds < 0:  # a method may refuse in round 0, and then nothing is left behind
                start.out.unlink()
            raise
        finally:
            fleet.drain()


def _fleet(parts: Experiment, plan: Plan, link: Communicator | None, start: RunStart) -> LocalFleet:
    """The fleet of the plan, in this process or on the other ranks."""
    kept: Any = {} if start.checkpoint is None else ChainMap({}, start.checkpoint.kept)  # type: ignore[arg-type]
    site, account = plan.settled(parts.site), parts.account(plan.pack(parts.setting.cohort))
    if link is None:
        return FLEETS[plan.fleet](site, account, plan.packs, time.perf_counter, kept)
    from fedsim.fleet.mpi.device_transfer import Passage
    from fedsim.fleet.mpi.fleet import MPIFleet

    wanted = parts.job.execution.cuda_aware_mpi
    told = {"fleet": plan.fleet, "channels_last": plan.channels_last, "dtype": plan.dtype, "packed_conv": plan.packed_conv}
    told |= {"sparse": plan.sparse, "cuda_mpi": wanted}
    link.order({"do": "plan"} | told)
    link.passage = Passage.of(site.device, wanted)
    return MPIFleet(site, account, plan.packs, link, kept)
