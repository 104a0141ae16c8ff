"""`fedsim bench mask-adjustment`: seconds of a FedTiny round that adjusts a mask over those of the plain round before it, in one process.

Every second round adjusts, so that each has a plain neighbour, and every block of layers has its turn. Beside it what the
allocator's level rises more while one client is in an adjusting round than in a plain one, against the block's buffers and the
gradient of its largest layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from fedsim.config.job import Job, load
from fedsim.core.tree import Tree
from fedsim.errors import BadInput
from fedsim.federated.client_work import Train, TrainAndScore
from fedsim.federated.protocol import Work
from fedsim.fleet.messages import Pack, WorkOrder
from fedsim.fleet.packing import images
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import make_fleet
from fedsim.fleet.serial import carry_out
from fedsim.methods.fedtiny import FedTiny
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning.plan import resolve

DEFAULT = ("jobs/bench/mask_adjustment.toml",)


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job, and one per block of layers."""
    torch.set_num_threads(1)
    malloc.hold()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    times = Table(title=f"an adjusting round over the plain one before it, one thread; torch {torch.__version__}", title_justify="left")
    for name in ("job", "plan", "plain, s", "adjusting, s", "ratio", "lowest", "highest"):
        times.add_column(name, justify="left" if name in ("job", "plan") else "right")
    rises = Table(title="rise of the allocator's level for one client on dense kernels, bytes", title_justify="left")
    for name in ("job", "block", "plain", "adjusting", "more", "buffers and a layer's gradient", "ratio"):
        rises.add_column(name, justify="left" if name == "job" else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        _check(job)
        parts = build_experiment(job)
        plan = resolve(parts, console.print)
        seconds, shared = _rounds(parts, plan)
        times.add_row(*_compared(parts, plan, seconds))
        for row in _risen(parts, shared):
            rises.add_row(job.name, *row)
    console.print(times, rises)
    return 0


def _check(job: Job) -> None:
    method = job.method.use
    if not (isinstance(method, FedTiny) and method.adjust_every == 2 and method.stop_round > job.rounds >= 4 and job.rounds % 2 == 0):
        raise BadInput(
            f"{job.name}: fedsim bench mask-adjustment needs fedtiny with adjust_every = 2, stop_round > rounds, 4, 6, 8 … rounds"
        )


def _rounds(parts: Experiment, plan: Plan) -> tuple[list[float], Tree]:
    """Seconds of every round but the selection, and the model after them."""
    fleet = make_fleet(plan, parts.site, parts.account(), time.perf_counter)
    state, seconds = parts.method.init(parts.setting, parts.population.public()), []
    for r in range(parts.setting.rounds + 1):
        fleet.open(r)
        began = time.perf_counter()
        state, _ = parts.method.round(parts.setting, state, fleet, r)
        seconds.append(time.perf_counter() - began)
    return seconds[1:], state.shared


def _compared(parts: Experiment, plan: Plan, seconds: list[float]) -> tuple[str, ...]:
    """The first pair of rounds warms up."""
    pairs = list(zip(seconds[::2], seconds[1::2], strict=True))[1:]
    ratios = sorted(adjusting / plain for plain, adjusting in pairs)
    figures = (median(plain for plain, _ in pairs), median(adjusting for _, adjusting in pairs), median(ratios), ratios[0], ratios[-1])
    return parts.job.name, plan.describe(), *(f"{figure:.3f}" for figure in figures)


def _risen(parts: Experiment, shared: Tree) -> list[tuple[str, ...]]:
    """For every block: the rise in a plain and in an adjusting round of one client, on dense kernels, and the bound."""
    parts.setting.net.set_sparse_costs({})
    plain = rise(partial(_visit, parts, Train.at(parts.setting, 1), shared))
    rows = {}
    for r in range(1, parts.setting.rounds + 1):
        block, moves = parts.method.adjustment(parts.setting.net, shared, r)
        if moves and block not in rows:
            adjusting = rise(partial(_visit, parts, TrainAndScore.growing(parts.setting, 1, moves), shared))
            bound = 8 * sum(moves.values()) + 4 * max(parts.setting.net.sizes[layer] for layer in moves)
            rows[block] = (
                str(block),
                *(f"{figure:,}" for figure in (plain, adjusting, adjusting - plain, bound)),
                f"{(adjusting - plain) / bound:.2f}",
            )
    return [rows[block] for block in sorted(rows)]


def _visit(parts: Experiment, work: Work, shared: Tree) -> None:
    """One client's whole round."""
    order = WorkOrder(work, parts.setting.net, shared, 1, images(parts.site, 0))
    with torch.no_grad():
        carry_out(order, Pack([0], {}, [None], [[0], *([0] for _ in work.feeds)]), parts.site)


def rise(visit: Callable[[], None]) -> int:
    """Bytes by which the allocator's level rises at most, by torch's profiler; the first visit warms up."""
    visit()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        visit()
    events = recorded.profiler.kineto_results.events()
    level = highest = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        level += change
        highest = max(highest, level)
    return highest
