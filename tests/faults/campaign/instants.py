"""When a kill comes: while a run starts, trains, evaluates, writes or ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from campaign.jobs import Small
from campaign.lab import NONE
from campaign.legs import LOOK, PATIENCE, Leg
from fedsim.errors import BadInput
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.reader import RunReader

STARTS = {0: 0.4, 2: 6.0, 3: 7.0, 5: 12.0}  # seconds from the start to the first round, about; kept up with what is seen
END = 0.15  # seconds that the last writing takes, about
PHASES = ("broadcast", "compute", "reduce", "server")  # before the evaluation
AIMS = {"start": 2, "training": 5, "evaluation": 4, "write": 6, "end": 2}  # and how often each is chosen


class TooLate(Exception):
    """The run has ended before the instant came."""


def wait(aim: str, leg: Leg, job: Small, reference: Path, draw: random.Random, before: int) -> int:
    """Until the instant of the kill; the last row that is complete then. TooLate where the run ends before.

    before: the row before which it comes, where the leg has not done more already.
    """
    if aim == "start":
        end = leg.began + draw.uniform(0, STARTS.get(leg.ranks, 10.0))
        _until(leg, lambda: time.monotonic() > end)
        return _rows(leg.run)
    first = _begun(leg)
    if aim == "end" or first >= job.rounds - 1:
        _until(leg, lambda: _rows(leg.run) >= job.rounds)
        _sleep(leg, draw.uniform(0, END))
        return _rows(leg.run)
    row = _row(job, first, before, draw, even=aim == "evaluation")
    _until(leg, lambda: _rows(leg.run) >= row)
    if aim == "write":
        _changes(leg, draw.randint(1, 12))
    else:
        _sleep(leg, draw.uniform(*_span(reference, row + 1, aim)))
    return _rows(leg.run)


def rows_reached(leg: Leg, row: int) -> None:
    """Waits for a row. TooLate where the run ends before."""
    _until(leg, lambda: _rows(leg.run) >= row)


def _begun(leg: Leg) -> int:
    """Waits for the first row that this leg writes; its number. Notes how long it took to come."""
    before, was = _rows(leg.run), _stamp(leg.run)
    _until(leg, lambda: _stamp(leg.run) != was and _rows(leg.run) >= 0)
    STARTS[leg.ranks] = 0.7 * STARTS.get(leg.ranks, 10.0) + 0.3 * (time.monotonic() - leg.began)
    return max(_rows(leg.run), min(before, 0))


def _row(job: Small, first: int, before: int, draw: random.Random, even: bool) -> int:
    """The row after which the kill comes: half of the time before a round in which more happens than training."""
    later = [row for row in range(first, max(before, first + 2)) if row < job.rounds and (not even or row % 2)]
    special = [row for row in job.aims if row in later]
    return draw.choice(special if special and draw.random() < 0.5 else later or [first])


def _span(reference: Path, row: int, aim: str) -> tuple[float, float]:
    """Seconds after the row before, between which a round trains or evaluates, as the undisturbed run took."""
    run = RunReader(reference)
    trained = float(sum(np.nan_to_num(run.timing(name)[row]) for name in PHASES if name in run.names("timing")))
    ended = trained + float(np.nan_to_num(run.timing("evaluate")[row]))
    return (0.0, trained) if aim == "training" else (trained, max(ended, trained))


def _changes(leg: Leg, count: int) -> None:
    """Waits until something has been written so many times; it looks without a pause."""
    places = (leg.run, leg.run.with_name(f"{leg.run.name}.new"), folder_of(leg.run))
    was = [_stamp(place) for place in places]

    def changed() -> bool:
        now = [_stamp(place) for place in places]
        if now == was:
            return False
        was[:] = now
        return True

    for _ in range(count):
        _until(leg, changed, 0.0)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _rows(run: Path) -> int:
    try:
        return RunReader(run).rounds
    except BadInput:
        return NONE


def _sleep(leg: Leg, seconds: float) -> None:
    end = time.monotonic() + seconds
    _until(leg, lambda: time.monotonic() >= end, 0.001)


def _until(leg: Leg, condition: Callable[[], object], pause: float = LOOK) -> None:
    give_up, looks = time.monotonic() + PATIENCE, 0
    while not condition():
        looks += 1
        if (pause or looks % 100 == 0) and leg.poll() is not None:
            raise TooLate
        if time.monotonic() > give_up:
            raise TooLate
        if pause:
            time.sleep(pause)
