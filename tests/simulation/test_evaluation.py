"""Where all clients use one network, what a client's images come to is read off the evaluation of the global test set."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedsim.config.job import check
from fedsim.core import keys
from fedsim.errors import ClientFault
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import make_fleet
from fedsim.simulation import evaluation
from fedsim.simulation.evaluation import Model
from fedsim.simulation.experiment import Experiment, build_experiment

JOB: dict[str, Any] = {
    "rounds": 1,
    "data": {"name": "fake", "channels": 1, "image_size": 8, "classes": 4, "train_images": 160, "test_images": 67},
    "partition": {"name": "dirichlet_class", "alpha": 0.5, "min_images": 1, "clients": 5},
    "model": {"name": "cnn", "width": 4},
    "evaluate": {"every": 1, "clients": "all", "batch": 4},
    "execution": {"plan": "reference", "device": "cpu"},
    "method": {"name": "fedavg"},
}


def made(fleet: str, **sections: Any) -> tuple[Experiment, Any, LocalFleet]:
    """The experiment, the method's first state, and a fleet."""
    parts = build_experiment(check(JOB | sections))
    chosen = make_fleet(Plan(fleet=fleet, packs=2), parts.site, parts.account(1), time.perf_counter, {}, None, False)
    chosen.open(1)
    return parts, parts.method.init(parts.setting, None), chosen


@pytest.mark.parametrize("fleet", ["serial", "packed", "cuda_graph"])
def test_a_clients_images_come_to_what_the_client_itself_finds(fleet: str) -> None:
    parts, state, chosen = made(fleet)
    clients = evaluation.whose(parts, chosen, 1)
    model = Model(parts.method, *parts.method.deploy(parts.setting, state, chosen, clients))
    assert evaluation._is_one_network(parts, model, chosen)
    own = evaluation._on_own_images(parts, model, chosen, clients)
    whole, plain = (evaluation._on_shards(parts, model, chosen, by_image) for by_image in (True, False))
    gathered = evaluation._gathered(parts, whole.each, clients)
    assert {key: float(value) for key, value in whole.total.items()} == {key: float(value) for key, value in plain.total.items()}
    assert (gathered[keys.COUNT] == own[keys.COUNT]).all()
    assert (gathered[keys.CORRECT] == own[keys.CORRECT]).all()
    assert np.allclose(gathered[keys.LOSS_SUM], own[keys.LOSS_SUM], rtol=1e-6)
    assert gathered[keys.CORRECT].sum() == float(whole.total[keys.CORRECT])  # each test image is some client's


@pytest.mark.parametrize("kept", [False, True])
def test_test_images_pass_once_unless_clients_keep_a_part_of_the_model(kept: bool) -> None:
    parts, state, chosen = made("serial")
    if kept:
        chosen.kept[0] = {"own/a": parts.setting.net.initial["w/fc2.bias"]}
    score = evaluation.evaluate(parts, state, chosen, 1)
    shards = range(parts.setting.clients, parts.setting.clients + 2)
    asked = {int(client) for purpose in ("Evaluate", "EvaluateImages") for client in chosen._calls.get(purpose, ([], []))[0]}
    assert asked == set(shards) | (set(range(5)) if kept else set())
    assert score.rounds["clients_tested"] == 5


def test_a_transform_of_each_client_is_evaluated_client_by_client() -> None:
    parts, state, chosen = made("serial", partition={"name": "feature_noise", "clients": 5, "noise_std": 0.5})
    clients = evaluation.whose(parts, chosen, 1)
    model = Model(parts.method, *parts.method.deploy(parts.setting, state, chosen, clients))
    assert not evaluation._is_one_network(parts, model, chosen)
    assert not evaluation._is_one_network(*_with_own_rows(parts, model, chosen))


def _with_own_rows(parts: Experiment, model: Model, fleet: LocalFleet) -> tuple[Experiment, Model, LocalFleet]:
    clean = build_experiment(check(JOB))
    return clean, replace(model, own={"gate/channels": parts.setting.net.initial["w/fc2.bias"]}), fleet


@pytest.mark.parametrize("fleet", ["serial", "packed", "cuda_graph"])
@pytest.mark.parametrize(
    ("by", "reason"), [(1e9, "total 'loss/sum' holds [\\d.]+; finite values up to"), (float("nan"), "the loss is nan")]
)
def test_a_loss_that_is_too_large_is_of_the_test_set_and_of_no_client(fleet: str, by: float, reason: str) -> None:
    parts, state, chosen = made(fleet)
    weights = {key: value * by if key.startswith("w/fc2") else value for key, value in state.shared.items()}
    model = Model(parts.method, weights, {}, parts.setting.net)
    with pytest.raises(ClientFault, match=rf"^\[rank 0, the global test set, images of part \d, round 1, Evaluate\..*\] \w+: {reason}"):
        evaluation._on_shards(parts, model, chosen, by_image=False)
