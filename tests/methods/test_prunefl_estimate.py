"""`fedsim estimate` of PruneFL, whose density follows from gradients that nobody measures."""

from __future__ import annotations

import tomllib

import pytest
from small_job import small_job

from fedsim.config.job import check
from fedsim.simulation import estimate
from fedsim.simulation.experiment import build_experiment


def test_an_estimate_trains_nobody_and_keeps_all_weights_that_it_may() -> None:
    fields = {"name": "prunefl", "adjust_every": 1, "initial_iterations": 70, "constant_seconds": 0.1}
    jobs = [check(tomllib.loads(small_job(3, method=fields | more))) for more in ({}, {"max_density": 0.95, "density": 0.5})]
    seen = [list(estimate.rows(build_experiment(job))) for job in jobs]
    assert [row.values["density"] for row in seen[0]] == [1.0, 1.0, 1.0, 1.0]
    assert [row.values["density"] for row in seen[1]] == pytest.approx([1.0, 0.8, 0.65, 0.5], abs=1e-3)
    assert seen[0][0].values["initial_iterations"] == 70
    assert seen[0][0].values["train_flops"] > 0
