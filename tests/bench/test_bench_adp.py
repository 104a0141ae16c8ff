"""`fedsim bench adp`: what it measures, not how fast that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.bench import adp
from fedsim.config.job import load
from fedsim.errors import BadInput
from fedsim.simulation.experiment import build_experiment

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize(("batch", "model"), [(1, "cnn"), (3, "cnn"), (1, "resnet8")])
def test_every_network_has_positive_readings_and_its_share_of_the_cost(batch, model, monkeypatch) -> None:
    monkeypatch.setattr(adp, "WARM", 1)
    monkeypatch.setattr(adp, "BUSY", 0.0)
    parts = build_experiment(load(JOBS / "adp_smoke.toml", [f"model.name={model}"]))
    lines = {line.name: line for line in adp.measured(parts, batch, 3)}
    assert lines.keys() == {"dense", "dynamic", "live", "folded", "by hand"} | ({"skipped"} if batch == 1 else set())
    for line in lines.values():
        assert line.batch == batch
        assert len(line.seconds) == 3
        assert 0 < line.quartiles[0] <= line.quartiles[1] <= line.quartiles[2]
        assert line.faster(line) == 1
    shares = {name: line.share for name, line in lines.items()}
    assert shares["folded"] == shares["by hand"] < shares["live"] < shares["dense"] == 1 < shares["dynamic"]


@pytest.mark.parametrize("model", ["cnn", "resnet8"])
def test_the_networks_that_are_timed_are_those_that_are_meant(model) -> None:
    """Live and folded (of gates that are 1) and the one by hand have the widths that were drawn."""
    parts = build_experiment(load(JOBS / "adp_smoke.toml", [f"model.name={model}", "model.gate_keep=0.5"]))
    networks = adp._networks(parts)
    x = torch.randn(1, *parts.population.train.shape)
    with torch.no_grad():
        assert torch.allclose(networks["skipped"](x), networks["dynamic"](x), atol=1e-5)
        every = {name: network(x) for name, network in networks.items()}
    assert all(logits.shape == (1, 10) for logits in every.values())
    weights = {
        name: sorted(value.shape for value in networks[name].parameters() if value.dim() == 4) for name in ("live", "folded", "by hand")
    }
    assert weights["live"] == weights["folded"] == weights["by hand"]
    assert weights["folded"] != sorted(value.shape for value in networks["dense"].parameters() if value.dim() == 4)


def test_a_job_without_gates_is_refused() -> None:
    with pytest.raises(BadInput, match="gate_keep"):
        adp.measured(build_experiment(load(JOBS / "quickstart_dense.toml")), 1)
