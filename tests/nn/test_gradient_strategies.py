"""Which strategy computes a gradient: the first one that fits, by the net's settings and by what is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.nn.gradients.strategies import STRATEGIES, GradientRequest, checked
from fedsim.nn.loss import cross_entropy
from fedsim.nn.net import Net

HARD = torch.tensor([True, False, True, True])


def net_of(pure: bool = False, **settings: Any) -> Net:
    """Two convolutions, whose first four channels have gates, and a linear layer."""
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3)
    net = Net(nn.Sequential(*layers))
    net.set_activation_pruning(settings.get("pruning"))
    net.set_compute_dtype(settings.get("dtype"))
    net.set_packed_convolution(settings.get("how", "grouped"))
    return net.under_vmap() if pure else net


def chosen(net: Net, added: Tree | None = None, **options: Any) -> str:
    x = torch.zeros(2, 1, 4, 4)
    batch = Batch(x, torch.zeros(2, dtype=torch.long), None, torch.tensor(0), torch.tensor(1))
    tree = net.initial | (added or {})
    given: dict[str, Any] = {"wrt": ("w",), "loss": cross_entropy, "extra": None, "tap": None, "layers": (), "compact": True} | options
    request = GradientRequest(tree=tree, batch=batch, **given)
    return next(type(strategy).__name__ for strategy in STRATEGIES if strategy.fits(net, request))


def other(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    return cross_entropy(logits, y, real)


@pytest.mark.parametrize(
    ("strategy", "settings", "added", "options"),
    [
        ("CompactStrategy", {}, {"gate/channels": HARD}, {}),
        ("AutogradStrategy", {}, {"gate/channels": HARD}, {"compact": False}),
        ("AutogradStrategy", {}, {"gate/channels": HARD.float()}, {}),
        ("AutogradStrategy", {}, {"gate/channels": HARD, "mask/2.weight": torch.ones(2, 4, 3, 3, dtype=torch.bool)}, {}),
        ("AutogradStrategy", {}, {"gate/channels": HARD}, {"extra": {"w/2.bias": torch.ones(2)}}),
        ("AutogradStrategy", {"pruning": ActivationPruning(0.5)}, {"gate/channels": HARD}, {}),
        ("AutogradStrategy", {}, {}, {}),
        ("PackedProgramStrategy", {"pure": True}, {}, {}),
        ("PackedProgramStrategy", {"pure": True, "how": "matmul"}, {}, {}),
        ("FuncStrategy", {"pure": True, "dtype": torch.bfloat16}, {}, {}),
        ("FuncStrategy", {"pure": True}, {}, {"loss": other}),
        ("FuncStrategy", {"pure": True}, {}, {"tap": lambda name, g: {}, "layers": ("2",)}),
        ("FuncStrategy", {"pure": True}, {"gate/channels": HARD}, {}),
        ("FuncStrategy", {"pure": True}, {}, {"wrt": ()}),
    ],
)
def test_the_first_strategy_that_fits(strategy: str, settings: dict[str, Any], added: Tree, options: dict[str, Any]) -> None:
    assert chosen(net_of(**settings), added, **options) == strategy


def test_wrt_is_a_name_several_names_or_none() -> None:
    soft = {"gate/channels": torch.ones(4)}
    assert checked("w", {}) == ("w",)
    assert checked(("w", "gate"), soft) == ("w", "gate")
    assert checked(None, {}) == ()
    with pytest.raises(ValueError, match=r"wrt = 'weights': 'weights' is not one of w, gate"):
        checked("weights", {})
    with pytest.raises(ValueError, match="no soft gate 'gate/channels'"):
        checked("gate", {"gate/channels": HARD})
