"""A plain sequence of layers, differentiated for K clients at once: stacked tensors and ordinary autograd in the place of `vmap`.

Shapes: K clients, B images. Images are (B, K · C, H, W), the clients' channels one after the other, so that a convolution is one
grouped convolution, and norms of groups and pools see nothing but channels. Behind `Flatten` features are (K, B, F).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels import pooled
from fedsim.kernels.rows import by_rows
from fedsim.tree import Tree

if TYPE_CHECKING:
    from fedsim.core import Batch

Stage = Callable[[Tensor, Tree, int], Tensor]  # x, weights (K, …), K
Keys = dict[str, str]  # "weight" -> its key
Makers = dict[type[nn.Module], Callable[[Any, Keys], Stage | None]]


@dataclass(frozen=True)
class Program:
    """What the layers do, one after the other."""

    stages: tuple[Stage, ...]

    def losses(self, weights: Tree, x: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
        """(K,) mean cross-entropy over the real images: x (K, B, C, H, W), y (K, B), real (K, B) or None."""
        clients = len(x)
        out = x.transpose(0, 1).flatten(1, 2)
        for stage in self.stages:
            out = stage(out, weights, clients)
        each = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return each.mean(1) if real is None else (each * real).sum(1) / real.sum(1)

    def gradients(self, weights: Tree, x: Tensor, y: Tensor, real: Tensor | None) -> tuple[Tensor, ...]:
        """Losses (K,), and the gradient of every weight (K, …), in their order."""
        leaves = {key: value.detach().requires_grad_() for key, value in weights.items()}
        with torch.enable_grad():
            losses = self.losses(leaves, x, y, real)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), *found


def gradient(program: Program, weights: Tree, batch: Batch) -> tuple[Tensor, Tree]:
    """(loss (), gradient) of one client; under `vmap` all of them go through the program together."""

    def gradients(x: Tensor, y: Tensor, real: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        return program.gradients(dict(zip(weights, values, strict=True)), x, y, real)

    loss, *found = by_rows(gradients, batch.x, batch.y, batch.real, *weights.values())
    return loss, dict(zip(weights, found, strict=True))


# ---- layers


def program(module: nn.Module, made: Makers | None = None) -> Program | None:
    """The module as a program, its layers `made` as below or otherwise; None for one that is more than a sequence of such layers."""
    first: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(value), "w/" + name)
    stages: list[Stage] = []
    flat = False
    for layer in _pooled_first(_in_turn(module)):
        make = (made or MADE).get(type(layer))
        if make is None or type(layer) in (IMAGES if flat else FEATURES):
            return None
        flat |= isinstance(layer, nn.Flatten)
        stage = make(layer, {name: first[id(value)] for name, value in layer.named_parameters(recurse=False)})
        if stage is None:
            return None
        stages.append(stage)
    return Program(tuple(stages)) if flat else None


def _pooled_first(layers: list[nn.Module]) -> list[nn.Module]:
    """A ReLU before a max pool behind it: the same value and gradient to the bit, of fewer values."""
    swapped = list(layers)
    for i, (one, other) in enumerate(pairwise(layers)):
        if type(one) is nn.ReLU and type(other) is nn.MaxPool2d:
            swapped[i : i + 2] = other, one
    return swapped


def _in_turn(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [layer for part in module for layer in _in_turn(part)]
    return [module]


def _conv2d(layer: nn.Conv2d, keys: Keys) -> Stage | None:
    return partial(_convolved, layer, keys["weight"], keys.get("bias")) if layer.padding_mode == "zeros" else None


def _convolved(layer: nn.Conv2d, weight: str, bias: str | None, x: Tensor, weights: Tree, clients: int) -> Tensor:
    shift = None if bias is None else weights[bias].flatten()
    groups = clients * layer.groups
    return F.conv2d(x, weights[weight].flatten(0, 1), shift, layer.stride, layer.padding, layer.dilation, groups)


def _group_norm(layer: nn.GroupNorm, keys: Keys) -> Stage:
    def normed(x: Tensor, weights: Tree, clients: int) -> Tensor:
        scale, shift = (weights[keys[name]].flatten() if name in keys else None for name in ("weight", "bias"))
        return F.group_norm(x, clients * layer.num_groups, scale, shift, layer.eps)

    return normed


def _linear(layer: nn.Linear, keys: Keys) -> Stage:
    def product(x: Tensor, weights: Tree, clients: int) -> Tensor:
        weight = weights[keys["weight"]].transpose(1, 2)
        return torch.baddbmm(weights[keys["bias"]].unsqueeze(1), x, weight) if "bias" in keys else torch.bmm(x, weight)

    return product


def _max_pool2d(layer: nn.MaxPool2d, keys: Keys) -> Stage | None:
    return None if layer.return_indices else lambda x, weights, clients: pooled.halved(x) if pooled.takes(x, layer) else layer(x)


def _flatten(layer: nn.Flatten, keys: Keys) -> Stage | None:
    whole = (layer.start_dim, layer.end_dim) == (1, -1)
    return (lambda x, weights, clients: x.reshape(len(x), clients, -1).transpose(0, 1)) if whole else None


def _itself(layer: nn.Module, keys: Keys) -> Stage:
    """Of a layer that looks at one value, or one channel, at a time."""
    return lambda x, weights, clients: layer(x)


MADE: Makers = {
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.MaxPool2d: _max_pool2d,
    nn.Flatten: _flatten,
    nn.Linear: _linear,
    **dict.fromkeys((nn.ReLU, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _itself),
}
FEATURES = (nn.Linear,)  # for features alone
IMAGES = (nn.Conv2d, nn.GroupNorm, nn.MaxPool2d, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # for images alone
