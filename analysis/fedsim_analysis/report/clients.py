"""Figures of clients: how their accuracy is spread, the worst of them, and who holds images of which class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim_analysis.measures import Lacking, distribution, of_clients, partition, readable, scale_of, seeds_of
from fedsim_analysis.report import charts, sparsity, trends
from fedsim_analysis.report.contents import Call, Figure, Table

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

QUANTILES = {0.0: "worst", 0.1: "10th percentile", 0.5: "median", 0.9: "90th percentile", 1.0: "best"}


def spread(runs: Runs) -> Figure:
    """Median over clients, and a band from the 10th to the 90th percentile."""
    found = distribution(runs)
    scale = scale_of(np.concatenate([one.quantiles.ravel() for one in found]), found[0].units, found[0].share)
    hover = f"%{{fullData.name}}, median: {charts.number('y', scale)}<extra></extra>"
    data = []
    for one in found:
        at = dict(zip(one.levels, one.quantiles, strict=True))
        levels = (scale.factor * at[level] for level in (0.5, 0.1, 0.9))
        data += charts.line(one, one.rounds.astype(float), *levels, hovertemplate=hover)
    y = charts.axis(found[0].title, scale) | (charts.share_axis([one.quantiles for one in found]) if found[0].share else {})
    layout = charts.layout(charts.rounds([one.rounds for one in found]), y, [one.label for one in found], **charts.UNIFIED)
    most = max(int(one.clients.max()) for one in found)
    seeds = seeds_of(count for one in found for count in one.n)
    text = f"Lines: the median over {most:,} clients. Bands: from the 10th to the 90th percentile over clients{_mean(seeds)}."
    return Figure("distribution", "Spread of accuracy over clients", text, {"data": data, "layout": layout}, Call("clients"))


def _mean(seeds: str) -> str:
    return f", each the mean over {seeds}" if seeds else ""


def worst(runs: Runs) -> Figure:
    text = "Accuracy of the client with the lowest accuracy of the round, which need not be the same client in each round."
    return trends.trend(runs, "worst_client", "The worst client", text)


def at_the_end(runs: Runs) -> Table:
    """For each group, quantiles over clients after its last evaluated round, and the worst client of its first run."""
    rows = []
    for one in distribution(runs):
        last = dict(zip(one.levels, one.quantiles[:, -1], strict=True))
        first = of_clients(runs, next(run for run in one.runs if _has(runs, run)))
        quantiles = [readable(last[level], one.units, one.share) for level in QUANTILES]
        rows.append([one.label, str(one.n[-1]), str(one.rounds[-1]), f"{one.clients[-1]:,}", *quantiles, f"{first.worst} of {first.run}"])
    columns = ["job", "seeds", "round", "clients", *QUANTILES.values(), "worst client"]
    caption = "Accuracy of clients on their own test images in the last evaluated round: quantiles over clients, each the mean over seeds."
    return Table("clients-at-the-end", caption, columns, rows, columns[1:-1])


def _has(runs: Runs, run: str) -> bool:
    try:
        of_clients(runs, run)
    except Lacking:
        return False
    return True


def labels(runs: Runs) -> Figure:
    found = partition(runs)
    total = int(np.nansum(found.values))
    text = f"Training images of each class that each client holds in the run {found.label}; {total:,} in all."
    return sparsity.heat_map("partition", "Who holds images of which class", text, Call("partition"), found)
