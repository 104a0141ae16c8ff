"""The fields of jobs by their dotted names, and those in which several jobs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNRELATED = ("seed", "name")  # they change neither the method nor its setting
HOW = ("execution.", "sweep.", "record.")  # sections that change how and not what is computed


def fields(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields as "section.key", without those that change how and not what is computed."""
    return {name: value for name, value in flat(job).items() if name not in UNRELATED and not name.startswith(HOW)}


def flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All fields of the job as "section.key"."""
    found: dict[str, Any] = {}
    for name, value in job.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def differing(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields, as `fields` gives them, that tell the jobs apart, the method's name always first.

    A method's own field is compared between jobs of that method alone: that another method has none says nothing that its name does not.
    """
    names = dict.fromkeys(name for job in jobs for name in job)
    return list(dict.fromkeys(["method.name", *(name for name in names if _differs(name, jobs))]))


def _differs(name: str, jobs: Sequence[Mapping[str, Any]]) -> bool:
    alone = name.startswith("method.") and name != "method.name"
    first: dict[str, Mapping[str, Any]] = {}
    return any(job.get(name) != first.setdefault(repr(job.get("method.name")) if alone else "", job).get(name) for job in jobs)
