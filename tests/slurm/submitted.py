"""The shipped scripts, submitted to a real SLURM as a user does, and the weights that their runs must end with."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from cluster import Cluster, until

ROOT = Path(__file__).parents[2]
REVOKED = 2.0  # seconds after which a node takes a requeued job again: SLURM counts in whole seconds

JOB = """
rounds = 8
[data]
name = "digits"
[partition]
name = "dirichlet_class"
clients = 4
[train]
batch = 16
[method]
name = "fedavg"
[evaluate]
every = 4
[execution]
plan = "reference"
device = "cpu"
"""


@dataclass(frozen=True)
class Lab:
    """A cluster, and a job whose run is to be written to `out`."""

    cluster: Cluster
    job: Path
    out: Path

    def submit(self, script: str, *options: str, **variables: str) -> str:
        """Submits `slurm/SCRIPT.sbatch` from the repository; the number of the SLURM job."""
        given = {"JOB": str(self.job), "OUT": str(self.out), "VENV": sys.prefix} | variables
        return self.cluster.submit(ROOT / "slurm" / f"{script}.sbatch", *options, cwd=ROOT, **given)

    def until_round(self, r: int) -> None:
        """Waits until the run has finished this round."""
        until(lambda: attributes(self.out).get("rounds", -1) >= r, 120, self.cluster.logs)

    def until_restarted(self, job: str, times: int = 1) -> None:
        """Waits until SLURM has requeued the job so often and waits itself; from then on it does not."""
        until(
            lambda: int((now := self.cluster.fields_of(job))["Restarts"]) >= times and now["JobState"] == "PENDING", 120, self.cluster.logs
        )
        time.sleep(REVOKED)
        self.cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    @property
    def restarts(self) -> Path:
        """What `fedsim batch` keeps beside the run file until the run is finished."""
        return self.out.with_name(f"{self.out.name}.restarts.json")


def alone(job: Path) -> object:
    """The hash of the weights of the same job without SLURM, in one process."""
    out = job.with_name("alone.h5")
    command = [sys.executable, "-m", "fedsim", "run", str(job), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return attributes(out)["weights_sha256"]


def attributes(run: Path) -> dict[str, Any]:
    """The attributes of a run file; none of one that is not there yet, or is being written."""
    try:
        with h5py.File(run, locking=False) as file:
            return dict(file.attrs)
    except OSError:
        return {}
