"""The shipped scripts on a real SLURM: runs on two nodes, an array, and stops after which a job goes on or does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cluster import Ended, until
from submitted import JOB, ROOT, Lab, attributes


def ended_well(lab: Lab, job: str, restarts: int, weights: object) -> Ended:
    """How the job ended: as if nothing had stopped it."""
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("COMPLETED", 0, restarts), ended.out
    assert attributes(lab.out)["finished"]
    assert attributes(lab.out)["weights_sha256"] == weights
    assert not lab.restarts.exists()
    assert all(sign.isprintable() or sign in "\n\0" for sign in ended.out)  # SLURM ends what it writes itself with a zero
    return ended


def test_a_run_on_two_nodes_that_is_warned_is_requeued_and_ends_with_the_weights_of_one_process(
    lab: Lab, request: pytest.FixtureRequest
) -> None:
    """By what --signal=B:USR1@60 sends."""
    job = lab.submit("nodes")
    lab.until_round(1)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    lab.until_restarted(job)
    (noted,) = json.loads(lab.restarts.read_text())["restarts"]
    kept = attributes(lab.out)
    assert not kept["finished"]
    assert (noted["job"], noted["round"], noted["why"]) == (job, kept["rounds"], "stopped by SIGUSR1")
    weights = request.getfixturevalue("weights")  # while the job runs again
    ended = ended_well(lab, job, 1, weights)
    assert ended.nodes == "one,two"
    assert attributes(lab.out)["ranks"] == 3
    assert f"job {job} is requeued and goes on from there (restart 1 of 100 at most)" in ended.out
    assert f"going on after round {noted['round']}" in ended.out
    assert "round 8/8  accuracy" in ended.out


def test_an_array_of_four_lands_four_files_and_only_the_warned_element_is_requeued(lab: Lab, tmp_path: Path, weights: object) -> None:
    lab.job.write_text(f"{JOB}[sweep]\nseed = [0, 1, 2, 3]\n")
    array = lab.submit("sweep", "--array=0-3", FOLDER=str(tmp_path / "runs"))
    first = Lab(lab.cluster, lab.job, tmp_path / "runs" / "job-seed0.h5")
    first.until_round(1)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_0")
    first.until_restarted(f"{array}_0")
    ended_well(first, f"{array}_0", 1, weights)
    for element in (1, 2, 3):
        ended = lab.cluster.wait(f"{array}_{element}")
        assert (ended.state, ended.code, ended.restarts) == ("COMPLETED", 0, 0), ended.out
    runs = sorted((tmp_path / "runs").glob("*.h5"))
    assert [run.name for run in runs] == [f"job-seed{seed}.h5" for seed in range(4)]
    assert all(attributes(run)["finished"] for run in runs)


def test_scancel_leaves_a_readable_file_and_no_requeue_and_the_run_goes_on_with_other_ranks(lab: Lab, weights: object) -> None:
    job = lab.submit("quickstart", "--ntasks=1")
    lab.until_round(1)
    lab.cluster.call("scancel", job)
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), ended.out
    assert "Traceback" not in ended.out
    assert not attributes(lab.out)["finished"]
    assert not lab.restarts.exists()
    ended = ended_well(lab, lab.submit("quickstart", "--ntasks=2"), 0, weights)
    assert attributes(lab.out)["ranks"] == 2
    assert "going on after round" in ended.out


def test_a_job_without_progress_stops_after_one_requeue_and_says_so(lab: Lab) -> None:
    """With a launcher that ends at once, as if it had lost its ranks."""
    job = lab.submit("nodes", MPIRUN="true")
    lab.until_restarted(job)
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", 3, 1), ended.out
    assert f"job {job} makes no progress and is not requeued: it was before the first round when it was requeued at 20" in ended.out


@pytest.mark.full
@pytest.mark.parametrize(("script", "options"), [("nodes", ["--no-requeue"]), ("quickstart", ["--ntasks=2", "--no-requeue"])])
def test_what_slurm_refuses_is_said(lab: Lab, script: str, options: list[str]) -> None:
    """A job that may not be requeued."""
    job = lab.submit(script, *options, MPIRUN="true")
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", 3, 0), ended.out
    assert ended.out.count("\n") == 1
    assert f"job {job} is not requeued: `scontrol requeue {job}` was refused:" in ended.out
    assert not lab.restarts.exists()


@pytest.mark.full
def test_a_job_is_not_requeued_more_often_than_it_may(lab: Lab, tmp_path: Path, weights: object) -> None:
    """--restarts 1; the job is warned twice, each time further on."""
    script = tmp_path / "once.sbatch"
    script.write_text((ROOT / "slurm" / "nodes.sbatch").read_text().replace(' --launcher "$LAUNCHER"', " --restarts 1"))
    job = lab.cluster.submit(script, cwd=ROOT, JOB=str(lab.job), OUT=str(lab.out), VENV=sys.prefix)
    lab.until_round(1)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    lab.until_restarted(job)
    lab.until_round(attributes(lab.out)["rounds"] + 1)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", 3, 1), ended.out
    assert f"job {job} was requeued once and is not again (--restarts 1)" in ended.out
    ended_well(lab, lab.submit("nodes"), 0, weights)


@pytest.mark.full
@pytest.mark.parametrize("partition", ["all", "grace"])
def test_a_preempted_job_goes_on_when_there_is_room(lab: Lab, tmp_path: Path, partition: str, weights: object) -> None:
    """With a grace time, in which SLURM signals the steps alone, and without."""
    job = lab.submit("nodes", f"--partition={partition}")
    lab.until_round(1)
    script = tmp_path / "urgent.sbatch"
    script.write_text("#!/bin/bash\nsleep 1\n")
    urgent = lab.cluster.submit(script, "--partition=urgent", "--nodes=2", "--ntasks=4", cwd=tmp_path)
    lab.until_restarted(job)
    assert lab.cluster.wait(urgent).state == "COMPLETED"
    assert "going on after round" in ended_well(lab, job, 1, weights).out


@pytest.mark.full
def test_a_job_whose_node_dies_goes_on_when_the_node_is_back(lab: Lab, weights: object) -> None:
    job = lab.submit("nodes")
    lab.until_round(1)
    lab.cluster.lose("two")
    try:
        until(lambda: int(lab.cluster.fields_of(job)["Restarts"]) == 1, 120, lab.cluster.logs)
    finally:
        lab.cluster.mend("two")
    lab.until_restarted(job)
    assert "going on after round" in ended_well(lab, job, 1, weights).out


@pytest.mark.full
@pytest.mark.parametrize(
    ("warning", "why"),
    [
        ("B:USR1@30", {"stopped by SIGUSR1"}),
        ("USR1@30", {"stopped by SIGUSR1", "the launcher was lost"}),  # to the steps, so that mpirun loses its daemons
        ("B:CONT@30", {"stopped by SIGTERM"}),  # not warned before the limit
    ],
)
def test_a_job_that_meets_its_time_limit_is_requeued(lab: Lab, warning: str, why: set[str]) -> None:
    lab.job.write_text(JOB.replace("rounds = 8", "rounds = 2000"))
    job = lab.submit("nodes", "--time=1", f"--signal={warning}")
    lab.until_restarted(job)
    (noted,) = json.loads(lab.restarts.read_text())["restarts"]
    assert noted["round"] == attributes(lab.out).get("rounds", -1)
    assert noted["why"] in why
    lab.cluster.call("scancel", job)


@pytest.mark.full
def test_a_job_that_stops_by_its_own_time_limit_is_requeued(lab: Lab) -> None:
    lab.job.write_text(f"{JOB.replace('rounds = 8', 'rounds = 2000')}time_limit = 0.1\n")
    job = lab.submit("nodes")
    lab.until_restarted(job)
    (noted,) = json.loads(lab.restarts.read_text())["restarts"]
    assert (noted["round"], noted["why"]) == (attributes(lab.out).get("rounds", -1), "stopped by its time limit or a signal to its ranks")
    lab.cluster.call("scancel", job)


@pytest.mark.full
def test_a_run_that_finds_no_room_is_not_requeued(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "limited.sbatch"
    script.write_text((ROOT / "slurm" / "quickstart.sbatch").read_text().replace("\nexec ", "\nulimit -f 700\nexec "))
    job = lab.cluster.submit(script, "--ntasks=1", cwd=ROOT, JOB=str(lab.job), OUT=str(lab.out), VENV=sys.prefix)
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", 3, 0), ended.out
    assert "no room for" in ended.out
    assert not lab.restarts.exists()
