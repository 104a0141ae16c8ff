"""`fedsim bench population`: a million registered clients against a thousand: rank 0's start, memory and seconds per round.

Each run is its own `mpirun` of two ranks, in turn; rank 0 tells its peak resident memory at the end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from fedsim.bench.ranks import launch
from fedsim.config.job import Job, load
from fedsim.simulation.launch import main as run
from fedsim.storage.reader import RunReader

DEFAULT = ("jobs/bench/thousand.toml", "jobs/bench/million.toml")
REPEATS = 3


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job, and the last job's figures over the first's."""
    every = jobs or [load(Path(name)) for name in DEFAULT]
    runs = [[measured(job) for job in every] for _ in range(REPEATS)]
    table = Table(title=f"rank 0 of 2, median of {REPEATS} runs", title_justify="left")
    for name in ("job", "clients", "start, s", "memory, MB", "seconds per round"):
        table.add_column(name, justify="left" if name == "job" else "right")
    rows = [[median(run[i][k] for run in runs) for k in range(3)] for i in range(len(every))]
    for job, (start, memory, seconds) in zip(every, rows, strict=True):
        table.add_row(job.name, f"{job.population:,}", f"{start:.1f}", f"{memory:,.0f}", f"{seconds:.4f}")
    ratios = [median(run[-1][k] / run[0][k] for run in runs) for k in range(3)]
    table.add_row("ratio", "", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    return 0


def measured(job: Job) -> tuple[float, float, float]:
    """(seconds outside the rounds, rank 0's peak MB, median seconds of a round)."""
    with TemporaryDirectory() as folder:
        out, answer = Path(folder) / "run.h5", Path(folder) / "answer.json"
        began = time.perf_counter()
        launch(job, 2, [sys.executable, "-m", "fedsim.bench.population", "JOB", str(out), str(answer)], Path(folder))
        wall = time.perf_counter() - began
        seconds = RunReader(out).column("seconds")
        return wall - float(seconds.sum()), json.loads(answer.read_text())["peak"], median(seconds[2:].tolist())


if __name__ == "__main__":
    code = run(load(sys.argv[1]), Path(sys.argv[2]), "never")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if os.environ.get("OMPI_COMM_WORLD_RANK") == "0":
        Path(sys.argv[3]).write_text(json.dumps({"peak": peak}))
    sys.exit(code)
