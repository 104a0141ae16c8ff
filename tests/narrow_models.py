"""Narrow models with values that do something, hard gates for them, and batches: what tests of gates work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.core.tree import Tree, each
from fedsim.core.types import Batch
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn.net import Net

CLASSES = 3
SHAPES = {"cnn": (2, 8, 8), "resnet8": (2, 8, 8), "resnet18": (2, 8, 8), "mobilenet_v2": (2, 8, 8), "vgg11": (2, 32, 32)}
ZOO = [
    *(("cnn", norm, standardise) for norm in ("none", "batch", "group") for standardise in (False, True)),
    *(("resnet8", norm, standardise) for norm in ("none", "batch", "group") for standardise in (False, True)),
    *((name, norm, False) for name in ("resnet18", "vgg11", "mobilenet_v2") for norm in ("batch", "group")),
    ("mobilenet_v2", "group", True),
]


def drawn(name: str, norm: str = "batch", standardise: bool = False) -> tuple[nn.Module, Net, Tree]:
    """A narrow model, its net in float64, and values whose norms do something."""
    module = build(ModelSettings(name, width=4, norm=norm, standardise=standardise), SHAPES[name], CLASSES, 0).double()
    net = Net(module).to("cpu", torch.float64)
    return module, net, lively(net)


def lively(net: Net) -> Tree:
    """Weights drawn after He et al., whatever the module began with; vectors (norms, biases, running statistics) shaken."""
    generator = torch.Generator().manual_seed(1)

    def value(old: Tensor) -> Tensor:
        drawn = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        return drawn * (2 / old[0].numel()) ** 0.5 if old.dim() > 1 else old + drawn.abs() / 2

    return each(value, net.initial)


def hard(net: Net, seed: int = 0, share: float = 0.5) -> Tensor:
    """(n,) a random hard gate that closes something and empties no group."""
    gate = torch.rand(net.channels.n, generator=torch.Generator().manual_seed(seed)) < share
    for part in net.channels.split(gate).values():  # views
        part[0], part[-1] = True, False
    return gate


def batch(name: str, count: int = 5, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *SHAPES[name], generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(0, CLASSES, (count,), generator=generator), None, torch.tensor(0), torch.tensor(1))


def close(one: Tensor, other: Tensor, within: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= within * other.abs().max())


def alike(one: Tree, other: Tree) -> None:
    """Within 1e-5 of the largest magnitude in the tree."""
    assert one.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in other.values())
    assert all((one[key] - value).abs().max() <= 1e-5 * largest for key, value in other.items())
