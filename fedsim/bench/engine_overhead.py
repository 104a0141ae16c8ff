"""`fedsim bench engine-overhead`: seconds per round of the engine over those of a bare PyTorch loop that does the same local steps.

Both run in this process, in turn, on one thread; medians over several rounds. The bare loop is what a careful author writes by
hand: one module, load_state_dict, torch.optim.SGD, batches by index from normalised float images, a weighted mean of state_dicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from fedsim import models
from fedsim.config.job import Job, load
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.registry import make_fleet
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning.plan import resolve
from fedsim.simulation.planning.timing import seconds_of

DEFAULT = ("jobs/bench/small.toml", "jobs/bench/medium.toml")
REPEATS = 7


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job."""
    torch.set_num_threads(1)
    malloc.hold()
    table = Table(title=f"seconds per round, one thread, median of {REPEATS}; torch {torch.__version__}", title_justify="left")
    for name in ("job", "plan", "bare loop", "engine", "ratio", "lowest", "highest"):
        table.add_column(name, justify="left" if name in ("job", "plan") else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        table.add_row(*_measured(build_experiment(job), console))
    console.print(table)
    return 0


def _measured(parts: Experiment, console: Console) -> tuple[str, ...]:
    plan = resolve(parts, console.print)
    fleet = make_fleet(plan, parts.site, parts.account(), time.perf_counter)
    ours, theirs = engine(parts, fleet), bare(parts)
    pairs = [(seconds_of(theirs), seconds_of(ours)) for _ in range(REPEATS + 1)][1:]
    ratios = sorted(own / bare for bare, own in pairs)
    return (
        parts.job.name,
        plan.describe(),
        f"{median(bare for bare, _ in pairs):.4f}",
        f"{median(own for _, own in pairs):.4f}",
        *(f"{ratio:.3f}" for ratio in (median(ratios), ratios[0], ratios[-1])),
    )


def engine(parts: Experiment, fleet: LocalFleet) -> Callable[[], object]:
    """One round of the job's own method a call."""
    state, r = parts.method.init(parts.setting, parts.population.public()), 0

    def run() -> None:
        nonlocal state, r
        r += 1
        fleet.open(r)
        state, _ = parts.method.round(parts.setting, state, fleet, r)

    return run


def bare(parts: Experiment) -> Callable[[], object]:
    """One round of plain PyTorch a call, on a cohort of the job's size."""
    job, population, train = parts.job, parts.population, parts.setting.train
    module = models.build(job.model, population.train.shape, population.train.classes, job.seed)
    cohort = range(parts.setting.cohort)
    index = [torch.from_numpy(population.shards["train"].of(client)) for client in cohort]
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (population.train.mean, population.train.std))
    images = [(population.train.images(own).float() / 255 - mean) / std for own in index]
    labels = [population.train.labels(own) for own in index]
    shared = {key: value.clone() for key, value in module.state_dict().items()}

    def run() -> None:
        nonlocal shared
        total = {key: torch.zeros_like(value, dtype=torch.float32) for key, value in shared.items()}
        for x, y in zip(images, labels, strict=True):
            module.load_state_dict(shared)
            optimiser: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), train.lr, train.momentum, weight_decay=train.decay)
            if train.optimiser == "adam":
                optimiser = torch.optim.Adam(module.parameters(), train.lr, weight_decay=train.decay)
            for _ in range(train.epochs):
                for rows in torch.randperm(len(y)).split(train.batch):
                    optimiser.zero_grad()
                    F.cross_entropy(module(x[rows]), y[rows]).backward()
                    optimiser.step()
            for key, value in module.state_dict().items():
                total[key] += len(y) * value
        n = sum(map(len, labels))
        shared = {key: (value / n).to(shared[key].dtype) for key, value in total.items()}

    return run
