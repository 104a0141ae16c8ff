"""Figures of clients: how their accuracy is spread, the worst of them, and who holds images of which class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis.measures import Lacking, distribution, of_clients, partition
from fedsim_analysis.report import charts, sparsity, trends
from fedsim_analysis.report.contents import Call, Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures import ClientValues, Group
    from fedsim_analysis.measures.nodes import Runs
    from fedsim_analysis.report.charts import Styles

STEPS = 200  # of a curve over clients


def spread(runs: Runs, styles: Styles) -> Figure:
    """Median over clients, and a band from the 10th to the 90th percentile."""
    found = distribution(runs)
    data = []
    for one in found:
        at = {level: row for level, row in zip(one.levels, one.quantiles, strict=True)}
        data += charts.line(one.label, styles[one.label], one.rounds.astype(float), at[0.5], at[0.1], at[0.9])
    first = found[0]
    y = charts.axis(first.title, first.units, first.share) | (
        {"range": charts.share_range([one.quantiles for one in found])} if first.share else {}
    )
    layout = charts.layout(charts.axis("Round", rangemode="tozero"), y, len(found), hovermode="x unified")
    most = max(int(one.clients.max()) for one in found)
    seeds = max(int(one.n.max()) for one in found)
    text = f"Lines: the median over {most:,} clients. Bands: from the 10th to the 90th percentile over clients{_mean(seeds)}."
    return Figure("distribution", "Spread of accuracy over clients", text, {"data": data, "layout": layout}, Call("distribution"))


def _mean(seeds: int) -> str:
    return f", each the mean over {seeds} seeds" if seeds > 1 else ""


def worst(runs: Runs, styles: Styles) -> Figure:
    text = "Accuracy of the client with the lowest accuracy of the round, which need not be the same client in each round."
    return trends.trend(runs, styles, "worst_client", "The worst client", text)


def at_the_end(runs: Runs, styles: Styles, groups: Sequence[Group]) -> Figure:
    """For each group's first run, the clients sorted by accuracy."""
    held = [one for group in groups if (one := _first(runs, group)) is not None]
    if not held:
        raise Lacking("no run has measured the accuracy of each client")
    data = [trace for one in held for trace in _sorted(one, styles)]
    y = charts.axis(held[0].title, held[0].units, held[0].share) | {"range": charts.share_range([one.values for one in held])}
    layout = charts.layout(charts.axis("Clients, from the worst to the best", share=True), y, len(held))
    of_seeds = " of the first seed" if any(len(group.runs) > 1 for group in groups) else ""
    worst_ones = "; ".join(f"{one.worst} of {one.label} with {100 * one.values.min():.1f} %" for one in held[:4])
    text = f"Each client of the last evaluated round{of_seeds}, sorted by its accuracy. The worst clients: {worst_ones}."
    return Figure("clients", "Clients at the end", text, {"data": data, "layout": layout}, Call("clients"))


def _first(runs: Runs, group: Group) -> ClientValues | None:
    try:
        return of_clients(runs, group.runs[0])
    except Lacking:
        return None


def _sorted(one: ClientValues, styles: Styles) -> list[charts.Chart]:
    order = np.argsort(one.values, kind="stable")
    some = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), STEPS)).round().astype(int))]
    share = (np.searchsorted(one.values[order], one.values[some], side="left") + 1) / len(order)
    names = [f"client {one.clients[i]}" for i in some]
    more = {"text": [charts.escaping.label(name) for name in names], "hovertemplate": "%{fullData.name}, %{text}: %{y:.1%}<extra></extra>"}
    return charts.line(one.label, styles[one.label], share, one.values[some], **more)


def labels(runs: Runs) -> Figure:
    found = partition(runs)
    total = int(np.nansum(found.values))
    text = f"Training images of each class that each client holds in the run {found.label}; {total:,} in all."
    return sparsity.heat_map("partition", "Who holds images of which class", text, Call("partition"), found)
