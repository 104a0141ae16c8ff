"""`fedsim bench recording`: seconds of recording and checkpointing a round over the seconds of the round itself, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job, load
from fedsim.fleet.registry import make_fleet
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.loop import RoundWriter
from fedsim.simulation.planning.plan import resolve
from fedsim.simulation.resume import RunStart
from fedsim.simulation.round_record import row_of

DEFAULT = ("jobs/bench/medium.toml",)
REPEATS = 12
SLOW = 0.2  # seconds


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job."""
    torch.set_num_threads(1)
    malloc.hold()
    table = Table(title=f"recording and checkpointing every round, median of {REPEATS}", title_justify="left")
    for name in ("job", "round, s", "row and checkpoint, s", "share"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        rounds, writes = measured(build_experiment(job), console)
        table.add_row(job.name, f"{median(rounds):.4f}", f"{median(writes):.4f}", f"{median(writes) / median(rounds):.2%}")
        parts = build_experiment(job)
        fast, slow = paced(parts, console, 0.0), paced(parts, console, SLOW)
        console.print(
            f"{job.name}: {fast:.4f} s from round to round, {slow:.4f} s on a disk"
            f" whose every fsync takes {SLOW} s more: {slow / fast:.2f} times"
        )
    console.print(table)
    return 0


def measured(parts: Experiment, console: Console) -> tuple[list[float], list[float]]:
    """Seconds of every round, and of writing it down; the first of each is left out."""
    with TemporaryDirectory() as folder, closing(recorded_rounds(parts, Path(folder) / "run.h5", console)) as rounds:
        taken = list(islice(rounds, REPEATS + 1))[1:]
    return [seconds for seconds, _ in taken], [writing for _, writing in taken]


def paced(parts: Experiment, console: Console, delay: float) -> float:
    """Seconds from one round to the next, the median, where rows are written beside the training and every fsync takes `delay` longer."""
    real = os.fsync

    def slow(handle: Any) -> None:
        time.sleep(delay)
        real(handle)

    os.fsync = slow  # type: ignore[assignment]
    try:
        with TemporaryDirectory() as folder, closing(recorded_rounds(parts, Path(folder) / "run.h5", console, beside=True)) as rounds:
            ends = [time.perf_counter() for _ in islice(rounds, REPEATS + 1)]
    finally:
        os.fsync = real
    return median(after - before for before, after in pairwise(ends[1:]))


def recorded_rounds(parts: Experiment, out: Path, console: Console, beside: bool = False) -> Generator[tuple[float, float], None, None]:
    """Does and records one round after the other: the seconds of each, and those of writing it down."""
    plan = resolve(parts, console.print)
    fleet = make_fleet(plan, parts.site, parts.account(), time.perf_counter)
    state = parts.method.init(parts.setting, parts.population.public())
    start = RunStart(out)
    with start.record(parts, plan, ["here"]) as record, ExitStack() as last:
        last.callback(fleet.drain)
        scribe = RoundWriter(parts, record, start, plan.text())
        for r in count():
            began = time.perf_counter()
            fleet.open(r)
            state, found = parts.method.round(parts.setting, state, fleet, r)
            shared = parts.method.deploy(parts.setting, state, fleet, [])[0]
            row = row_of(parts.model_profile, fleet.account.bills, None, shared, {}, found)
            seconds = time.perf_counter() - began
            row.values["seconds"] = seconds
            fleet.drain()
            fleet.later(partial(scribe.write, r, row, scribe.taken(r, (state, fleet.account.received)), {}))
            if not beside:
                fleet.drain()
            yield seconds, scribe.seconds
