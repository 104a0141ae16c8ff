"""Jobs held against each other: their fields by dotted names, those that tell rows apart, and how they are sorted and called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim_analysis import job_fields
from fedsim_analysis.foreign_text import printable

METHOD = "method.name"
HOW = (*job_fields.UNRELATED, "data.root", "data.download")  # say how a run is called or done, or are what rows are the mean over
HOW_SECTIONS = job_fields.HOW
TREATMENT = ("augment", "crop_pad", "crop_border", "cutout", "normalise")  # of [data]: what is done with images, not which they are
LONGEST = 40  # signs of a value that is shown

Job = Mapping[str, Any]  # dotted name -> value


def computed(job: Job) -> dict[str, Any]:
    """The fields that say what is computed; not the seed, and not those that say how."""
    return {name: value for name, value in job.items() if name not in HOW and not name.startswith(HOW_SECTIONS)}


def data(job: Job) -> dict[str, Any]:
    """The fields that say which images there are. Where they differ, accuracies are of other tests."""
    held = {name: value for name, value in computed(job).items() if name.startswith("data.")}
    return {name: value for name, value in held.items() if name.partition(".")[2] not in TREATMENT}


def titles(names: Sequence[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A field's heading: without its section, where that leaves no doubt; "method.name" is the method."""
    ends = [name.removesuffix(".name").rpartition(".")[2] for name in names]
    used = set(taken)
    return {name: plain(name if ends.count(end) > 1 or end in used else end) for name, end in zip(names, ends, strict=True)}


def plain(value: Any) -> str:
    """A value for people; long texts are cut."""
    shown = printable("-" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def label(job: Job, shown: Sequence[str]) -> str:
    """What a row is called: "fedtiny, density 0.1"."""
    called = titles(shown)
    parts = [f"{called[name]} {plain(job[name])}" for name in shown if name != METHOD and job.get(name) is not None]
    return ", ".join([plain(job.get(METHOD)), *parts] if METHOD in shown else parts)


def unique(names: Sequence[str]) -> list[str]:
    """The same names; one that is there already gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def order(value: Any) -> tuple[int, float, str]:
    """The place of a value among others: nothing, then truth values and numbers by size, then texts."""
    if value is None:
        return (0, 0.0, "")
    if isinstance(value, bool | int | float):
        return (1, float(value), "")
    return (2, 0.0, str(value))
