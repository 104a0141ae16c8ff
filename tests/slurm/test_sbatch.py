"""slurm/quickstart.sbatch on a real SLURM: three ranks on two nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from cluster import Cluster, Ended, until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "quickstart.sbatch"

JOB = """
rounds = 20
[data]
name = "digits"
[partition]
name = "dirichlet_class"
clients = 6
[train]
batch = 16
[method]
name = "fedavg"
[evaluate]
every = 5
[execution]
plan = "reference"
device = "cpu"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file."""
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def weights(job: Path) -> object:
    """The hash of the weights of the same job without SLURM, in one process."""
    out = job.with_name("alone.h5")
    command = [sys.executable, "-m", "fedsim", "run", str(job), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return attributes(out)["weights_sha256"]


@pytest.fixture
def submit(cluster: Cluster, job: Path, tmp_path: Path) -> Callable[[], str]:
    """Submits the script from the repository, as a user does."""

    def call() -> str:
        return cluster.submit(SCRIPT, cwd=ROOT, JOB=str(job), OUT=str(tmp_path / "run.h5"), VENV=sys.prefix)

    return call


@pytest.fixture
def stop_after(cluster: Cluster, submit: Callable[[], str], tmp_path: Path) -> Callable[..., Ended]:
    """Submits, signals the job when it has finished that round, and tells how it ended."""

    def call(r: int, *options: str) -> Ended:
        job = submit()
        until(lambda: attributes(tmp_path / "run.h5").get("rounds", -1) >= r, 120, cluster.logs)
        cluster.call("scancel", *options, job)
        return cluster.wait(job)

    return call


def attributes(run: Path) -> dict[str, Any]:
    """The attributes of a run file; none of one that is not there yet, or is being written."""
    try:
        with h5py.File(run, locking=False) as file:
            return dict(file.attrs)
    except OSError:
        return {}


def test_a_submitted_job_spans_both_nodes_and_ends_with_the_weights_of_one_process(
    cluster: Cluster, submit: Callable[[], str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = submit()
    weights = request.getfixturevalue("weights")  # while the job runs
    ended = cluster.wait(job)
    assert (ended.state, ended.code, ended.nodes) == ("COMPLETED", 0, "one,two"), ended.out
    run = attributes(tmp_path / "run.h5")
    assert run["finished"]
    assert run["ranks"] == 3
    assert run["weights_sha256"] == weights
    assert "round 20/20  accuracy" in ended.out
    assert all(sign.isprintable() or sign == "\n" for sign in ended.out)


def test_a_job_that_is_stopped_ends_with_3_and_submitted_again_goes_on_to_the_same_weights(
    cluster: Cluster, submit: Callable[[], str], stop_after: Callable[..., Ended], weights: object, tmp_path: Path
) -> None:
    warned = stop_after(1, "--batch", "--signal=USR1")  # what --signal=B:USR1@60 sends
    assert (warned.state, warned.code) == ("FAILED", 3), warned.out
    assert "all complete rounds" in warned.out
    kept = attributes(tmp_path / "run.h5")
    assert not kept["finished"]

    lost = stop_after(kept["rounds"] + 1, "--signal=USR1")  # to the steps alone: the daemons of mpirun die of it
    assert (lost.state, lost.code) == ("FAILED", 3), lost.out

    ended = cluster.wait(submit())
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.out
    assert "going on after round" in ended.out
    assert attributes(tmp_path / "run.h5")["weights_sha256"] == weights
