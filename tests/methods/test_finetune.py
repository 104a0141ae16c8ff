"""Fine-tuning after dense averaging: plain SGD of each client from the averaged model, which stays as it was; its costs and its forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, loaded, small, stored, world
from small_job import small_job
from torch.nn import functional as F

import fedsim
from fedsim.core.tree import Tree
from fedsim.core.types import LocalTraining
from fedsim.costs.flops import feed_flops
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Evaluate
from fedsim.federated.protocol import ClientInput
from fedsim.methods.baselines.finetune import FineTune
from fedsim.methods.fedavg import FedAvg as Dense
from fedsim.storage.reader import RunReader

SIZES = [6, 9, 5]
AGGREGATES = {"fedavg": FedAvg(), "fedprox": FedProx(fedprox_mu=0.7), "fednova": FedNova(0.9), "scaffold": Scaffold(0.1)}


def made(kind: type = FLEETS[0], aggregate: Any = None, training: LocalTraining = SLOW, rounds: int = 2) -> World:
    found = world(stored(*drawn(SIZES)), small(), kind, training, cohort=2)
    found.setting = replace(found.setting, aggregate=aggregate or FedAvg(), rounds=rounds)
    return found


def adapted(one: World, shared: Tree, k: int, epochs: int, lr: float) -> Tree:
    """Client `k`'s model by torch's own SGD from the averaged one, after it trained in the last round, or did not."""
    train, last = one.setting.train, one.setting.rounds
    module = loaded(small(), {key: value.clone() for key, value in shared.items()}).train()
    optimiser = torch.optim.SGD(module.parameters(), lr, train.momentum, weight_decay=train.decay)
    for x, y in batches(one, replace(train.feed(), epochs=epochs, steps=0), k, last, int(k in one.fleet.pick(2, last))):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
    end = {f"w/{name}": value.detach() for name, value in module.named_parameters()}
    return end | {f"buf/{name}": value for name, value in module.named_buffers() if value.is_floating_point()}


def used(one: World, method: Any, shared: Tree, k: int) -> Tree:
    held = method.model_of(one.setting.net, ClientInput(shared, {}, one.fleet.kept.get(k, {}), *[torch.tensor(0)] * 3))
    return {key: value for key, value in held.items() if key.startswith(("w/", "buf/"))}


def near(one: Tree, other: Tree) -> None:
    for key, value in other.items():
        assert torch.allclose(one[key].double(), value.double(), rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize(("aggregate", "kind"), [*((name, FLEETS[0]) for name in AGGREGATES), ("scaffold", FLEETS[1])])
def test_each_client_trains_a_copy_by_plain_sgd_and_the_averaged_model_is_fedavg_s(aggregate, kind) -> None:
    one, plain = (made(kind, AGGREGATES[aggregate]) for _ in range(2))
    method = FineTune(epochs=3)
    state, _ = one.play(method, 2)
    other, _ = plain.play(Dense(), 2)
    assert all(torch.equal(state.shared[key], value) for key, value in other.shared.items())
    for k in range(3):
        near(used(one, method, state.shared, k), adapted(one, state.shared, k, 3, SLOW.lr))
        near(used(one, method.variants()["averaged"], state.shared, k), state.shared)


def test_the_rate_is_the_last_round_s_or_its_own() -> None:
    for method, lr in ((FineTune(), 0.1 * 0.5**2), (FineTune(lr=0.03), 0.03)):
        one = made(training=replace(SLOW, schedule="exponential", factor=0.5, rounds=3), rounds=3)
        state, rows = one.play(method, 3)
        assert [row.get("lr") for row in rows] == [None, 0.1, 0.05, 0.025]
        for k in range(3):
            near(used(one, method, state.shared, k), adapted(one, state.shared, k, 1, lr))


def test_steps_in_the_place_of_epochs_end_with_the_rounds() -> None:
    one = made(training=replace(SLOW, epochs=0, steps=3))
    state, _ = one.play(FineTune(epochs=2), 2)
    for k in range(3):
        near(used(one, FineTune(epochs=2), state.shared, k), adapted(one, state.shared, k, 2, SLOW.lr))


def test_nobody_has_a_model_of_its_own_before_the_last_round() -> None:
    one = made(rounds=3)
    state, _ = one.play(FineTune(), 2)
    assert not len(one.fleet.kept)
    near(used(one, FineTune(), state.shared, 0), state.shared)


def test_clients_are_asked_in_parts_where_they_are_many(monkeypatch) -> None:
    one, other = made(), made()
    one.play(FineTune(), 2)
    monkeypatch.setattr("fedsim.federated.personal_model.MAX_COHORT", 2)
    other.play(FineTune(), 2)
    assert [order.clients for order in other.seen[-2:]] == [[0, 1], [2]]
    for k in range(3):
        assert all(torch.equal(one.fleet.kept[k][key], value) for key, value in other.fleet.kept[k].items())


def test_accuracy_of_clients_is_that_of_their_copies() -> None:
    one, method = made(training=replace(SLOW, epochs=4)), FineTune(epochs=8)
    state, _ = one.play(method, 2)
    test = one.population.test
    x, y = (test.images(torch.arange(len(test))).double() / 255 - 0.5) / 0.25, test.labels(torch.arange(len(test)))
    each = one.fleet.run(Evaluate.of(method, split="global"), range(3), method.deploy(one.setting, state, one.fleet, [0, 1, 2])[0]).each
    right = [int((loaded(small(), adapted(one, state.shared, k, 8, SLOW.lr)).eval()(x).argmax(1) == y).sum()) for k in range(3)]
    assert each["n/correct"].int().tolist() == right
    assert int((loaded(small(), state.shared).eval()(x).argmax(1) == y).sum()) not in right


def test_it_is_charged_to_no_bill_but_to_what_clients_do_to_deploy() -> None:
    one, plain = made(), made()
    one.play(FineTune(epochs=3), 2)
    plain.play(Dense(), 2)
    assert one.fleet.account.bills == plain.fleet.account.bills
    assert one.fleet.account.deployed == feed_flops(one.setting.model_profile, 3 * sum(SIZES)).total
    assert plain.fleet.account.deployed == 0


def test_a_run_with_the_small_dense_model_records_both_forms(tmp_path: Path) -> None:
    sections = {"method": {"name": "finetune", "epochs": 2}, "model": {"width": 8, "match": "params", "match_density": 0.3}}
    (tmp_path / "job.toml").write_text(small_job(2, **sections))
    fedsim.run(tmp_path / "job.toml", out=tmp_path / "run.h5", progress=False)
    run = RunReader(tmp_path / "run.h5")
    with pytest.raises(BadInput, match="its clients have weights of their own, which are in their kept state and not in the run file"):
        fedsim.export_module(tmp_path / "run.h5", client=1)
    (tmp_path / "dense.toml").write_text(small_job(2, **sections | {"method": {"name": "fedavg"}}))
    fedsim.run(tmp_path / "dense.toml", out=tmp_path / "dense.h5", progress=False)
    dense = RunReader(tmp_path / "dense.h5")
    assert run.attributes["weights_sha256"] == dense.attributes["weights_sha256"]
    assert run.column("accuracy")[-1] == dense.column("accuracy")[-1]
    assert run.column("averaged_client_accuracy")[-1] == dense.column("client_accuracy")[-1]
    np.testing.assert_array_equal(run.clients("averaged_accuracy", 2), dense.clients("accuracy", 2))
    np.testing.assert_array_equal(run.column("bytes_up"), dense.column("bytes_up"))
    assert run.column("deploy_flops")[-1] > 0


@pytest.mark.parametrize("field", [{"epochs": 0}, {"lr": 0.0}, {"lr": -1.0}])
def test_fields_out_of_range_are_named(field) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} = "):
        FineTune(**field)
