"""What was run and with what: a row for each run, what all runs share, and their jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedsim_analysis.measures.groups import text_of
from fedsim_analysis.report.contents import Block, Details, Note, Section, Table
from fedsim_analysis.report.states import State, states

if TYPE_CHECKING:
    import xarray as xr

    from fedsim_analysis.measures.groups import Group

MOST_JOBS = 50  # resolved jobs on a page
SHORT = 12  # digits of a SHA-256 in a table
FACTS = {  # attribute of a file -> its heading
    "started_at": "started",
    "hosts": "hosts",
    "ranks": "MPI ranks",
    "fedsim_version": "fedsim",
    "git_commit": "commit",
    "torch_version": "torch",
    "partition_sha256": "partition (SHA-256)",
    "weights_sha256": "weights (SHA-256)",
}
HASHES = ("git_commit", "partition_sha256", "weights_sha256")


def section(tree: xr.DataTree, groups: Sequence[Group], fields: Sequence[str], opening: str) -> Section:
    """groups: all groups. fields: those of the jobs in which the runs differ. opening: lines of Python before those of figures."""
    root = tree.to_dataset()
    facts = {name: [_fact(name, value) for value in root[name].values.tolist()] for name in FACTS}
    alike = [name for name in FACTS if len(set(facts[name])) == 1 and name != "weights_sha256"]
    count = root.sizes["run"]
    if count == 1:
        alike = list(FACTS)
    blocks: list[Block] = []
    if alike:
        rows = [[FACTS[name], _whole(root, name)] for name in alike]
        blocks.append(
            Table(
                "shared",
                "What this run was done with." if count == 1 else f"The same in {'both' if count == 2 else f'all {count}'} runs.",
                ("what", "value"),
                rows,
            )
        )
    if count > 1:
        blocks.append(_table(root, states(tree), [name for name in FACTS if name not in alike], facts, fields))
    return Section(
        "origins",
        "What was run, and with what",
        [*blocks, *_jobs(root, groups), _hashes(root), Details("What stands before the line of Python below each figure", opening)],
    )


def _table(root: xr.Dataset, found: Sequence[State], names: Sequence[str], facts: dict[str, list[str]], fields: Sequence[str]) -> Table:
    columns = ["run", "method", *fields, "seed", "rounds", "state", *(FACTS[name] for name in names)]
    known = {name: root[name].values.tolist() for name in ("method", "seed", *fields)}
    rows = []
    for i, state in enumerate(found):
        own = [_value(known[name][i]) for name in fields]
        held = [str(known["method"][i]), *own, str(known["seed"][i]), state.rounds, state.name]
        rows.append([state.run, *held, *(facts[name][i] for name in names)])
    return Table(
        "each-run",
        "Each run, with the fields in which the jobs differ.",
        columns,
        rows,
        ("seed", "rounds", *(name for name in fields if all(_is_number(value) for value in known[name]))),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fact(name: str, value: Any) -> str:
    if value in ("", -1):
        return "-"
    if name == "started_at":
        return _time(str(value))
    return f"{value[:SHORT]}" if name in HASHES else str(value)


def _time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def _whole(root: xr.Dataset, name: str) -> str:
    value = root[name].values.tolist()[0]
    return _fact(name, value) if name == "started_at" or value in ("", -1) else str(value)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else text_of(value)
    return str(value).lower() if isinstance(value, bool) else str(value) or "-"


def _jobs(root: xr.Dataset, groups: Sequence[Group]) -> list[Block]:
    """The resolved job of each group's first run."""
    jobs = root["job"].values.tolist()
    found: list[Block] = []
    for group in groups[:MOST_JOBS]:
        title = f"The job of {group.label}" + (
            f", seed {group.seeds[0]}; its other runs differ in the seed, and at most in how they were computed"
            if len(group.runs) > 1
            else ""
        )
        found.append(Details(title, str(jobs[group.places[0]]).strip()))
    if len(groups) > MOST_JOBS:
        found.append(Note(f"The jobs of the first {MOST_JOBS} of {len(groups)} groups. `fedsim show RUN.h5` has the others."))
    return found


def _hashes(root: xr.Dataset) -> Details:
    names = root["run"].values.tolist()
    lines = [f"{value or 'not finished':64}  {name}" for name, value in zip(names, root["weights_sha256"].values.tolist(), strict=True)]
    return Details("SHA-256 of the final weights of each run", "\n".join(lines))
