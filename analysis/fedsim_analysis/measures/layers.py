"""Of each layer and round: the density, and how much of the masks changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.curves import ROUND, Curve
from fedsim_analysis.measures.groups import Group, group_of, groups
from fedsim_analysis.measures.intervals import mean_and_half
from fedsim_analysis.measures.masks import has_masks, sizes
from fedsim_analysis.measures.nodes import Lacking, Numbers, column, is_tree, labels, needed, place_of, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

CHURN = "Mask churn"


@dataclass(frozen=True)
class Heat:
    """A heat map: `values` (rows, columns) in `units`; `title` names what the colour shows."""

    label: str  # of the run or the group; empty of all runs
    values: Numbers
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_label: str
    column_label: str
    title: str
    units: str
    share: bool
    n: int  # runs that the values are the mean of


def layer_density(runs: Runs, run: str | None = None, group: str | None = None) -> Heat:
    """(layers, rounds) kept share of each layer's weights, of one run or as the mean of a group; by default of the first group.

    Lacking where the runs have no densities of layers.
    """
    values = needed(runs, "layers", "density")  # (run, round, layer)
    if run is not None:
        held, label = [place_of(runs, "layers", run)], run
    else:
        chosen = group_of(runs, "layers", group)
        held, label = list(chosen.places), chosen.label
    mean = mean_and_half(values[held])[0]
    measured, own = np.isfinite(mean).any(axis=1), np.isfinite(mean).any(axis=0)
    rounds = round_numbers(runs, "layers")[measured]
    names = np.array(labels(runs, "layers", "layer"), dtype=object)[own]
    shown = (tuple(map(str, names)), tuple(map(str, rounds)), "Layer", "Round", "Density", "1", True)
    return Heat(label, mean[measured][:, own].T, *shown, len(held))


def churn(runs: Runs) -> list[Curve]:
    """Per round: weights that came to the masks plus weights that left them, over the weights that the masks keep; from round 1 on.

    A curve for each group whose runs have masks. Needs the DataTree: the changes stand in `layers`, the sizes in `masks`.
    """
    changed, kept = changes(runs)
    shares, numbers = np.where(kept > 0, changed / np.where(kept > 0, kept, 1), np.nan), round_numbers(runs, "layers")
    of = numbers > 0
    return [curve for group in groups(runs, "layers") if (curve := over_rounds(group, numbers[of], shares[:, of], CHURN)) is not None]


def changes(runs: Runs) -> tuple[Numbers, Numbers]:
    """(runs, rounds) weights that came or left, and weights that the masks keep. Lacking where no run has masks."""
    if not is_tree(runs):
        raise Lacking("the churn of masks needs the nodes 'layers' and 'masks': give the DataTree of fedsim_analysis.open(RUNS)")
    has = has_masks(runs)
    names, known = [f"{layer}.weight" for layer in labels(runs, "layers", "layer")], [sizes(runs, i) for i in range(len(has))]
    weights = np.array([[each.get(name, 0) for name in names] for each in known], float)[:, None, :]  # of the run's own network
    changed = column(runs, "layers", "grown") + column(runs, "layers", "pruned")
    kept = np.where(weights > 0, column(runs, "layers", "density") * weights, 0.0)
    return np.where(weights > 0, changed, 0.0).sum(axis=2), np.where(has[:, None], kept.sum(axis=2), np.nan)


def over_rounds(group: Group, rounds: NDArray[np.int64], values: Numbers, title: str) -> Curve | None:
    """The curve of a group from (runs, rounds) of shares; None where nothing was measured."""
    mean, half, count = mean_and_half(values[list(group.places)])
    points = count > 0
    if not points.any():
        return None
    mean, half = mean[points], half[points]
    line = (rounds[points], rounds[points].astype(float), mean, mean - half, mean + half, count[points])
    return Curve(group.label, group.method, *line, group.runs, ROUND.title, ROUND.units, title, "1", True, group.finished, group.style)
