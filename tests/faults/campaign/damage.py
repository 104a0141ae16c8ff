"""Files that are damaged after a kill: cut short, or with one bit turned over. Damage to one file costs one round at most, or is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from processes import hash_of, measured, snapshot

from campaign.instants import rows_reached
from campaign.jobs import JOBS
from campaign.lab import Lab, Lost, same, short
from campaign.legs import alone
from campaign.outcomes import Outcome
from fedsim.errors import BadInput
from fedsim.storage.checkpoint import folder_of


def truncated(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A file that ends at any byte."""

    def cut(path: Path) -> str:
        size = draw.randint(0, max(path.stat().st_size - 1, 0))
        path.write_bytes(path.read_bytes()[:size])
        return f"cut to {size} bytes"

    return _damaged(lab, "truncated", number, draw, cut)


def flipped(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """A file with one bit turned over, anywhere."""

    def flip(path: Path) -> str:
        content, place = bytearray(path.read_bytes()), draw.randrange(path.stat().st_size)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"a bit of byte {place} turned over"

    return _damaged(lab, "flipped bit", number, draw, flip)


def _damaged(lab: Lab, kind: str, number: int, draw: random.Random, harm: Callable[[Path], str]) -> list[Outcome]:
    """Every other case harms the run file, the others a file of a checkpoint."""
    job = list(JOBS.values())[number // 2 % len(JOBS)]
    with lab.story(f"{kind.replace(' ', '-')}-{number}") as folder:
        run, reference = folder / f"{job.name}.h5", lab.reference(job.name)
        first = alone(run, job.name)
        rows_reached(first, draw.randint(1, job.rounds - 2))
        first.kill(first.members())
        first.ended()
        place = run if number % 2 else draw.choice(sorted(folder_of(run).glob("0*")))
        kind, what = f"{kind}, {'run file' if place == run else 'checkpoint'}", f"{job.name}, {place.name} {harm(place)}"
        try:
            refused = _goes_on(run, job.name, reference, whole=place != run)
        except Lost as error:
            lab.keep(folder)
            return [Outcome(kind, what, lost=str(error))]
    return [Outcome(kind, what, same=not refused, refused=refused)]


def _goes_on(run: Path, job: str, reference: Path, whole: bool) -> bool:
    """Whether it was refused by one message, and nothing was changed. Lost where something else happens; whole: the run file is."""
    before = _files(run.parent)
    ended = alone(run, job).ended()
    if ended is None:
        raise Lost("it hangs")
    if ended.code == 2 and not whole and ended.err.count("\n") == 1:
        if _files(run.parent) != before:
            raise Lost("it was refused, and a file was changed")
        return True
    if ended.code:
        raise Lost(f"it ended with exit code {ended.code}: {short(ended.err)}")
    if whole:
        same(run, reference)
    elif hash_of(run) != hash_of(reference):
        raise Lost("it ended with other weights")
    else:
        _right_or_named(run, reference)
    return False


def _files(folder: Path) -> dict[str, bytes]:
    """But for the lock that a kill left behind."""
    return {name: content for name, content in snapshot(folder).items() if not name.endswith(".lock")}


def _right_or_named(run: Path, reference: Path) -> None:
    """Lost where a column of a run file that was damaged reads wrong without a word."""
    try:
        found = measured(run)
    except BadInput:
        return
    for name, column in measured(reference).items():
        if name in found and not np.array_equal(found[name], column, equal_nan=True):
            raise Lost(f"{name} reads wrong without a word")
