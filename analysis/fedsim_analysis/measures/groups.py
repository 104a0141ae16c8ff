"""Runs whose jobs differ in the seed, and at most in how they were computed, are a group, whose label tells it from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsim_analysis.comparison.jobs import HOW, HOW_SECTIONS, plain
from fedsim_analysis.measures.colours import Style, styles
from fedsim_analysis.measures.nodes import Lacking, along_runs, labels, node

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

ABOUT_RUNS = ("run", "method", "path", "rounds_done", "finished")  # coordinates that are no fields of jobs


@dataclass(frozen=True)
class Group:
    """Runs of one job. `label` is plain text of a file: escape it where markup could be read."""

    label: str
    method: str
    places: tuple[int, ...]  # of its runs along the dimension `run`
    runs: tuple[str, ...]  # their labels
    seeds: tuple[Any, ...]
    fields: dict[str, Any]  # of the job, those that differ between the runs
    finished: bool  # whether all its runs have ended
    style: Style  # how it is drawn: one of its own among these groups, in every figure of them


def groups(runs: Runs, place: str = "rounds") -> list[Group]:
    """The groups in the order of their first runs.

    Runs belong together whose fields of the job are equal, as in `comparison`: but for `seed`, `name`, where the data lie, and
    [execution], [sweep] and [record]. A label is
    the method's name, followed by the fields in which groups of this method differ: "fedtiny, density 0.1". Where two runs of
    a group have one seed, an interval over them would be false: each run is then a group of its own, and its label ends with the
    run's. A Dataset that does not say the methods of its runs gives a group, without a method, for each run.
    """
    names, fields = labels(runs, place, "run"), fields_of(runs, place)
    methods = [str(value) for value in along_runs(runs, place, "method") or ()]
    ended = along_runs(runs, place, "finished") or [True] * len(names)
    if not methods:
        drawn = zip(names, ended, styles([""] * len(names)), strict=True)
        return [Group(name, "", (i,), (name,), (0,), {}, bool(end), own) for i, (name, end, own) in enumerate(drawn)]
    seeds = along_runs(runs, place, "seed") or list(range(len(names)))
    members: dict[str, list[int]] = {}
    for i in range(len(names)):
        members.setdefault(repr((methods[i], fields[i])), []).append(i)
    parts: list[tuple[str, list[int]]] = []
    for held in members.values():
        first = held[0]
        rivals = [fields[other[0]] for other in members.values() if methods[other[0]] == methods[first]]
        label = ", ".join([methods[first], *_differing(fields[first], rivals)])
        alone = len({repr(seeds[i]) for i in held}) < len(held)
        parts += [(f"{label}, {names[i]}", [i]) for i in held] if alone else [(label, held)]
    found = []
    for (label, held), own in zip(parts, styles([methods[held[0]] for _, held in parts]), strict=True):
        of = (tuple(held), tuple(names[i] for i in held), tuple(seeds[i] for i in held))
        found.append(Group(label, methods[held[0]], *of, fields[held[0]], all(bool(ended[i]) for i in held), own))
    return found


def group_of(runs: Runs, place: str, label: str | None = None) -> Group:
    """The group of this label, or the first; Lacking that lists the labels."""
    found = groups(runs, place)
    for group in found:
        if label in (None, group.label):
            return group
    raise Lacking(f"there is no group {label!r}; the groups are {'; '.join(group.label for group in found) or 'none'}")


def fields_of(runs: Runs, place: str) -> list[dict[str, Any]]:
    """Of each run, the fields of its job that `open` gives as coordinates, without those that tell no jobs apart."""
    found = node(runs, place)
    names = [str(name) for name in found.coords if str(name) not in (*ABOUT_RUNS, *HOW) and not str(name).startswith(HOW_SECTIONS)]
    values = {name: held for name in names if name not in found.dims and (held := along_runs(runs, place, name)) is not None}
    called = {"rounds_planned": "rounds"}
    return [{called.get(name, name): _missing(held[i]) for name, held in values.items()} for i in range(found.sizes["run"])]


def _missing(value: Any) -> Any:
    """None for a field that the job has not: NaN is unequal to itself."""
    return None if value is None or value != value or value == "" else value


def _differing(own: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> list[str]:
    names = [name for name in own if len({repr(other[name]) for other in rivals}) > 1 and own[name] is not None]
    ends = [name.rpartition(".")[2] for name in names]
    return [
        f"{name if ends.count(end) > 1 else end} {text_of(own[name], [other[name] for other in rivals])}"
        for name, end in zip(names, ends, strict=True)
    ]


def text_of(value: Any, rivals: Sequence[Any] | None = None) -> str:
    """A value of a job: a number in all its digits, or in six where these tell it from those of its `rivals`."""
    if not isinstance(value, float):
        return plain(value)
    short = f"{value:g}"
    alike = rivals is None or any(isinstance(other, float) and other != value and f"{other:g}" == short for other in rivals)
    return plain(value) if alike and float(short) != value else short
