"""A traced graph that computes something else than its module is noticed before channels are cut by it, or gates are put into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.errors import BadInput
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn.channel_groups import find_groups
from fedsim.nn.checks import traced
from fedsim.nn.layers import gate_insertion
from fedsim.nn.layers.input_gate import Gating
from fedsim.nn.net import Net


class Network(nn.Module):
    """Two convolutions and a classifier, behind something that `before` does to the images."""

    def __init__(self, before: Callable[[Network, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.3))
        self.shift = torch.full((1,), 0.3)
        self.before = before

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        x = self.before(self, x, scale)
        return self.fc(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


RIGHT: dict[str, Any] = {
    "nothing": lambda m, x, scale: x,
    "a buffer": lambda m, x, scale: x - m.mean,
    "a tensor": lambda m, x, scale: x - m.shift,
    "an argument that is left out": lambda m, x, scale: x,
}
WRONG: dict[str, tuple[Any, str]] = {
    "the kind of an argument": (lambda m, x, scale: x * 2 if isinstance(x, Tensor) else x, "computes something else in training mode"),
    "the mode": (lambda m, x, scale: x * 2 if m.training else x, "computes something else in evaluation mode"),
    "an argument": (lambda m, x, scale: x if scale is None else x * scale, "fails in training mode"),
}
X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def network(shape: Any = None, classes: int = 3) -> nn.Module:
    """The factory of the job; `chosen` says what it does."""
    return Network(chosen[0])


chosen: list[Any] = []


@pytest.mark.parametrize("name", RIGHT)
def test_a_graph_that_computes_the_same_is_taken(name: str) -> None:
    module = Network(RIGHT[name])
    assert traced.fault(module, X) == ""
    assert [group.name for group in find_groups(module)[1]] == ["one", "two"]


@pytest.mark.parametrize("name", WRONG)
def test_a_graph_that_computes_something_else_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = WRONG[name]
    why = traced.fault(Network(before), X)
    assert f"what torch.fx traces of its forward {said}" in why
    net = Net(Network(before))
    net.not_traced = why
    with pytest.raises(ValueError, match=r"the model has no gates: what torch\.fx traces"):
        _ = net.channels
    chosen[:] = [before]
    with pytest.raises(BadInput, match=r"\[model\] gate_keep: what torch\.fx traces"):
        build(ModelSettings(factory=f"{__name__}:network", gate_keep=0.5), (1, 6, 6), 3, 0)


def test_dropout_by_function_in_a_gated_model_is_refused() -> None:
    chosen[:] = [lambda m, x, scale: F.dropout(x, 0.5, m.training)]
    with pytest.raises(BadInput, match=r"computes something else|takes different steps in training and in evaluation"):
        build(ModelSettings(factory=f"{__name__}:network", gate_keep=0.5), (1, 6, 6), 3, 0)


def test_a_tensor_made_at_every_call_is_named_as_the_reason() -> None:
    with pytest.raises(ValueError, match=r"makes a tensor at every call, such as torch\.tensor\(0\.3\)"):
        find_groups(Network(lambda m, x, scale: x - torch.tensor(0.3)))


def test_a_tensor_that_depends_on_the_mode_is_refused_where_gates_are_put_in() -> None:
    chosen[:] = [lambda m, x, scale: x - torch.tensor(0.3 if m.training else 0.4)]
    with pytest.raises(BadInput, match=r"computes something else|takes different steps in training and in evaluation"):
        build(ModelSettings(factory=f"{__name__}:network", gate_keep=0.5), (1, 6, 6), 3, 0)


def test_a_model_that_torch_fx_cannot_trace_is_left_to_who_needs_its_graph() -> None:
    assert traced.fault(Network(lambda m, x, scale: x if x.sum() > 0 else -x), X) == ""


@pytest.mark.parametrize("answer", [lambda m, x, scale: x.reshape(-1, 7), lambda m, x, scale: x[:, :, 0]], ids=["sizes", "axes"])
def test_a_model_that_fails_by_itself_is_left_to_the_check_of_models(answer: Any) -> None:
    assert traced.fault(Network(answer), X) == ""
    chosen[:] = [answer]
    build(ModelSettings(factory=f"{__name__}:network", gate_keep=0.5), (1, 6, 6), 3, 0)  # which `refuse_wrong` then looks at


@pytest.mark.parametrize(
    "before",
    [lambda m, x, scale: x * 2 if m.training else x, lambda m, x, scale: x - torch.tensor(0.3 if m.training else 0.4)],
    ids=["steps", "a tensor"],
)
def test_gates_are_not_put_into_a_model_that_does_something_else_in_evaluation(before: Any) -> None:
    with pytest.raises(BadInput, match=r"\[model\] gate_keep: its forward takes different steps in training and in evaluation"):
        gate_insertion.insert_gates(Network(before), Gating(0.5))


def test_a_run_that_would_cut_channels_by_such_a_graph_is_refused(tmp_path: Path) -> None:
    chosen[:] = [WRONG["the kind of an argument"][0]]
    job = {
        "rounds": 2,
        "data": {"name": "fake", "image_size": 6, "channels": 1, "classes": 3, "train_images": 90, "test_images": 30},
        "partition": {"clients": 3},
        "model": {"factory": f"{__name__}:network"},
        "execution": {"plan": "reference"},
    }
    with pytest.raises(BadInput, match=r"\[model\] the model has no gates: what torch\.fx traces"):
        fedsim.run(job | {"method": {"name": "structured"}}, out=tmp_path / "cut.h5", progress=False)
    assert fedsim.run(job | {"method": {"name": "fedavg"}}, out=tmp_path / "whole.h5", progress=False).attributes["finished"]
