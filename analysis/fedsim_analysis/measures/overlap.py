"""Overlap of masks (Jaccard index): with the first, the previous or the last of a run, of all rounds, of runs at their ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsim_analysis.measures.curves import Curve
from fedsim_analysis.measures.groups import groups
from fedsim_analysis.measures.layers import Heat, over_rounds
from fedsim_analysis.measures.masks import Bits, changed_rounds, has_masks, last_of, last_rows, layers_of, of_rounds, shared, sizes
from fedsim_analysis.measures.nodes import Lacking, Numbers, labels, place_of, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

Against = Literal["first", "previous", "last"]
TITLES = {
    "first": "Overlap with first mask",
    "previous": "Overlap with previous mask",
    "last": "Overlap with last mask",
}
MOST = 64  # rounds of a matrix of rounds


def overlap(runs: Runs, against: Against = "first") -> list[Curve]:
    """Weights that the mask after each round shares with another, over those that either keeps: a curve for each group with masks.

    against: "first", "previous" (of the round before) or "last", of the same run.

    Takes the DataTree, or the Dataset of masks. Lacking where no run has masks.
    """
    if against not in TITLES:
        raise Lacking(f"there is no overlap with {against!r}; there is one with {', '.join(TITLES)}")
    has = has_masks(runs)
    numbers = round_numbers(runs, "masks")
    values = np.full((len(has), len(numbers)), np.nan)
    for i in np.flatnonzero(has):
        values[i] = _of_run(runs, int(i), len(numbers), against)
    return [curve for group in groups(runs, "masks") if (curve := over_rounds(group, numbers, values, TITLES[against])) is not None]


def _of_run(runs: Runs, i: int, width: int, against: Against) -> Numbers:
    """(rounds,) NaN after the run's last row, and in round 0 where there is no round before."""
    changed, last = changed_rounds(runs, i), last_rows(runs)[i]
    fixed = {"first": 0, "last": last}.get(against)
    constant = None if fixed is None else next(of_rounds(runs, i, [fixed]))
    values = np.full(width, np.nan)
    before: Bits | None = None
    for r, mask in zip(changed, of_rounds(runs, i, changed), strict=True):
        other = before if fixed is None else constant
        if other is not None:
            values[r : last + 1] = shared(mask, other)
        if fixed is None and r < last:
            values[r + 1 : last + 1] = 1.0  # as before, until it changes again
        before = mask
    return values


def overlap_of_rounds(runs: Runs, run: str | None = None, most: int = MOST) -> Heat:
    """(rounds, rounds) overlap of the masks of one run, by default the first with masks; of at most `most` rounds, evenly chosen."""
    has = has_masks(runs)
    i = int(np.flatnonzero(has)[0]) if run is None else place_of(runs, "masks", run)
    label = labels(runs, "masks", "run")[i]
    if not has[i]:
        raise Lacking(f"the run {label} has no masks")
    last = last_rows(runs)[i]
    rounds = sorted({int(r) for r in np.linspace(0, last, min(most, last + 1)).round()})
    names = tuple(str(round_numbers(runs, "masks")[r]) for r in rounds)
    values = _matrix(list(of_rounds(runs, i, rounds)))
    return Heat(label, values, names, names, "Round", "Round", "Overlap of masks", "1", True, 1)


def overlap_of_runs(runs: Runs) -> Heat:
    """(runs, runs) overlap of the masks after the last round of each run that has masks; NaN where two runs have other networks."""
    places = np.flatnonzero(has_masks(runs)).tolist()
    names = tuple(labels(runs, "masks", "run")[i] for i in places)
    weights, layers = [sizes(runs, i) for i in places], [layers_of(runs, i) for i in places]
    values = np.where(np.eye(len(places)), 1.0, np.nan)
    for kind in {tuple(each) for each in layers}:
        alike = [j for j, each in enumerate(layers) if tuple(each) == kind]
        union = dict(sorted({entry for j in alike for entry in weights[j].items()}))
        if all(weights[j].items() <= union.items() for j in alike):
            values[np.ix_(alike, alike)] = _matrix([last_of(runs, places[j], union) for j in alike])
    return Heat("", values, names, names, "Run", "Run", "Overlap of the last masks", "1", True, 1)


def _matrix(held: list[Bits]) -> Numbers:
    values = np.eye(len(held))
    for i, one in enumerate(held):
        for j in range(i):
            values[i, j] = values[j, i] = shared(one, held[j])
    return values
