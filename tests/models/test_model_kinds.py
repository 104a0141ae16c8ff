"""Models as strangers bring them: each kind is computed as torch computes it, or refused by one line that says why and what to do."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import model_kinds
import pytest
import torch
from model_kinds import CLASSES, EVERYWHERE, REFUSED, SERIAL, SHAPE, Make

from fedsim import models
from fedsim.core import keys
from fedsim.errors import BadInput
from fedsim.models import ModelSettings
from fedsim.nn.checks import ways
from fedsim.nn.net import Net
from fedsim.simulation.checking.start import refuse_wrong

SETTINGS = ModelSettings(factory="model_kinds:offered")


@pytest.fixture(autouse=True)
def _no_warning_of_vmap() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def images() -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *SHAPE, generator=generator), torch.arange(4), CLASSES


def made(make: Make, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The model as a job builds it, checked as at the start of a run."""
    monkeypatch.setattr(model_kinds, "offered", lambda shape, classes: make(), raising=False)
    module = models.build(SETTINGS, SHAPE, CLASSES, 0)
    refuse_wrong(SETTINGS, module, images())
    return module


@pytest.mark.parametrize("choice", ["saliency", "random"])
def test_a_model_with_dynamic_gates_is_accepted(choice, monkeypatch) -> None:
    monkeypatch.setattr(model_kinds, "offered", lambda shape, classes: EVERYWHERE["plain sequence"](), raising=False)
    settings = replace(SETTINGS, gate_keep=0.5, gate_choice=choice)
    refuse_wrong(settings, models.build(settings, SHAPE, CLASSES, 0), images())


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_accepted_and_alike_on_both_fleets(kind, monkeypatch) -> None:
    module = made(EVERYWHERE[kind], monkeypatch)
    assert ways.stacked(module, *images()[:2]) == ""


@pytest.mark.parametrize("kind", SERIAL)
def test_accepted_one_client_after_the_other(kind, monkeypatch) -> None:
    make, words = SERIAL[kind]
    assert re.search(words, ways.stacked(made(make, monkeypatch), *images()[:2]))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) if "compiled" in kind else kind for kind in REFUSED])
def test_refused_by_one_line(kind, monkeypatch) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(BadInput, match=f'"model_kinds:offered".*{words}') as error:
        made(make, monkeypatch)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["depthwise", "residual", "a convolution by keyword", "frozen parameters"])
def test_masks_gates_and_pruned_activations_reach_other_peoples_layers(kind) -> None:
    torch.manual_seed(0)
    found = ways.every(EVERYWHERE[kind](), *images()[:2])
    assert not [row for row in found if not row.right]


@pytest.mark.parametrize("kind", [kind for kind in EVERYWHERE if kind.startswith("buffers ")])
def test_changing_buffers_are_the_same_under_masks_and_gates(kind) -> None:
    torch.manual_seed(0)
    module, images_, labels = EVERYWHERE[kind](), *images()[:2]
    assert ways.sparse(module, images_, labels).right
    assert ways.gated(module, images_, labels).right


@pytest.mark.parametrize("buffer", [True, False])
def test_constants_of_the_model_keep_their_values_under_gates(buffer) -> None:
    """Integer buffers and plain tensors, in a network whose first channels can be cut."""
    torch.manual_seed(0)
    order = torch.arange(6).flip(0)
    module = model_kinds.with_attribute("order", order, lambda m, x: m.head(torch.relu(m.b(torch.relu(m.conv(x))))[:, m.order]), buffer)
    module.b = model_kinds.conv(6)
    assert Net(module).channels.widths == [6]
    assert ways.gated(module, *images()[:2]).right


def test_masks_reach_weights_that_torch_reads_outside_of_their_layers() -> None:
    """In evaluation torch computes a whole transformer block from the weights of its layers."""
    torch.manual_seed(0)
    module, x = EVERYWHERE["transformer block"](), images()[0]
    net = Net(module)
    masks = {keys.mask(layer): torch.rand(net.shapes[layer]) < 0.5 for layer in net.maskable}
    for layer in net.maskable:
        module.get_parameter(f"{layer}.weight").data *= masks[keys.mask(layer)]
    assert "middle.0.linear1" in net.maskable
    for train in (True, False):
        logits, _ = net(net.initial | masks, x, train)
        assert torch.allclose(logits, module.train(train)(x), atol=1e-5)
