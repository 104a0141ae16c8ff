"""Every gated model trains on few images of many sizes of batch, and says what may help where it cannot."""

from __future__ import annotations

import pytest
import torch

from fedsim import models
from fedsim.config import job
from fedsim.core.types import Batch, Feed
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.checks import advice
from fedsim.models.settings import ModelSettings
from fedsim.nn import optim
from fedsim.nn.layers.input_gate import gates_of
from fedsim.nn.net import Net
from fedsim.simulation.experiment import build_experiment

SIDES = {"vgg11": 32, "vgg16": 32}
GATED = [name for name in models.FAMILIES if not name.startswith("mobilenet")]  # whose convolutions take no gates


def losses(name: str, lr: float, steps: int, **fields: object) -> list[float]:
    """Of the first client's first steps, whose batches are of 16 images and of what is left."""
    data = {"name": "shapes", "train_images": 200, "test_images": 20, "image_size": SIDES.get(name, 12)}
    table = {
        "rounds": 1,
        "data": data,
        "partition": {"name": "dirichlet_class", "alpha": 0.5, "clients": 3, "min_images": 1},
        "cohort": {"size": 2},
        "model": {"name": name, "gate_keep": 0.5, "width": 8} | fields,
        "train": {"epochs": 1, "batch": 16, "lr": lr, "momentum": 0.9},
        "method": {"name": "adp"},
        "execution": {"plan": "reference"},
    }
    parts = build_experiment(job.check(table))
    net = parts.setting.net
    batches = Batches(parts.population, Feed("train", steps=steps, batch=16), [0], [0], Round(0, 1), "cpu", torch.float32)
    tree = {key: value.clone() for key, value in net.initial.items()}
    tree |= optim.fresh({key: tree[key] for key in net.weights}, 0.9, "sgd")
    found = []
    for step in batches.alone(0):
        loss, gradient, buffers, _ = net.gradient(tree, Batch(step.x[0], step.y[0], None, torch.tensor(step.t), torch.tensor(steps)))
        assert all(bool(value.isfinite().all()) for value in gradient.values()), step.t
        found.append(float(loss))
        tree = net.descend(tree | buffers, gradient, lr, 0.9)
    return found


@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", GATED)
def test_every_gated_model_takes_20_steps(name: str, norm: str) -> None:
    found = losses(name, 0.01, 20, norm=norm)
    assert len(found) == 20
    assert max(found) < 10, found  # chance is 2.3
    assert min(found[-5:]) < found[0]


def test_without_the_sigmoid_a_residual_stream_exceeds_every_number() -> None:
    """The reason for the sigmoid: the gradients are right and the rate is small, and yet the activations grow without bound."""
    with pytest.raises(AssertionError, match=r"^\d+"):
        losses("resnet20", 1e-3, 20, norm="batch", gate_sigmoid=False)


@pytest.mark.parametrize(
    ("name", "norm", "sigmoid"), [("cnn", "batch", True), ("cnn", "group", True), ("resnet8", "batch", True), ("resnet8", "group", False)]
)
def test_gates_read_a_sigmoid_but_where_group_norms_bound_a_stream(name: str, norm: str, sigmoid: bool) -> None:
    module = models.build(ModelSettings(name, width=4, norm=norm, gate_keep=0.5), (1, 8, 8), 3, 0)
    assert {gate.sigmoid for gate in gates_of(module).values()} == {sigmoid}


SIGMOID = "model.gate_sigmoid = true (without it the gates grow with what they multiply)"
NORM = "a model with norms (model.norm)"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"norm": "batch"}, "a lower train.lr may help"),
        ({"norm": "nsconv"}, "a lower train.lr may help"),
        ({"norm": "none"}, f"a lower train.lr, or {NORM} may help"),
        ({"name": "resnet8", "norm": "batch", "gate_keep": 0.5}, "a lower train.lr may help"),
        ({"name": "resnet8", "norm": "batch", "gate_keep": 0.5, "gate_sigmoid": False}, f"a lower train.lr, or {SIGMOID} may help"),
    ],
)
def test_the_advice_fits_the_model(fields: dict, expected: str) -> None:
    assert advice(Net(models.build(ModelSettings(width=4, **fields), (1, 8, 8), 3, 0))) == expected
