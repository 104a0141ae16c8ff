"""`fedsim bench clock`: what devices add to a round of a large cohort, on rank 0 alone and beside the training of one rank.

Rank 0 alone: the same rounds on a fleet whose clients answer at once. Both are timed in turn, with devices and without.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job, load
from fedsim.federated import verbs
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Pack, PackResult, WorkerContext, WorkOrder
from fedsim.fleet.one_by_one import idle
from fedsim.fleet.serial import SerialFleet
from fedsim.simulation.devices.clock import add_clock, played
from fedsim.simulation.experiment import Experiment, build_experiment

DEFAULT = "jobs/bench/clock.toml"
ROUNDS = 15  # of each kind, in turn, after a first one that is not counted


class InstantFleet(LocalFleet):
    """Clients that answer at once: what the first one of an order would send without a step, for all."""

    name = "instant"
    _known: ClassVar[list[tuple[WorkOrder, PackResult]]] = []

    @staticmethod
    def carry_out(order: WorkOrder, pack: Pack, site: WorkerContext) -> PackResult:
        known = InstantFleet._known
        if not known or known[-1][0].shared is not order.shared:
            one = Pack(pack.clients[:1], {key: value[:1] for key, value in pack.own.items()}, pack.kept[:1], [c[:1] for c in pack.calls])
            known[:] = [(order, idle(order, one, site))]
        first = known[-1][1]
        answer = PackResult(first.total if pack.clients[0] == min(first.clients) else order.sum(), list(pack.clients))
        for name in ("each", "keep", "loss", "ones", "arrived", "open", "up"):
            rows = getattr(first, name)
            getattr(answer, name).update(dict.fromkeys(pack.clients, next(iter(rows.values()))) if rows else {})
        return answer


def main(jobs: list[Job], console: Console) -> int:
    """Prints seconds of a round with and without devices, and their ratio."""
    for job in jobs or [load(Path(DEFAULT))]:
        parts = build_experiment(job)
        table = Table(title=f"{job.name}: {parts.setting.cohort:,} clients a round, median of {ROUNDS}", title_justify="left")
        for name in ("what is timed", "without devices, ms", "with devices, ms", "ratio", "added, ms"):
            table.add_column(name, justify="left" if name == "what is timed" else "right")
        for what, kind in {"rank 0 alone": InstantFleet, "a round on one rank": SerialFleet}.items():
            without, having, ratio = timed(parts, kind)
            table.add_row(what, f"{1e3 * without:,.1f}", f"{1e3 * having:,.1f}", f"{ratio:.3f}", f"{1e3 * (having - without):,.1f}")
        console.print(table)
    return 0


def timed(parts: Experiment, kind: type[LocalFleet]) -> tuple[float, float, float]:
    """Median seconds of a round without and with devices, and the median of their ratios, round by round."""
    fleets = [kind(parts.site, parts.account(), 16, time.perf_counter) for _ in range(2)]
    add_clock(fleets[1], parts.devices)
    states = [verbs.init(parts.method, parts.setting, parts.population.public()) for _ in fleets]
    seconds: list[list[float]] = [[], []]
    rounds = ROUNDS if kind is InstantFleet else 3
    for r in range(1, rounds + 2):
        for i, fleet in enumerate(fleets):
            fleet.open(r)
            began = time.perf_counter()
            played(parts.method, parts.setting, states[i], fleet, r)
            seconds[i].append(time.perf_counter() - began)
    without, having = (each[1:] for each in seconds)
    return median(without), median(having), median(b / a for a, b in zip(without, having, strict=True))
