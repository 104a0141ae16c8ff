"""Every way to compute a method gives the serial answer, and what is recorded is what was done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import FLEETS, ROUNDS, RUNS, run, table
from run_files import assert_close, assert_same

from fedsim.config.job import check
from fedsim.simulation.experiment import build_experiment
from fedsim.storage.reader import RunReader, read_model


@pytest.mark.parametrize(("name", "way"), [pair for pair in RUNS if pair[1] != "serial"])
def test_every_way_is_serial(name, way, alone) -> None:
    assert_close(alone[name, way], alone[name, "serial"])


def test_many_clients_are_evaluated_in_parts_alike(alone, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.simulation.evaluation.MAX_COHORT", 2)
    assert run("scaffold", "serial", folder, tmp_path / "run.h5") == 0  # its clients keep states, so each is evaluated by itself
    assert_same(tmp_path / "run.h5", alone["scaffold", "serial"])


@pytest.mark.parametrize("fleet", FLEETS)
def test_one_client_with_all_the_data_is_plain_sgd(fleet, folder, tmp_path) -> None:
    """torch's own module and optimiser on the same batches give the same weights."""
    from fedsim import models
    from fedsim.fleet.batches import Batches, Round

    made = table("fedavg", fleet, folder) | {
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 1},
        "cohort": {"size": 1},
        "rounds": 1,
    }
    out = tmp_path / "one.h5"
    assert run("fedavg", fleet, folder, out, change=made) == 0
    parts = build_experiment(check(made))
    module = models.build(parts.job.model, (1, 8, 8), 10, parts.job.seed)
    optimiser = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for step in Batches(parts.population, parts.setting.train.feed(), [0], [0], Round(0, 1), "cpu", torch.float32):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(step.x[0]), step.y[0]).backward()
        optimiser.step()
    model, state = read_model(out), module.state_dict()
    for key, value in model.items():
        assert torch.allclose(value, state[key.partition("/")[2]], atol=2e-3), key
    assert torch.allclose(model["w/fc2.weight"], state["fc2.weight"], atol=1e-4)


def test_the_clients_accuracy_is_by_images_and_the_macro_by_clients(alone, folder) -> None:
    tests = build_experiment(check(table("fedavg", "serial", folder))).population.shards["test"].sizes()
    reader = RunReader(alone["fedavg", "serial"])
    each, tested = reader.clients("accuracy", ROUNDS), tests > 0
    assert reader.column("client_accuracy")[-1] == pytest.approx((each[tested] * tests[tested]).sum() / tests.sum())
    assert reader.column("client_accuracy_macro")[-1] == pytest.approx(each[tested].mean())
    assert reader.column("client_accuracy_min")[-1] == pytest.approx(each[tested].min())
    assert len(set(tests.tolist())) > 1


def test_speeds_are_of_the_work_that_was_done(alone) -> None:
    reader = RunReader(alone["fedtiny", "packed"])
    assert min(reader.attributes[f"peak_{what}"] for what in ("flops", "bytes")) > 1e6
    assert reader.speed("compute_flops") * reader.timing("compute") == pytest.approx(reader.column("train_flops"))
    assert (reader.speed("record_bytes")[1:] > 0).all()
    assert np.isnan(reader.speed("reduce_bytes")).all()
