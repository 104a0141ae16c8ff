"""The next bottleneck of a run: the phase that takes most of its time, and how near it comes to the machine's roof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.reporting.formatting import part, quantity
from fedsim.storage.reader import RunReader

NEAR = 0.2  # share of a roof, below which something else holds a phase up
OF_NO_ROOF = {
    "broadcast": "more local work a round (train.epochs), or fewer ranks",
    "reduce": "more local work a round (train.epochs), or fewer ranks",
    "server": "the method's own work on rank 0, which more ranks do not make faster",
    "evaluate": "evaluate more seldom (evaluate.every), or fewer clients (evaluate.clients)",
    "record": "write checkpoints more seldom (execution.checkpoint_every)",
}


@dataclass(frozen=True)
class Reach:
    """What a rank that trains achieves, per second, and the most it could; not-a-number where it was not measured."""

    flops: float  # of kept weights
    dense_flops: float  # those of pruned ones added
    bytes: float
    peak_flops: float
    peak_bytes: float

    @property
    def arithmetic(self) -> float:
        return self.flops / self.peak_flops

    @property
    def memory(self) -> float:
        """0 where it is not known, or more than memory gives: caches serve such steps, and memory does not hold them up."""
        return self.bytes / self.peak_bytes if self.bytes <= self.peak_bytes else 0.0


def beside(run: RunReader) -> set[str]:
    """The phases that go on while others do: rank 0 records while the other ranks train."""
    return {"record"} if run.attributes.get("ranks", 1) > 1 else set()


def bottleneck(run: RunReader) -> str:
    """One line; empty where no time was recorded."""
    spent = {name: float(np.nansum(run.timing(name))) for name in set(run.names("timing")) - beside(run)}
    total = sum(spent.values())
    if not total > 0:
        return ""
    phase = max(spent, key=lambda name: spent[name])
    return f"{phase}, {spent[phase] / total:.0%} of the time{_compute(run) if phase == 'compute' else _other(run, phase)}"


def _other(run: RunReader, phase: str) -> str:
    rate = _rate(run, phase, "bytes")
    return (
        f" ({quantity(rate, 'B/s')})" if np.isfinite(rate) else ""
    ) + f": {OF_NO_ROOF.get(phase, 'it is not known what would make it faster')}"


def _compute(run: RunReader) -> str:
    """How near the roof a rank comes, and what would help."""
    reach, plan = _reach(run), run.plan
    more = "more ranks" if _working(run) < plan.get("packs", np.inf) else "more ranks, and packs for them (execution.packs)"
    if not np.isfinite(reach.arithmetic):
        return f": {more}"
    if max(reach.arithmetic, reach.memory) < NEAR:
        return _far(reach, plan, more)
    if reach.arithmetic >= reach.memory:
        used = part(reach.flops, reach.peak_flops, "FLOP/s")
        return f", at {reach.arithmetic:.0%} of the arithmetic roof ({used} a rank): {more}, or a smaller model"
    used = part(reach.bytes, reach.peak_bytes, "B/s")
    return f", at {reach.memory:.0%} of the memory roof ({used} a rank): ranks on further nodes, or larger batches"


def _far(reach: Reach, plan: dict[str, Any], more: str) -> str:
    """What holds up a phase far from both roofs: arithmetic on what was pruned, or the steps' own overhead."""
    low = f", at {reach.arithmetic:.0%} of the arithmetic roof ({part(reach.flops, reach.peak_flops, 'FLOP/s')} a rank)"
    dense = reach.dense_flops / reach.peak_flops
    if dense >= NEAR:
        return f"{low}, at {dense:.0%} counting pruned weights: sparse or compacted execution would help, or {more}"
    small = "larger batches" + ("" if plan.get("fleet", "serial") != "serial" else ', clients stacked (execution.fleet = "packed")')
    return f"{low}: most of it is the overhead of small steps; {small} would help, or {more}"


def _reach(run: RunReader) -> Reach:
    peaks = (float(run.attributes.get(f"peak_{what}", np.nan)) for what in ("flops", "bytes"))
    rates = (_rate(run, "compute", what) / _working(run) for what in ("flops", "dense_flops", "bytes"))
    return Reach(*rates, *peaks)


def _working(run: RunReader) -> int:
    """The ranks that train: all but rank 0, where it is not alone, and no more than there are packs."""
    return int(min(max(run.attributes.get("ranks", 1) - 1, 1), run.plan.get("packs", np.inf)))


def _rate(run: RunReader, phase: str, what: str) -> float:
    """Per second of a phase, over all rounds in which it was measured; not-a-number where it never was."""
    name = f"{phase}_{what}"
    if name not in run.names("speed"):
        return float("nan")
    rates, seconds = run.speed(name), run.timing(phase)
    seen = np.isfinite(rates)
    return float((rates[seen] * seconds[seen]).sum() / seconds[seen].sum()) if seen.any() else float("nan")
