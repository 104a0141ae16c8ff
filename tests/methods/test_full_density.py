"""Density 1 is dense: methods with masks keep every weight, from the first mask to the last round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_job import FAKE, small_job

import fedsim
from fedsim.config import job
from fedsim.core.tree import under
from fedsim.errors import BadInput
from fedsim.methods.fedtiny import FedTiny
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.storage.reader import RunReader

UNTRAINED = {"name": "fedtiny", "pretrain_epochs": 0, "selection": "none"}


def experiment(model: str, method: dict[str, Any]) -> Experiment:
    return build_experiment(job.check({"data": FAKE, "model": {"name": model}, "method": method, "execution": {"device": "cpu"}}))


@pytest.mark.parametrize("model", ["resnet18", pytest.param("resnet56", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "method",
    [
        UNTRAINED,
        pytest.param(UNTRAINED | {"tol_two_sided": True, "tol": 0.0}, marks=pytest.mark.full),
        pytest.param(UNTRAINED | {"pool": 3}, marks=pytest.mark.full),
        {"name": "fedmef"},
        {"name": "fedmef", "start": "erk_magnitude", "mask_classifier": False},
    ],
    ids=["fedtiny", "two-sided", "pool", "fedmef", "magnitude"],
)
def test_every_weight_is_kept(model: str, method: dict[str, Any]) -> None:
    parts = experiment(model, method | {"density": 1.0})
    state = parts.method.init(parts.setting, None)
    if isinstance(parts.method, FedTiny):
        state, found = parts.method.round(parts.setting, state, None, 0)
        assert found["candidates"] == 1
    held = under(state.shared, "mask/")
    masked = parts.setting.net.maskable[: -1 if method.get("mask_classifier") is False else None]
    assert set(held) == {f"mask/{layer}.weight" for layer in masked}
    assert all(bool(mask.all()) for mask in held.values())


@pytest.mark.parametrize("method", [{"name": "fedtiny", "stop_round": 3}, {"name": "fedmef", "stop_round": 3}])
def test_adjustments_keep_it_to_the_end(method: dict[str, Any], tmp_path: Path) -> None:
    table = small_job(3, partition={"public": 5}, method=method | {"density": 1.0, "adjust_every": 1})
    (tmp_path / "job.toml").write_text(table)
    fedsim.run(tmp_path / "job.toml", out=tmp_path / "run.h5", progress=False)
    file = RunReader(tmp_path / "run.h5")
    assert file.column("density").tolist() == [1.0] * 4
    assert file.column("weights_swapped").tolist()[1:] == [0] * 3


def test_a_high_density_that_no_draw_meets_says_what_helps() -> None:
    parts = experiment("resnet56", UNTRAINED | {"density": 0.99})
    with pytest.raises(BadInput, match=r"none of 10,000 draws .* take a smaller spread, a larger tol or fewer class_weights"):
        parts.method.init(parts.setting, None)
    parts = experiment("resnet56", UNTRAINED | {"density": 0.99, "spread": 0.01})
    assert parts.method.init(parts.setting, None)
