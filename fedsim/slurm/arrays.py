"""Job arrays: which runs an array takes, in SLURM's words, and into how many arrays the runs of a sweep are cut.

The run with index i (its line of `runs.txt`, from 0) is the task i - offset of its array. Every task number is below the site's
MaxArraySize, so an array begins at a multiple of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.errors import BadInput

ITEM = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?")
SPEC = "SLURM's own words: 0-9, 0,3,7, 0-99:10, each with %4 behind it for four at the same time; %4 alone: all runs"
SPANS = 300  # of an array: sbatch reads lines of 8,192 bytes, and a span takes at most 20


@dataclass(frozen=True)
class Limits:
    """What a site allows: every task number is below `size`, and an array has at most `tasks` of them."""

    size: int = 1001  # MaxArraySize, which is 1001 where a site does not say otherwise
    tasks: int | None = None  # max_array_tasks of SchedulerParameters

    @property
    def allows_arrays(self) -> bool:
        return self.size > 1 and self.tasks != 1


@dataclass(frozen=True)
class Array:
    """One job array: `tasks` ascend and are below MaxArraySize, at most `at_once` of them run at the same time (None: all)."""

    offset: int
    tasks: tuple[int, ...]
    at_once: int | None = None

    @property
    def spec(self) -> str:
        """As `--array` takes it."""
        return spans(self.tasks) + (f"%{self.at_once}" if self.at_once else "")

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(self.offset + task for task in self.tasks)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as SLURM writes them: 0-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def at_once(spec: str) -> int | None:
    """How many runs the option `--array` lets run at the same time; None: as many as there is room for. BadInput: it is written wrongly."""
    _, percent, limit = spec.partition("%")
    if percent and not (limit.isascii() and limit.isdecimal() and 0 < len(limit) < 10 and int(limit)):
        raise BadInput(f"array {spec!r}: behind % stands how many runs go on at the same time, at least 1. {SPEC}")
    return int(limit) if percent else None


def _items(spec: str) -> list[tuple[int, int, int]]:
    """(first, last, step) of each span that the option `--array` lists. BadInput: it is written wrongly."""
    found = []
    for item in spec.partition("%")[0].split(","):
        match = ITEM.fullmatch(item.strip())
        if not match:
            raise BadInput(f"array {spec!r}: {item!r} is no number and no span. {SPEC}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or not step:
            raise BadInput(f"array {spec!r}: {item!r} has no number in it. {SPEC}")
        found.append((first, last, step))
    return found


def check(spec: str) -> None:
    """BadInput where the option `--array` is written wrongly."""
    at_once(spec)
    if spec.partition("%")[0]:
        _items(spec)


def chosen(spec: str, count: int) -> list[int]:
    """The positions of runs, from 0 and ascending, that the option `--array` chooses of `count`. BadInput: there is no such run."""
    if not spec.partition("%")[0]:
        return list(range(count))
    items = _items(spec)
    there = f"there are {count} runs, 0 to {count - 1}" if count > 1 else "there is one run, 0"
    if (last := max(last for _, last, _ in items)) >= count:
        raise BadInput(f"array {spec!r}: there is no run {last}; {there}")
    return sorted({number for first, last, step in items for number in range(first, last + 1, step)})


def cut(indices: Sequence[int], limits: Limits, limit: int | None) -> list[Array]:
    """The arrays that take the runs of ascending `indices`. limit: how many runs of all arrays go on at the same time.

    BadInput where that is fewer than there are arrays, since each array takes a share of it.
    """
    found: list[tuple[int, list[int]]] = []
    gaps = 0
    for index in indices:
        offset = index - index % limits.size
        tasks = found[-1][1] if found and found[-1][0] == offset else []
        gaps += bool(tasks) and index - offset != tasks[-1] + 1
        if not tasks or len(tasks) == limits.tasks or gaps >= SPANS:
            found.append((offset, tasks := []))
            gaps = 0
        tasks.append(index - offset)
    if limit and limit < len(found):
        raise BadInput(
            f"array %{limit}: {len(indices)} runs become {len(found)} job arrays here, since an array has at most"
            f" {min(limits.size, limits.tasks or limits.size)} tasks; let at least {len(found)} runs go on at the same time"
        )
    shares = [None if not limit else limit // len(found) + (i < limit % len(found)) for i in range(len(found))]
    return [Array(offset, tuple(tasks), share) for (offset, tasks), share in zip(found, shares, strict=True)]
