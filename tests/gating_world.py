"""Models whose gates see the image, with values under which no two channels are alike, and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.models import settings
from fedsim.nn.net import Net

CIFAR = (3, 32, 32)
FAMILIES = ("cnn", "vgg11", "resnet8", "resnet20")


def built(name: str, keep: float | None = 0.5, width: int | None = 8, shape: tuple[int, int, int] = CIFAR, **fields: object) -> nn.Module:
    return models.build(settings.ModelSettings(name, width=width, gate_keep=keep, **fields), shape, 10, 0)  # type: ignore[arg-type]


def drawn(net: Net, seed: int = 0) -> Tree:
    """Values under which no two channels are alike, in float64."""
    source = torch.Generator().manual_seed(seed)
    tree = {}
    for key, value in net.initial.items():
        noise = torch.rand(value.shape, generator=source, dtype=value.dtype)
        tree[key] = value + (noise if key.startswith("buf/") else 0.3 * noise - 0.1 if key.endswith("bias") else 0 * noise)
    return tree


def precise(name: str, **fields: object) -> tuple[Net, Tree]:
    net = Net(built(name, **fields)).to("cpu", torch.float64)  # type: ignore[arg-type]
    return net, drawn(net)


def images(n: int = 5, shape: tuple[int, int, int] = CIFAR, seed: int = 1) -> Tensor:
    return 2 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(net: Net, share: float = 0.6, seed: int = 2) -> Tensor:
    """(n,) bool, at least one channel in every layer."""
    source = torch.Generator().manual_seed(seed)
    parts = [torch.rand(width, generator=source) < share for width in net.channels.widths]
    for part in parts:
        part[0] = True
    return torch.cat(parts)


def batch_of(x: Tensor, y: Tensor | None = None, real: Tensor | None = None) -> Batch:
    zero = torch.zeros((), dtype=torch.int64)
    return Batch(x, torch.arange(len(x)) % 10 if y is None else y, real, zero, zero + 1)


def by_sorting(g: Tensor, k: int) -> Tensor:
    """g (B, C) with all but the `k` largest of a row set to 0, by a full sort of each."""
    rows = []
    for row in g.tolist():
        best = sorted(range(len(row)), key=lambda channel: (-row[channel], channel))[:k]
        rows.append([value if channel in best else 0.0 for channel, value in enumerate(row)])
    return torch.tensor(rows, dtype=g.dtype)
