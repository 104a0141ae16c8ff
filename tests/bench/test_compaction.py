"""`fedsim bench compaction` compares like with like: its hand-built networks compute what the engine computes, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from channel_models import ZOO, close, drawn
from torch import nn

from fedsim.bench.compaction import INFERENCE, TRAINING, Case, half, hand_built
from fedsim.config.job import check, load
from fedsim.core.keys import GATE
from fedsim.errors import BadInput
from fedsim.simulation.experiment import build_experiment

ROOT = Path(__file__).parents[2]


def case(**model: Any) -> Case:
    table = {
        "data": {"name": "fake", "channels": 2, "image_size": 8, "classes": 3, "train_images": 40},
        "partition": {"name": "blocks", "clients": 2, "test": "global"},
        "model": model,
        "train": {"batch": 6, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
        "method": {"name": "fedavg"},
        "execution": {"device": "cpu"},
    }
    return Case.of(build_experiment(check(table)))


def without_gates(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


@pytest.mark.parametrize(("name", "norm", "standardise"), ZOO)
def test_a_hand_built_network_has_the_widths_and_the_outputs_of_the_gated_one(name: str, norm: str, standardise: bool) -> None:
    module, net, values = drawn(name, norm, standardise)
    gate = half(net.channels, 0)
    kept = net.channels.kept(gate)
    small = hand_built(module, net.channels.groups, {group: len(index) for group, index in kept.items()}).double()
    narrow = {key.partition("/")[2]: value for key, value in net.compact(values, kept).items()}
    for layer in [key.removesuffix(".removed") for key in narrow if key.endswith(".removed")]:
        small.get_submodule(layer).removed = narrow[f"{layer}.removed"]  # what each stored filter counts beside the kept entries
    held = {key: value for key, value in small.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in held.items()} == {key: value.shape for key, value in narrow.items()}
    small.load_state_dict(narrow, strict=False)
    side = 32 if name == "vgg11" else 8
    x = torch.randn(5, 2, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(small.eval()(x), net.under_vmap()(values | {GATE: gate}, x)[0])  # masked: nothing is cut


@pytest.mark.parametrize(
    "model",
    [
        {"name": "resnet8", "norm": "group"},
        {"name": "cnn", "width": 6},
        {"name": "mobilenet_v2", "width": 4},
        {"name": "mobilenet_v2_cifar", "width": 4},
    ],
)
def test_the_steps_of_both_have_the_same_losses(model: dict[str, Any]) -> None:
    runs = case(**model).training()
    for own, other in (("half", "hand-built half"), ("full", "hand-built full")):
        losses = torch.tensor([[runs[own](), runs[other]()] for _ in range(4)])
        assert len(set(losses[:, 0].tolist())) == 4
        torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("standardise", [False, True])
def test_the_exported_half_and_the_hand_built_one_have_the_same_logits(standardise: bool) -> None:
    runs = case(name="resnet8", norm="group", standardise=standardise).inference(3)
    torch.testing.assert_close(runs["exported"](), runs["hand-built half"]())
    assert runs["full"]().shape == (3, 3)


def test_every_comparison_has_its_two_runs() -> None:
    one = case(name="cnn", width=4)
    for lines, runs in ((TRAINING, one.training()), (INFERENCE, one.inference(1))):
        assert {run for line in lines for run in line[1:3]} == set(runs)


def test_half_keeps_half_of_every_group_and_another_seed_other_channels() -> None:
    channels = drawn("cnn")[1].channels
    gates = [half(channels, seed) for seed in range(3)]
    for gate in gates:
        assert [int(part.sum()) for part in channels.split(gate).values()] == [-(-size // 2) for size in channels.widths]
    assert len({tuple(gate.tolist()) for gate in gates}) == 3


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(BadInput, match="has no gates"):
        case(factory=f"{__name__}:without_gates")


def test_the_job_is_the_one_that_was_agreed() -> None:
    job = load(ROOT / "jobs/bench/compaction.toml")
    train = job.train.training(1, True)
    assert (job.model.name, job.model.norm, job.data.channels, job.data.image_size, job.data.classes) == ("resnet56", "group", 3, 32, 10)
    assert (train.batch, train.momentum, train.decay, train.optimiser) == (25, 0.9, 1e-4, "sgd")
