"""Kills at moments of their own: between two system calls, while a run starts or ends, of sweeps, of mirrored runs, of two that resume."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from campaign import jobs, recording
from campaign.jobs import JOBS
from campaign.kills import Kill, Story, told
from campaign.lab import NONE, Lab, Lost, done, rows_of, same
from campaign.legs import Leg, alone, on_ranks, started
from campaign.outcomes import LIMIT, Outcome
from campaign.recording import Change
from campaign.torn import on_rank_0, recorded
from fedsim.simulation.mirrors.names import PLACES

SEEDS = 3  # runs of a sweep
MOMENTS = ("any", "copy of the run file", "copy of kept states", "final model", "checkpoint")


def between_calls(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """Rank 0 of three is killed when it begins a call that changes a file: during a copy, a checkpoint, the final writing or anywhere."""
    moment = MOMENTS[number % len(MOMENTS)]
    name = "scaffold" if moment == "copy of kept states" else list(JOBS)[number // len(MOMENTS) % len(JOBS)]
    job, reference = JOBS[name], lab.reference(name)
    call, count = _call(recorded(lab, name), name, moment, draw)
    with lab.story(f"calls-{number}") as folder:
        story = Story(folder / f"{name}.h5", job, reference, draw)
        words = recording.killer(story.run, job.rounds, call, count)
        return _traced(lab, story, on_ranks(story.run, name, 3, through=on_rank_0(words)), f"{name}, {moment}: {call} {count}")


def start_of_resume(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A run is killed, and killed again while its next start looks at what is there; between two system calls."""
    job = list(JOBS.values())[number % len(JOBS)]
    with lab.story(f"starts-{number}") as folder:
        story = Story(folder / f"{job.name}.h5", job, lab.reference(job.name), draw)
        try:
            story.killed(story.on_ranks(0), Kill("all at once", draw.choice(("write", "training")), job.rounds - 1))
        except Lost as error:
            return story.outcomes(error)
        call = draw.choice(("openat", "rename", "unlink", "write", "fsync"))
        count = draw.randint(1, 4 if call != "openat" else 12)
        words = recording.killer(story.run, job.rounds, call, count)
        command = [*words, sys.executable, "-m", "fedsim", "run", f"{job.name}.toml", "--out", str(story.run)]
        return _traced(lab, story, started(folder, command, story.run), f"{job.name}, start of a resumed run: {call} {count}")


def _traced(lab: Lab, story: Story, leg: Leg, what: str) -> list[Outcome]:
    """A leg that is killed by strace, unless that call does not come."""
    try:
        seen = rows_of(story.run)
        end = _when_dead(leg)
        story.ended(leg, Outcome("kill between system calls", what), end, min(seen, 0) if seen >= 0 else NONE)
        story.finish()
    except Lost as error:
        lab.keep(story.run.parent)
        return story.outcomes(error)
    return story.outcomes()


def _when_dead(leg: Leg) -> float:
    """Waits until rank 0 or the whole leg has ended; when it did."""
    known = None
    while leg.poll() is None:
        now = leg.rank(0)
        if known and now != known:
            break
        known = known or now
        time.sleep(0.01)
    return time.monotonic()


def _call(written: list[Change], name: str, moment: str, draw: random.Random) -> tuple[str, int]:
    """A system call within such a moment of a recorded run: its name, and which of that name it is."""
    last = max(place for place, change in enumerate(written) if change.path.endswith(".json.new"))
    within = {
        "any": lambda place, change: True,
        "copy of the run file": lambda place, change: change.path == f"{name}.h5.new",
        "copy of kept states": lambda place, change: ".kept.copy." in change.path,
        "final model": lambda place, change: place > last and change.path.startswith(f"{name}.h5"),
        "checkpoint": lambda place, change: ".checkpoint" in change.path,
    }[moment]
    found = [change for place, change in enumerate(written) if within(place, change)]
    kind = draw.choice(sorted({change.by for change in found}))  # first the call: most of them are writes
    chosen = draw.choice([change for change in found if change.by == kind])
    return kind, chosen.count


def two_resumes(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A run is killed, and started twice at the same time: one goes on, and the other is refused or finds the run finished."""
    job = list(JOBS.values())[number % len(JOBS)]
    with lab.story(f"two-{number}") as folder:
        story = Story(folder / f"{job.name}.h5", job, lab.reference(job.name), draw)
        other = folder / "other"
        other.mkdir()
        try:
            story.killed(story.on_ranks(0), Kill("all at once", "write", job.rounds // 2))
            legs = [alone(story.run, job.name), alone(story.run, job.name, log=other)]
            codes = sorted(ended.code if ended else -1 for ended in (leg.ended() for leg in legs))
            if codes not in ([0, 0], [0, 2]):
                raise Lost(f"of two runs that were started on one file, the exit codes are {codes}")
            same(story.run, story.reference)
        except Lost as error:
            lab.keep(folder)
            return [Outcome("two resumes at once", job.name, lost=str(error))]
    return [Outcome("two resumes at once", job.name, same=True)]


def mirrored(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A run with a mirror is killed; then the run and the mirror have every row once."""
    job = list(JOBS.values())[number % len(JOBS)]
    with lab.story(f"mirrored-{number}") as folder:
        story = Story(folder / f"{job.name}.h5", job, lab.reference(job.name), draw, ("--set", 'record.mirror="csv"'))
        try:
            for before in (job.rounds // 2, job.rounds):
                story.killed(story.on_ranks(3 * (number % 2)), Kill("all at once", draw.choice(("write", "training", "end")), before))
            story.finish()
            rows = PLACES["csv"].path(story.run).read_text().splitlines()
            if [line.split(",")[0] for line in rows[1:]] != [str(r) for r in range(job.rounds + 1)]:
                raise Lost("its mirror has not each row once")
        except Lost as error:
            lab.keep(folder)
            return story.outcomes(error)
    return story.outcomes()


def every_third(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """Kills of runs with a checkpoint in every third round."""
    return told(lab, number, draw, "third", "--set", "execution.checkpoint_every=3", lag=3)


def sweep(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """The parent of a sweep or one of its workers is killed; the same command does what is missing."""
    job = list(JOBS.values())[number % len(JOBS)]
    with lab.story(f"sweep-{number}") as folder:
        kind = ("sweep: parent killed", "sweep: worker killed")[number % 2]
        try:
            expected = _undisturbed(lab, job.name)
            leg = _swept(folder, job.name)
            end = time.monotonic() + draw.uniform(4.0, 12.0)
            while time.monotonic() < end and leg.poll() is None:
                time.sleep(0.01)
            workers = [pid for pid in leg.members() if pid != leg.session]
            victim = draw.choice(workers) if number % 2 and workers else leg.session
            leg.kill([victim])
            instant = time.monotonic()
            ended = leg.ended()
            seconds = time.monotonic() - instant
            done(_swept(folder, job.name).ended())
            for run in expected:
                same(folder / "runs" / run.name, run)
        except Lost as error:
            lab.keep(folder)
            return [Outcome(kind, job.name, lost=str(error))]
        ends = seconds if ended is None or number % 2 == 0 else None  # a sweep that lost a worker does its other runs first
    return [Outcome(kind, job.name, same=True, seconds=ends, hung=ended is None or (ends or 0) > LIMIT)]


def _undisturbed(lab: Lab, job: str) -> list[Path]:
    """The run files of the sweep that nobody disturbs."""
    folder = jobs.lay_out(lab.folder / "sweeps", lab.images)
    if not list((folder / "runs").glob(f"{job}*.h5")):
        done(_swept(folder, job).ended())
    return sorted((folder / "runs").glob(f"{job}*.h5"))


def _swept(folder: Path, job: str) -> Leg:
    seeds = f"sweep.seed={list(range(SEEDS))}"
    words = [sys.executable, "-m", "fedsim", "sweep", f"{job}.toml", "--set", seeds, "--out", "runs", "--processes", "2"]
    return started(folder, words, folder / "runs" / f"{job}.h5")
