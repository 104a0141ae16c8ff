"""`fedsim bench ranks`: rounds per second of two client ranks over those of one, by the run files of real `mpirun`s in turn.

Beside it, what the machine itself allows: two runs of one process each, which share nothing, at once against one alone. Rank 0
serves and must leave the cores to the others; what is lost against the machine's own figure is fedsim's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job, load, resolved
from fedsim.errors import BadInput
from fedsim.storage.reader import RunReader

DEFAULT = ("jobs/bench/medium.toml",)
REPEATS = 3


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job."""
    table = Table(title=f"seconds per round by ranks, median of {REPEATS} runs", title_justify="left")
    for name in ("job", "1 client rank", "2 client ranks", "ratio", "lowest", "highest", "two processes apart"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        runs = [(seconds(job, 2), seconds(job, 3), seconds(job, 1), apart(job)) for _ in range(REPEATS)]
        ratios = sorted(one / two for one, two, _, _ in runs)
        limit = median(2 * alone / both for _, _, alone, both in runs)
        figures = (median(ratios), ratios[0], ratios[-1], limit)
        table.add_row(job.name, *(f"{median(run[i] for run in runs):.4f}" for i in range(2)), *(f"{figure:.3f}" for figure in figures))
    console.print(table)
    return 0


def apart(job: Job) -> float:
    """Median seconds of a round while another run of the same job goes on beside it."""
    with ThreadPoolExecutor(2) as pool:
        return median(pool.map(lambda _: seconds(job, 1), range(2)))


def seconds(job: Job, ranks: int) -> float:
    """Median seconds of a round under mpirun."""
    return median(rounds(job, ranks))


def rounds(job: Job, ranks: int) -> list[float]:
    """Seconds of each round under mpirun, the first ones, which warm up, left out."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.h5"
        launch(job, ranks, [sys.executable, "-m", "fedsim", "run", "JOB", "--out", str(out)], Path(folder))
        return [float(value) for value in RunReader(out).column("seconds")[2:].tolist()]


def launch(job: Job, ranks: int, program: list[str], folder: Path) -> None:
    """Runs `program` under mpirun, "JOB" in it standing for the job's file."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        raise BadInput("there is no mpirun here: pip install 'fedsim[mpi]'")
    file = folder / "job.toml"
    file.write_text(resolved(job), encoding="utf-8")
    environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [mpirun, "-n", str(ranks), *(str(file) if word == "JOB" else word for word in program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
