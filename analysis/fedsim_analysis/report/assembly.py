"""All of a page from run files: which sections there are, which figures stand in them, and which are left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import fedsim_analysis
from fedsim_analysis import comparison
from fedsim_analysis.comparison.grouping import GIVEN
from fedsim_analysis.measures import METRICS, Group, Lacking, final, groups, metric_of
from fedsim_analysis.report import clients, devices, origins, sparsity, summary, tables, tradeoffs, trends
from fedsim_analysis.report.contents import Block, Figure, Report, Section

if TYPE_CHECKING:
    import xarray as xr

MOST_GROUPS = 12  # in figures
LOADED = 2**26  # bytes of a column that is kept in memory, at most

Builder = tuple[str, Callable[[], Block | Iterator[Block]]]  # what it shows, for the list of what is left out


@dataclass(frozen=True)
class Drawn:
    """A page, the runs that its figures show, and the lines of Python that open these."""

    report: Report
    runs: xr.DataTree
    opening: str


def report(runs: Sequence[Path], folder: str, now: datetime | None = None, most: int = MOST_GROUPS) -> Drawn:
    """The page of the runs. most: groups in figures. ValueError and OSError where a run cannot be read."""
    tree = fedsim_analysis.open(runs)
    every = groups(tree)
    shown = _shown(tree, every, most)
    drawn = tree if len(shown) == len(every) else fedsim_analysis.open([path for group in shown for path in _paths(tree, group.places)])
    _load(drawn)
    chosen = groups(drawn)
    left_out: list[str] = []
    if len(shown) < len(every):
        left_out.append(f"Figures show the {len(shown)} jobs of {len(every)} with the highest accuracy; the tables have all.")
    found = comparison.collect(_paths(tree), sort=GIVEN)
    names = _names(tree, every, found)
    sections = [
        summary.section(tree, found, names),
        *_figures(drawn, chosen, left_out, list(tables.compared(found, names)) if len(found.groups) > 1 else []),
        origins.section(tree, every, _fields(tree), _opening(drawn)),
    ]
    return Drawn(_page(tree, every, sections, chosen, left_out, folder, now or datetime.now(UTC)), drawn, _opening(drawn))


def _page(
    tree: xr.DataTree,
    every: Sequence[Group],
    sections: Sequence[Section],
    chosen: Sequence[Group],
    left_out: list[str],
    folder: str,
    now: datetime,
) -> Report:
    count = tree.sizes["run"]
    jobs = "1 job" if len(every) == 1 else f"{len(every)} jobs"
    title = every[0].label if len(every) == 1 else " · ".join(dict.fromkeys(group.method for group in every))
    many = len({group.method for group in every}) > 4
    return Report(
        title=f"{len(every)} jobs, {count} runs" if many else title,
        subtitle=f"{jobs}, {count} {'run' if count == 1 else 'runs'} of fedsim",
        sections=[section for section in sections if section.blocks],
        groups=[(group.label, group.style.colour) for group in chosen] if len(chosen) > 1 else [],
        warning=summary.warning(tree),
        written=f"Written {now:%Y-%m-%d %H:%M} UTC by fedsim report{_version()}. All numbers come from the run files.",
        folder=folder,
        left_out=left_out,
    )


def _version() -> str:
    try:
        return f" {version('fedsim')}"
    except PackageNotFoundError:
        return ""


def _shown(tree: xr.DataTree, every: Sequence[Group], most: int) -> list[Group]:
    """The groups in figures: all, or those with the highest mean accuracy, in the order of all."""
    if len(every) <= most:
        return list(every)
    try:
        accuracy = final(tree, metric_of(tree, "accuracy"))
    except Lacking:
        return list(every[:most])
    means = {group.label: float(accuracy[list(group.places)].mean()) for group in every}
    best = sorted(every, key=lambda group: -means[group.label] if means[group.label] == means[group.label] else 1.0)[:most]
    return [group for group in every if group in best]


def _names(tree: xr.DataTree, every: Sequence[Group], found: comparison.Comparison) -> dict[str, str]:
    """Label of a group of the comparison -> label of its curves, which is shorter where methods differ in many fields."""
    paths = _paths(tree)
    called = {paths[group.places[0]]: group.label for group in every}
    return {group.label: called[path] for group in found.groups for run in group.runs if (path := str(run.path)) in called}


def _load(tree: xr.DataTree) -> None:
    """Reads now, and once, the columns that several figures need, those of clients and masks aside."""
    wanted = {"rounds": {name for metric in METRICS.values() for name in metric.columns}, "layers": {"density", "grown", "pruned"}}
    for place, names in wanted.items():
        for name, variable in tree[place].variables.items():
            if name in names and variable.nbytes <= LOADED:
                variable.load()


def _paths(tree: xr.DataTree, places: Sequence[int] | None = None) -> list[str]:
    paths = tree.to_dataset()["path"].values.tolist()
    return [str(paths[i]) for i in (range(len(paths)) if places is None else places)]


def _opening(drawn: xr.DataTree) -> str:
    listed = "".join(f"\n    {path!r}," for path in _paths(drawn))
    return f"import fedsim_analysis\nfrom fedsim_analysis import plots\n\nruns = fedsim_analysis.open([{listed}\n])"


def _fields(tree: xr.DataTree) -> list[str]:
    """The fields of the jobs in which the runs differ."""
    root = tree.to_dataset()
    return [str(name) for name in root.coords if "." in str(name)]


def _figures(runs: xr.DataTree, chosen: Sequence[Group], left_out: list[str], compared: Sequence[Block]) -> list[Section]:
    trend, front = partial(trends.trend, runs), partial(tradeoffs.front, runs)
    accuracy: list[Builder] = [
        ("accuracy over rounds", partial(trend, "accuracy", "Accuracy over rounds", "On the global test set.")),
        ("loss over rounds", partial(trend, "loss", "Test loss over rounds", "Mean cross-entropy on the global test set.")),
        (
            "accuracy over bytes",
            partial(trend, "accuracy", "Accuracy over bytes", "Bytes of all clients, up and down, until then.", over="bytes"),
        ),
        (
            "accuracy over FLOPs",
            partial(trend, "accuracy", "Accuracy over FLOPs", "Training FLOPs of all clients until then.", over="flops"),
        ),
    ]
    tradeoff: list[Builder] = [(f"accuracy against {cost}", partial(front, cost)) for cost in tradeoffs.COSTS]
    tradeoff.append(("paired differences", partial(tradeoffs.pairs, runs)))
    tradeoff.append(("tables of the comparison", partial(iter, compared)))
    costs: list[Builder] = [
        ("bytes", partial(trend, "bytes", "Bytes sent", "Of all clients, up and down, added over the rounds.")),
        ("FLOPs", partial(trend, "flops", "Training FLOPs", "Of all clients, added over the rounds.")),
        (
            "memory",
            partial(trend, "memory", "Memory of the largest client", "Training memory in each round, as fedsim counts it.", per_round=True),
        ),
        ("cost by phase", partial(trends.cost_of_phases, runs)),
    ]
    masks: list[Builder] = [
        ("density over rounds", partial(trend, "density", "Density", "Kept weights over all weights of the original network.")),
        ("density of layers", partial(sparsity.densities, runs, chosen)),
        ("churn of masks", partial(sparsity.changes, runs)),
        ("overlap of masks", partial(sparsity.overlaps, runs)),
        ("overlap of the masks of runs", partial(sparsity.overlaps_of_runs, runs)),
    ]
    of_clients: list[Builder] = [
        ("spread over clients", partial(clients.spread, runs)),
        ("the worst client", partial(clients.worst, runs)),
        ("the partition", partial(clients.labels, runs)),
        ("clients at the end", partial(clients.at_the_end, runs)),
    ]
    parts = (
        ("accuracy", "Accuracy", accuracy),
        ("tradeoffs", "Accuracy against cost", tradeoff),
        ("costs", "Costs", costs),
        ("sparsity", "Masks", masks),
        ("of-clients", "Clients", of_clients),
        *([("devices", "Devices", found)] if (found := devices.builders(runs)) else []),
    )
    return [Section(name, title, _filled(list(_built(builders, left_out)))) for name, title, builders in parts]


def _filled(blocks: Sequence[Block]) -> list[Block]:
    """Figures stand two in a line; one that is left alone in its line gets the whole of it."""
    found, alone = list(blocks), False
    for i, block in enumerate(blocks):
        alone = isinstance(block, Figure) and not alone
        if alone and isinstance(block, Figure) and (i + 1 == len(blocks) or not isinstance(blocks[i + 1], Figure)):
            found[i] = replace(block, wide=True)
            alone = False
    return found


def _built(builders: Iterable[Builder], left_out: list[str]) -> Iterator[Block]:
    for what, builder in builders:
        try:
            made = builder()
            yield from list(made) if isinstance(made, Iterator) else [made]
        except Lacking as error:
            left_out.append(f"{what[0].upper()}{what[1:]}: {error}.")
