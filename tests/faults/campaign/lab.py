"""The folder of a campaign: the jobs, the runs that were never disturbed, a folder for each story; and what is looked at after a fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from processes import Ended, assert_same, measured

from campaign import jobs
from campaign.legs import Leg, alone
from campaign.recording import Change
from fedsim.errors import BadInput
from fedsim.storage.checkpoint import folder_of, latest
from fedsim.storage.reader import RunReader

NONE = -2  # rows of a run that has no file yet
LAST = 3  # lines of a message that are shown


class Lost(Exception):
    """Something that a fault must not do, in words."""


@dataclass
class Lab:
    """folder: of the campaign. references: of each job the run file of the run that was never disturbed, made when it is first asked for.
    recordings: of each job what a run of it wrote."""

    folder: Path
    references: dict[str, Path] = field(default_factory=dict)
    recordings: dict[str, list[Change]] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images = jobs.write_images(self.folder / jobs.IMAGES)

    def close(self) -> None:
        """Removes the folder, unless something in it is kept."""
        if not self.kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def story(self, name: str) -> Iterator[Path]:
        """A folder with the jobs, which is removed unless it is kept."""
        folder = jobs.lay_out(self.folder / name, self.images)
        yield folder
        if folder not in self.kept:
            shutil.rmtree(folder)

    def keep(self, folder: Path) -> None:
        """Something was lost in this folder: it is left for whoever looks for the reason."""
        self.kept.append(folder)

    def reference(self, job: str) -> Path:
        """The run file of the job, done without a fault."""
        if job not in self.references:
            folder = jobs.lay_out(self.folder / "references", self.images)
            self.references[job] = whole(alone(folder / f"{job}.h5", job))
        return self.references[job]


def whole(leg: Leg) -> Path:
    """The run file of a leg that is waited for; Lost where it does not end well."""
    done(leg.ended())
    return leg.run


def done(ended: Ended | None) -> None:
    """Lost where a leg has not ended, or not with exit code 0."""
    if ended is None:
        raise Lost("it hangs")
    if ended.code:
        raise Lost(f"it ended with exit code {ended.code}: {short(ended.err)}")


def short(text: str) -> str:
    """The last lines of a message, in one."""
    return " / ".join(text.strip().splitlines()[-LAST:])[:500] or "without a message"


def rows_of(run: Path) -> int:
    """The last complete row, NONE where there is no run file."""
    return RunReader(run).rounds if run.exists() else NONE


def sound(run: Path, reference: Path, seen: int = NONE, lag: int = 1) -> int:
    """Complete rows that the next leg has to do again, after a fault. Lost where a row is gone, a value is wrong, or more is lost.

    seen: the last row that was complete before the fault. lag: rounds that may be lost.
    """
    try:
        found = rows_of(run)
        if found < seen:
            raise Lost(f"row {seen} was complete, and the file ends with row {found}")
        if found == NONE:
            return 0
        _same_rows(run, reference, found)
        kept = latest(folder_of(run))
    except BadInput as error:
        raise Lost(f"it cannot be read: {error}") from error
    again = found - (kept.round if kept else -1)
    if again > lag or again < 0:
        raise Lost(f"row {found} is complete, and the newest checkpoint is of round {kept.round if kept else 'none'}")
    return again


def _same_rows(run: Path, reference: Path, last: int) -> None:
    """Lost where a column differs from the reference in a row up to the last."""
    found, expected = measured(run), measured(reference)
    for name, column in expected.items():
        here = found.get(name, np.full_like(column, np.nan))
        if not np.array_equal(here[: last + 1], column[: last + 1], equal_nan=True):
            raise Lost(f"{name} is another up to row {last}")


def same(run: Path, reference: Path) -> None:
    """Lost where a finished run is not the reference: its weights, and every row."""
    try:
        assert_same(run, reference)
    except (AssertionError, BadInput) as error:
        raise Lost(f"it is not the run that was never disturbed: {short(str(error))}") from error
    left = [path.name for path in (*run.parent.glob(f"{run.name}.new"), *folder_of(run).glob("*.new"))]
    if left:
        raise Lost(f"it left {', '.join(left)} behind")
