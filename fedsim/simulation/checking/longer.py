"""`fedsim run --extend RUN.h5`: a finished run goes on for more rounds, in a run file of its own.

That is the run of the longer job only where no round depends on how many there are. A method says so (`Method.follows_rounds`), and of the
learning rates those of the schedules in STEADY.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copyfile

from fedsim.config import own_code
from fedsim.errors import BadInput
from fedsim.federated.protocol import Method
from fedsim.simulation.experiment import Experiment
from fedsim.simulation.resume import differences, same_run
from fedsim.storage import checkpoint
from fedsim.storage.layout import Attributes
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

STEADY = ("constant", "exponential")


def begin(parts: Experiment, first: Path, out: Path) -> None:
    """Makes `out` as the longer run was after the last round of `first`; `find_start` goes on from there. Does nothing where `out` exists.

    BadInput where `first` is not finished, is of another job, or where its rounds would have been others in the longer run.
    """
    if out.exists():
        return
    known = RunReader(first).attributes
    done = known["rounds_planned"]
    if not known["finished"] or known["rounds"] != done:
        raise BadInput(f"--extend {first}: this run is not finished; finish it first, or leave out --extend")
    if differences(RunReader(first).job, parts.resolved) != f"there rounds = {done}, here {parts.job.rounds}" or done > parts.job.rounds:
        found = differences(RunReader(first).job, parts.resolved) or f"both have {done} rounds"
        raise BadInput(f"--extend {first} goes on with the same job and more rounds, and here is another ({found})")
    if why := follows_rounds(parts):
        raise BadInput(
            f"--extend {first}: {why}, so the first {done} rounds of {parts.job.rounds} are not those of {done}; run all of them"
        )
    same_run(parts, first, known)
    found_last = checkpoint.latest(checkpoint.folder_of(first), parts.site.device, own=own_code.modules(parts.job))
    if found_last is None or found_last.round != done:
        raise BadInput(f"--extend {first}: the checkpoint of its last round is gone from {checkpoint.folder_of(first)}; run all rounds")
    facts: Attributes = {"job": parts.resolved, "job_sha256": parts.identity, "rounds_planned": parts.job.rounds}
    folder, aside = checkpoint.folder_of(out), out.with_name(out.name + ".new")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.check_writable(folder)
    checkpoint.clear(folder)
    extra = found_last.extra | {"job_sha256": parts.identity}
    for r in (-1, done):  # the file as it was before its first row, for `fedsim doctor`, then as it was after its last
        copyfile(first, aside)
        with RunWriter.resume(aside, r, facts):
            pass
        if r < 0:
            checkpoint.keep_beginning(folder, aside)
    checkpoint.save(folder, done, found_last.state, extra, found_last.kept, before=-1)
    aside.rename(out)


def follows_rounds(parts: Experiment) -> str:
    """Why rounds of this job may depend on how many there are; "" where they do not."""
    method: Method[object] = parts.method
    if vars(type(method)).get("follows_rounds", True):
        return f"rounds of method {parts.job.method.name} may depend on how many there are (follows_rounds)"
    if parts.job.train.schedule not in STEADY:
        return f'the learning rate follows the number of rounds (train.schedule = "{parts.job.train.schedule}")'
    return ""
