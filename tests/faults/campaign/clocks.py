"""Clocks that jump and ranks that stand still: nothing hangs or is refused wrongly, no time is negative, the weights are the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from campaign.instants import TooLate, rows_reached
from campaign.jobs import JOBS
from campaign.kills import Kill, Story, victims_of
from campaign.lab import NONE, Lab, Lost, done, same, whole
from campaign.legs import alone, on_ranks, under
from campaign.outcomes import Outcome
from fedsim.storage.reader import RunReader

HOUR = 3600
FAKE = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1")
FAKETIME = ("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DONT_RESET=1")
STILL = 4.0  # seconds that a rank stands still


def no_faketime() -> str:
    """Why the wall clock of a run cannot jump here; empty where it can."""
    return "" if _library() else "faketime is not installed (on Debian: apt install faketime)"


def no_time_namespace() -> str:
    """Why a run cannot have another clock since the machine's start; empty where it can."""
    words = ("unshare", "--time", "--monotonic", "60", "true")
    if shutil.which("unshare") and subprocess.run(words, capture_output=True, check=False).returncode == 0:
        return ""
    return "no time namespace can be made here (it needs root, and Linux 5.6)"


def jumps(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """The wall clock goes an hour back and forth while a run goes on; killed in between in every other case.

    In one process: under libfaketime the ranks of Open MPI have sleeps that end in an error, which no clock of a machine does to them.
    """
    job = list(JOBS.values())[number % len(JOBS)]
    reference, what = lab.reference(job.name), f"{job.name}{', killed' if number % 2 else ''}"
    with lab.story(f"jumps-{number}") as folder:
        run, clock = folder / f"{job.name}.h5", folder / "clock"
        steps = [draw.choice((-HOUR, HOUR, 0, -60)) for _ in range(3)]
        try:
            _set(clock, steps[0])
            leg = under(run, job.name, 0, ("env", f"LD_PRELOAD={_library()}", f"FAKETIME_TIMESTAMP_FILE={clock}", *FAKETIME))
            for place, step in enumerate(steps[1:], 1):
                rows_reached(leg, place * job.rounds // 3)
                _set(clock, step)
            if number % 2:
                leg.kill(leg.members())
            ended = leg.ended()
            if number % 2 == 0:
                done(ended)
            whole(alone(run, job.name))
            same(run, reference)
            _forwards(run)
        except TooLate:
            done(leg.ended())
        except Lost as error:
            lab.keep(folder)
            return [Outcome("clock jumps", f"{what}, by {steps} s", lost=str(error))]
    return [Outcome("clock jumps", what, same=True)]


def restarted(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A run is killed, and goes on where the clock since the machine's start is another, as after a restart or on another machine."""
    job = list(JOBS.values())[number % len(JOBS)]
    reference = lab.reference(job.name)
    with lab.story(f"restarted-{number}") as folder:
        run = folder / f"{job.name}.h5"
        try:
            story = Story(run, job, reference, draw)
            story.killed(alone(run, job.name), Kill("all at once", "training", job.rounds))
            shift = str(draw.choice((HOUR, 100 * HOUR, -1)))
            whole(under(run, job.name, 0, ("unshare", "--time", "--fork", "--monotonic", shift, "--boottime", shift)))
            same(run, reference)
            _forwards(run)
        except Lost as error:
            lab.keep(folder)
            return [Outcome("machine restarted", job.name, lost=str(error))]
    return [Outcome("machine restarted", job.name, same=True)]


def stopped(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A rank stands still for some seconds (SIGSTOP), and the run ends as ever; in every other case another process is killed meanwhile."""
    job = list(JOBS.values())[number % len(JOBS)]
    reference, still = lab.reference(job.name), draw.randrange(3)
    with lab.story(f"stopped-{number}") as folder:
        run = folder / f"{job.name}.h5"
        story = Story(run, job, reference, draw)
        try:
            leg = on_ranks(run, job.name, 3)
            rows_reached(leg, row := draw.randint(0, job.rounds // 2))
            os.kill(leg.rank(still) or leg.session, signal.SIGSTOP)
            outcome = Outcome("rank stopped", f"{job.name}, rank {still}, after row {row}")
            if number % 2 == 0:
                time.sleep(STILL)
                os.kill(leg.rank(still) or leg.session, signal.SIGCONT)
                done(leg.ended())
                story.found.append(outcome)
            else:
                who = draw.choice([name for name in ("rank 0", "rank 1", "rank 2", "mpirun") if name != f"rank {still}"])
                instant = leg.kill(victims_of(leg, who))
                killed = Outcome("rank stopped, another killed", f"{outcome.what}, {who} killed")
                story.ended(leg, killed, instant, NONE)
            story.finish()
        except TooLate:
            return []
        except Lost as error:
            lab.keep(folder)
            return story.outcomes(error)
    return story.outcomes()


def _set(clock: Path, seconds: int) -> None:
    """From now on the wall clock is so many seconds off."""
    aside = clock.with_name("clock.aside")
    aside.write_text(f"{seconds:+d}s\n")
    aside.rename(clock)


def _forwards(run: Path) -> None:
    """Lost where a time in the run file is negative."""
    found = RunReader(run)
    times = {f"timing/{name}": found.timing(name) for name in found.names("timing")} | {"rounds/seconds": found.column("seconds")}
    if wrong := [name for name, column in times.items() if np.nanmin(column) < 0]:
        raise Lost(f"{', '.join(wrong)} is negative")


def _library() -> str:
    return next((path for path in FAKE if Path(path).exists()), "")
