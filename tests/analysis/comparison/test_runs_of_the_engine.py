"""Real runs: what the engine writes decides which of them are pairs, and the tables have the numbers that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedsim_analysis import comparison
from small_job import small_job

import fedsim
from fedsim.storage.reader import RunReader

TINY = {"name": "fedtiny", "density": 0.2, "adjust_every": 2, "pool": 2}
JOBS: dict[str, dict[str, Any]] = {
    "dense": {"method": {"name": "fedavg"}},
    "tiny": {"method": TINY},
    "other cohort": {"method": TINY, "cohort": {"size": 3}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engine")
    made = {}
    for name, seed in [("dense", 0), ("dense", 1), ("tiny", 0), ("tiny", 1), ("other cohort", 1)]:
        job = folder / "job.toml"
        job.write_text(small_job(2, **{"partition": {"public": 2}, "cohort": {"size": 2}} | JOBS[name]))
        made[f"{name} {seed}"] = folder / f"{name} {seed}.h5"
        fedsim.run(job, set={"seed": seed}, out=made[f"{name} {seed}"])
    return made


def last(run: Path) -> float:
    values = RunReader(run).column("accuracy")
    return float(values[~np.isnan(values)][-1])


def test_methods_of_one_seed_are_pairs_and_their_differences_are_those_of_the_files(runs: dict[str, Path]) -> None:
    dense, tiny, other = comparison.paired(comparison.collect(runs.values()), ["accuracy"]).to_dict("records")
    tiny, other = (tiny, other) if tiny["cohort.size"] == 2 else (other, tiny)
    expected = [last(runs[f"tiny {seed}"]) - last(runs[f"dense {seed}"]) for seed in (0, 1)]
    assert (dense["baseline"], dense["group"]) == ("fedavg, size 2",) * 2
    assert (tiny["pairs"], tiny["why_not"]) == (2, "")
    assert tiny["difference"] == pytest.approx(np.mean(expected))
    assert (other["pairs"], other["why_not"]) == (0, "other cohorts (cohort.size)")


@pytest.mark.full
def test_costs_are_those_of_the_files(runs: dict[str, Path]) -> None:
    table = comparison.at_equal(comparison.collect([runs["dense 0"], runs["tiny 0"]]), {"bytes": 1e12, "flops": 1e15, "memory": 1e12})
    dense = RunReader(runs["dense 0"])
    spent = [float(np.nansum(dense.column("bytes_up") + dense.column("bytes_down"))), float(np.nansum(dense.column("train_flops")))]
    spent.append(float(np.nanmax(dense.column("max_client_memory"))))
    rows = table[table["method.name"] == "fedavg"].set_index("resource")
    assert rows["spent"].to_dict() == dict(zip(("bytes", "flops", "memory"), spent, strict=True))
    assert rows["mean"].tolist() == [last(runs["dense 0"])] * 3
