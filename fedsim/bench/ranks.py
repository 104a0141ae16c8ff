"""`fedsim bench ranks`: rounds per second of two client ranks over those of one, by the run files of real `mpirun`s in turn.

Rank 0 serves and must leave the cores to the others: with two cores the ratio is at most 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from fedsim.fault import BadInput
from fedsim.job import Job, load, resolved
from fedsim.record import Reader

DEFAULT = ("jobs/bench/medium.toml",)
REPEATS = 3
COUNTS = (2, 3)  # ranks, rank 0 included


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job."""
    table = Table(title=f"seconds per round by ranks, median of {REPEATS} runs", title_justify="left")
    for name in ("job", *(f"{count - 1} client rank{'s' * (count > 2)}" for count in COUNTS), "ratio", "lowest", "highest"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        pairs = [tuple(seconds(job, ranks) for ranks in COUNTS) for _ in range(REPEATS)]
        ratios = sorted(one / two for one, two in pairs)
        table.add_row(
            job.name,
            *(f"{median(pair[i] for pair in pairs):.4f}" for i in range(2)),
            *(f"{ratio:.3f}" for ratio in (median(ratios), ratios[0], ratios[-1])),
        )
    console.print(table)
    return 0


def seconds(job: Job, ranks: int) -> float:
    """Median seconds of a round under mpirun, the first ones, which warm up, left out."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.h5"
        launch(job, ranks, [sys.executable, "-m", "fedsim", "run", "JOB", "--out", str(out)], Path(folder))
        return median(Reader(out).column("seconds")[2:].tolist())


def launch(job: Job, ranks: int, program: list[str], folder: Path) -> None:
    """Runs `program` under mpirun, "JOB" in it standing for the job's file."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        raise BadInput("there is no mpirun here: pip install 'fedsim[mpi]'")
    file = folder / "job.toml"
    file.write_text(resolved(job))
    told = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    told |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [mpirun, "-n", str(ranks), *(str(file) if word == "JOB" else word for word in program)]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
