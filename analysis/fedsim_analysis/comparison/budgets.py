"""Accuracy at equal bytes, FLOPs, time, energy and memory, and what it takes to reach a target accuracy. Nothing is interpolated.

Bytes are those up and down and FLOPs those of training, of all clients in all rounds up to an evaluation, round 0 included; time and energy
are those of emulated devices. At a budget a
run has the accuracy of its last evaluation by which it had spent no more; the evaluation of round 0, before training, is none. Without a
budget it is the smallest that a group has spent in the end (the most of its seeds), so that each run of the cheapest group is there to its
end.

Memory does not add up: a client has it or has not. A run has its last accuracy where the client that needs most, in any round, needs no
more than the limit, and none where it needs more. Without a limit it is the smallest in which each method has a group that fits; the best
group of each method is marked, for a method's density and its like may be chosen for the memory that there is.

A target counts as reached at the first evaluation that is at least as good. Without one it is 95 % of the best group's mean of last
accuracies. Groups of other data have budgets, limit and target of their own. A group with a run that has not ended sets none of them,
unless all groups have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis.comparison import jobs, statistics
from fedsim_analysis.comparison.grouping import Comparison, Group
from fedsim_analysis.comparison.metrics import BYTES, CLOCK, ENERGY, FLOPS, METRICS, total
from fedsim_analysis.comparison.outcomes import Outcome
from fedsim_analysis.comparison.tables import about, differences, families, frame, spread

COSTS = {"bytes": BYTES, "flops": FLOPS, "clock": CLOCK, "energy": ENERGY}
RESOURCES = (*COSTS, "memory")
MEMORY = METRICS["max_client_memory"]
NEAR = 0.95  # of the best mean accuracy is the target


def resources(comparison: Comparison) -> list[str]:
    """Those of RESOURCES that can be compared: the clock and the energy of devices only where some run has them."""
    runs = [run for group in comparison.groups for run in group.runs]
    return [name for name in RESOURCES if name not in ("clock", "energy") or any(set(COSTS[name]) <= set(run.names) for run in runs)]


def spent(run: Outcome, resource: str) -> np.ndarray:
    """(rounds + 1,) bytes, FLOPs, seconds or joules up to the end of each round; NaN where the file has none."""
    of_rounds = total(run, COSTS[resource])
    return of_rounds if np.isnan(of_rounds).all() else np.nancumsum(of_rounds)


def evaluations(run: Outcome, score: str) -> tuple[np.ndarray, np.ndarray]:
    """The evaluated rounds, (E,), and what they gave, (E,)."""
    values = run.column(score)
    rounds = np.flatnonzero(~np.isnan(values))
    return rounds, values[rounds]


def final(run: Outcome, score: str) -> float:
    return _last(evaluations(run, score)[1])


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else np.nan


def within(run: Outcome, resource: str, budget: float, score: str) -> tuple[int, float]:
    """The last evaluated round after training by whose end the run had spent no more, and its accuracy; (-1, NaN) where there is none."""
    rounds, values = evaluations(run, score)
    inside = np.flatnonzero((spent(run, resource)[rounds] <= budget) & (rounds > 0))
    return (int(rounds[inside[-1]]), float(values[inside[-1]])) if len(inside) else (-1, np.nan)


def at_equal(
    comparison: Comparison, budgets: Mapping[str, float | None] | None = None, baseline: str | None = None, score: str = "accuracy"
) -> pd.DataFrame:
    """A row per resource of `resources` and group: the accuracy that it has at the same cost.

    score: the column of /rounds that counts as accuracy. budgets: by resource; those that are None or missing are chosen
    (above). `budget`; `seeds` that have an accuracy within it, `mean`, `mean_95`, `least`, `most` over them; `round` the mean of
    their last rounds within it, NaN for memory; `spent` the mean of what they had spent by then, or the memory that the group needs;
    `best` whether it is the best of its method; and the columns of `paired`.
    """
    rows, held = [], families(comparison, baseline)
    for resource in resources(comparison):
        chosen = {name: _budget(block, resource, (budgets or {}).get(resource)) for name, block in comparison.blocks.items()}
        found = {group: _at(group, resource, chosen[group.data], score) for group in comparison.groups}
        numbers = {group: values for group, (values, _) in found.items()}
        compared, best = differences(held, numbers), _best(numbers)
        for group, (values, cost) in found.items():
            row = about(comparison, group) | {"score": score, "resource": resource, "budget": chosen[group.data]}
            rows.append(row | spread(values) | cost | {"best": group in best} | compared[group])
    return frame(rows)


def _at(group: Group, resource: str, budget: float, score: str) -> tuple[dict[int, float], dict[str, float]]:
    if resource == "memory":
        needed = {run.seed: MEMORY.of(run) for run in group.runs}
        values = {run.seed: final(run, score) if needed[run.seed] <= budget else np.nan for run in group.runs}
        return values, {"round": np.nan, "spent": max(needed.values())}
    found = {run.seed: within(run, resource, budget, score) for run in group.runs}
    inside = [(found[run.seed][0], spent(run, resource)[found[run.seed][0]]) for run in group.runs if found[run.seed][0] >= 0]
    cost = {"round": statistics.mean([r for r, _ in inside]), "spent": statistics.mean([cost for _, cost in inside])}
    return {seed: value for seed, (_, value) in found.items()}, cost


def _budget(block: Sequence[Group], resource: str, given: float | None) -> float:
    if given is not None:
        return given
    ends = {id(group): _most(group, resource) for group in _complete(block)}
    if resource != "memory":
        return min((end for end in ends.values() if end == end), default=np.nan)
    least: dict[Any, float] = {}
    for group in _complete(block):
        method, end = repr(group.job.get(jobs.METHOD)), ends[id(group)]
        least[method] = min(least.get(method, np.inf), end if end == end else np.inf)
    return max((end for end in least.values() if end < np.inf), default=np.nan)


def _most(group: Group, resource: str) -> float:
    """The most that a run of the group has spent, or needs."""
    of_runs = [MEMORY.of(run) if resource == "memory" else _last(spent(run, resource)) for run in group.runs]
    return float(np.max(of_runs))


def _complete(block: Sequence[Group]) -> Sequence[Group]:
    """Groups whose runs are all finished; all groups where there are none."""
    return [group for group in block if not group.unfinished] or block


def _best(numbers: Mapping[Group, Mapping[int, float]]) -> list[Group]:
    """Of each method on each data the group of the largest mean, of those all of whose runs have a number."""
    best: dict[tuple[str, str], tuple[float, Group]] = {}
    for group, values in numbers.items():
        mean = statistics.mean(list(values.values()))
        key = (group.data, repr(group.job.get(jobs.METHOD)))
        if mean == mean and (key not in best or mean > best[key][0]):
            best[key] = (mean, group)
    return [group for _, group in best.values()]


def target_of(block: Sequence[Group], score: str) -> float:
    """95 % of the best group's mean of last accuracies; NaN where nothing was evaluated."""
    means = [statistics.mean([final(run, score) for run in group.runs]) for group in _complete(block)]
    return NEAR * max((mean for mean in means if mean == mean), default=np.nan)


def to_target(comparison: Comparison, target: float | None = None, score: str = "accuracy") -> pd.DataFrame:
    """A row per group: `target`; `seeds`, and `reached`, how many of them reached it; over those `rounds`, `bytes`, `flops`, with devices
    `clock` and `energy`, each the mean, and with _95 half its 95 % interval. NaN where none reached it, and no interval of a single one."""
    chosen = {name: target_of(block, score) if target is None else target for name, block in comparison.blocks.items()}
    rows, costs_of = [], [name for name in resources(comparison) if name in COSTS]
    for group in comparison.groups:
        reached = list(_reached(group, chosen[group.data], score, costs_of))
        row = about(comparison, group) | {"score": score, "target": chosen[group.data]}
        row |= {"seeds": len(group.runs), "reached": len(reached)}
        for i, name in enumerate(("rounds", *costs_of)):
            values = [costs[i] for costs in reached]
            row |= {name: statistics.mean(values), f"{name}_95": statistics.half_interval(values)}
        rows.append(row)
    return frame(rows)


def _reached(group: Group, target: float, score: str, costs: Sequence[str]) -> Iterator[tuple[float, ...]]:
    """Of each run that reached the target: the round, and what it had cost."""
    for run in group.runs:
        rounds, values = evaluations(run, score)
        if len(hits := rounds[values >= target]):
            yield (float(hits[0]), *(float(spent(run, resource)[hits[0]]) for resource in costs))
