"""The shipped scripts on a real SLURM: a run on two nodes, an array, and stops after which a job goes on or does not."""

from __future__ import annotations

import json
import os

import pytest
from cluster import until
from submitted import Lab, attributes


def test_a_run_on_two_nodes_ends_with_the_weights_of_one_process(lab: Lab, request: pytest.FixtureRequest) -> None:
    job = lab.submit("nodes")
    weights = request.getfixturevalue("weights")  # while the job runs
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.nodes) == ("COMPLETED", 0, "one,two"), ended.out
    run = attributes(lab.out)
    assert run["finished"]
    assert run["ranks"] == 3
    assert run["weights_sha256"] == weights
    assert "round 20/20  accuracy" in ended.out
    assert all(sign.isprintable() or sign == "\n" for sign in ended.out)


def test_a_warned_job_is_requeued_and_goes_on_to_the_same_weights(lab: Lab, weights: object) -> None:
    """By what --signal=B:USR1@60 sends; then with other ranks on other nodes."""
    job = lab.submit("nodes")
    lab.until_round(1)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    lab.until_restarted(job)
    noted = json.loads(lab.restarts().read_text())["restarts"]
    assert [(entry["job"], entry["why"]) for entry in noted] == [(job, "stopped by SIGUSR1")]
    kept = attributes(lab.out)
    assert not kept["finished"]
    assert kept["rounds"] == noted[0]["round"] >= 1
    lab.cluster.call("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=2")
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.code, ended.restarts) == ("COMPLETED", 0, 1), ended.out
    assert f"job {job} is requeued and goes on from there (restart 1 of 100 at most)" in ended.out
    assert "going on after round" in ended.out
    assert attributes(lab.out)["weights_sha256"] == weights
    assert not lab.restarts().exists()


def test_scancel_leaves_a_readable_file_and_no_requeue(lab: Lab) -> None:
    job = lab.submit("quickstart")
    lab.until_round(1)
    lab.cluster.call("scancel", job)
    ended = lab.cluster.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), ended.out
    assert "Traceback" not in ended.out
    assert not attributes(lab.out)["finished"]
    assert not lab.restarts().exists()
