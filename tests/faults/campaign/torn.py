"""Writes that a kill or the death of a machine cuts short: the files at any moment of the writing, made again from a recording."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

from campaign import recording
from campaign.jobs import JOBS
from campaign.lab import NONE, Lab, Lost, rows_of, same, sound, whole
from campaign.legs import alone, on_ranks
from campaign.outcomes import Outcome
from campaign.recording import Change, Disk

RANK_0 = 'if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then exec {words} "$@"; else exec "$@"; fi'
MOMENTS = 12  # of a recording that are looked at, of which one is gone on from


def on_rank_0(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words before the command of each rank, which put these before that of rank 0."""
    return ("sh", "-c", RANK_0.format(words=" ".join(words)), "sh")


def recorded(lab: Lab, job: str) -> list[Change]:
    """All that rank 0 of three writes in a run of the job."""
    if job not in lab.recordings:
        with lab.story(f"recorded-{job}") as folder:
            log = folder.parent / f"{job}.strace"
            run = folder / f"{job}.h5"
            whole(on_ranks(run, job, 3, through=on_rank_0(recording.tracer(log, run, JOBS[job].rounds))))
            same(run, lab.reference(job))
            lab.recordings[job] = recording.changes(log, folder)
            log.unlink()
    return lab.recordings[job]


def torn(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """Some moments of a run: after a call, or within a write. The files read at each, and the run goes on from one of them."""
    return _moments(lab, "torn write", number, draw, None)


def machine_lost(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """The same, where of the pages that were written and not synced some are missing."""
    return _moments(lab, "machine lost", number, draw, draw)


def _moments(lab: Lab, kind: str, number: int, draw: random.Random, lost: random.Random | None) -> list[Outcome]:
    job = list(JOBS)[number % len(JOBS)]
    written, found, seen = recorded(lab, job), list[Outcome](), NONE
    cuts = sorted(draw.sample(range(len(written)), min(MOMENTS, len(written))))
    on = draw.choice(cuts)
    for cut, disk in _disks(written, cuts, draw):
        what = f"{job}, {written[cut].call} {cut} of {len(written)} ({written[cut].path})"
        with lab.story(f"{kind.replace(' ', '-')}-{number}-{cut}") as folder:
            run = folder / f"{job}.h5"
            disk.put(folder, lost)
            try:
                outcome = Outcome(f"{kind}, read", what, same=True, rounds=sound(run, lab.reference(job), seen))
                seen = NONE if lost else rows_of(run)
                if cut == on:
                    same(whole(alone(run, job)), lab.reference(job))
                    outcome = replace(outcome, kind=f"{kind}, resumed")
            except Lost as error:
                outcome = Outcome(kind, what, lost=str(error))
            found.append(outcome)
    return found


def _disks(written: list[Change], cuts: list[int], draw: random.Random) -> Iterator[tuple[int, Disk]]:
    """The disk at each cut: before this change, or, where it is a write, in the midst of it."""
    disk, done = Disk(), 0
    for cut in cuts:
        for change in written[done:cut]:
            disk.apply(change)
        done = cut
        torn = copy.deepcopy(disk)
        if written[cut].call == "write":
            torn.apply(replace(written[cut], data=written[cut].data[: draw.randint(0, len(written[cut].data))]))
        yield cut, torn
