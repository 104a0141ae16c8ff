"""Disks that are full, folders that cannot be written or are gone: the run stops and says so, and goes on when that is mended."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from processes import Ended
from small_disk import small_disk

from campaign import jobs
from campaign.instants import TooLate, rows_reached
from campaign.jobs import JOBS, Small
from campaign.lab import Lab, Lost, same, short, sound, whole
from campaign.legs import Leg, alone, on_ranks, under
from campaign.outcomes import LIMIT, Outcome
from fedsim.storage.checkpoint import folder_of

AS_OTHERS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")  # root, who obeys
ROOM = 60_000  # bytes below which not even the log of a run fits


def no_root() -> str:
    """Why no disk can be mounted here; empty where one can."""
    return "" if os.geteuid() == 0 else "only root may mount a disk"


def full_disk(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A disk that is too small for the run, somewhere; then there is room. Every other run has three ranks."""
    job, reference = _job(lab, number)
    needed = 3 * reference.stat().st_size + sum(path.stat().st_size for path in folder_of(reference).glob("*"))
    size, ranks = draw.randint(ROOM, needed), 3 * (number % 2)
    with small_disk(size) as disk:
        run = jobs.lay_out(disk, lab.images) / f"{job.name}.h5"
        link = lab.folder / f"full-disk-{number}"
        link.mkdir()

        def roomy() -> None:
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)

        return _stops("full disk", f"{job.name}, {size} bytes, {ranks or 'no'} ranks", run, job, reference, ranks, roomy, log=link)


def file_limit(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """No file may be larger than so many bytes (ulimit -f); then it may."""
    job, reference = _job(lab, number)
    size = draw.randint(ROOM, reference.stat().st_size)
    with lab.story(f"file-limit-{number}") as folder:
        limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        run = folder / f"{job.name}.h5"
        return _stops("limit on files", f"{job.name}, {size} bytes", run, job, reference, 0, lambda: None, before=limited)


def read_only(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A folder that cannot be written, from the start (a disk that is mounted so) or from some row on (of a user who obeys permissions)."""
    job, reference = _job(lab, number // 2)
    if number % 2 == 0 and not no_root():
        with small_disk("200m") as disk:
            run = jobs.lay_out(disk, lab.images) / f"{job.name}.h5"
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            log = lab.folder / f"read-only-{number}"
            log.mkdir()
            writable = partial(subprocess.run, ["mount", "-o", "remount,rw", str(disk)], check=True)
            return _stops("read-only folder", f"{job.name}, from the start", run, job, reference, 0, writable, log=log)
    with lab.story(f"read-only-{number}") as folder:
        run, row = folder / f"{job.name}.h5", draw.randint(1, job.rounds - 3)
        closed = partial(folder.chmod, 0o555), partial(folder.chmod, 0o755)
        log = folder / "log"
        log.mkdir()
        leg = under(run, job.name, 0, AS_OTHERS if os.geteuid() == 0 else (), log)
        return _half_way("read-only folder", f"{job.name}, after row {row}", leg, job, reference, row, *closed)


def vanished(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """The folder of the run is moved away while it goes on, and comes back. Every other run has three ranks."""
    job, reference = _job(lab, number)
    with lab.story(f"vanished-{number}") as folder:
        place = jobs.lay_out(folder / "place", lab.images)
        run, row = place / f"{job.name}.h5", draw.randint(1, job.rounds - 3)
        away = folder / "away"
        moved = partial(place.rename, away), partial(_back, away, place)
        ranks = 3 * (number % 2)
        what = f"{job.name}, after row {row}, {ranks or 'no'} ranks"
        leg = on_ranks(run, job.name, ranks, log=folder) if ranks else alone(run, job.name, log=folder)
        return _half_way("vanished folder", what, leg, job, reference, row, *moved)


def _back(away: Path, place: Path) -> None:
    """What a run has made anew in its place goes."""
    if place.exists():
        place.rename(place.with_name("made-anew"))
    away.rename(place)


def _job(lab: Lab, number: int) -> tuple[Small, Path]:
    job = list(JOBS.values())[number % len(JOBS)]
    return job, lab.reference(job.name)


def _stops(
    kind: str,
    what: str,
    run: Path,
    job: Small,
    reference: Path,
    ranks: int,
    mend: Callable[[], object],
    before: Callable[[], object] | None = None,
    log: Path | None = None,
) -> list[Outcome]:
    """A run that stops by itself, and goes on after `mend`; nothing where there was no need to stop."""
    try:
        leg = on_ranks(run, job.name, ranks, log=log) if ranks else alone(run, job.name, before=before, log=log)
        ended = leg.ended()
        if ended is not None and ended.code == 0:
            return []
        _said(ended)
        again = sound(run, reference)
        mend()
        whole(alone(run, job.name))
        same(run, reference)
    except Lost as error:
        return [Outcome(kind, what, lost=str(error))]
    return [Outcome(kind, what, same=True, rounds=again)]


def _half_way(
    kind: str,
    what: str,
    leg: Leg,
    job: Small,
    reference: Path,
    row: int,
    break_: Callable[[], object],
    mend: Callable[[], object],
) -> list[Outcome]:
    """A run whose folder changes after a row; nothing where it has ended before."""
    try:
        rows_reached(leg, row)
        break_()
        instant = time.monotonic()
        ended = leg.ended()
        seconds = time.monotonic() - instant
        mend()
        if ended is not None and ended.code == 0:
            return []
        _said(ended)
        again = sound(leg.run, reference, row)
        whole(alone(leg.run, job.name))
        same(leg.run, reference)
    except TooLate:
        return []
    except Lost as error:
        return [Outcome(kind, what, lost=str(error))]
    return [Outcome(kind, what, same=True, rounds=again, seconds=seconds, hung=seconds > LIMIT)]


def _said(ended: Ended | None) -> None:
    """Lost where a run did not stop with one message of a line."""
    if ended is None:
        raise Lost("it hangs")
    own = [line for line in ended.err.splitlines() if line.strip() and not line.startswith(("-----", "prterun", "mpirun"))]
    if ended.code not in (2, 3) or "Traceback" in ended.err or not own:
        raise Lost(f"it ended with exit code {ended.code}: {short(ended.err)}")
