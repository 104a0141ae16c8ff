"""A plain sequence of layers, differentiated for K clients at once by ordinary autograd on stacked tensors, in place of `vmap`.

Shapes: K clients, B images. Images are (B, K · C, H, W), the clients' channels one after the other, so that a convolution is one
grouped convolution, and norms of groups and pools see nothing but channels. Behind `Flatten` features are (K, B, F).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import REAL_IMAGES, mask_of
from fedsim.core.tree import Tree
from fedsim.kernels import max_pool
from fedsim.kernels.activation_pruning.layers import Convolution, Layer, Products, operation, pruned_pack
from fedsim.kernels.activation_pruning.relu_and_pool import averaged, has_places, largest_of_windows, relu
from fedsim.kernels.nsconv import RELU_SCALE
from fedsim.kernels.vmap import by_rows
from fedsim.nn.layers.nsconv import NormalisedConv2d, ScaledReLU

if TYPE_CHECKING:
    from fedsim.core.types import Batch


Stage = Callable[[Tensor, Tree, int], Tensor]  # x, weights and masks (K, …), K
Keys = dict[str, str]  # "weight" -> its key
Makers = dict[type[nn.Module], Callable[[Any, Keys], Stage | None]]


@dataclass(frozen=True)
class PackedProgram:
    """The layers of a plain sequence, as functions of stacked clients."""

    stages: tuple[Stage, ...]

    def losses(self, weights: Tree, x: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
        """(K,) mean cross-entropy over the real images: x (K, B, C, H, W), y (K, B), real (K, B) or None."""
        clients = len(x)
        out = x.transpose(0, 1).flatten(1, 2)
        weights = weights if real is None else weights | {REAL_IMAGES: real}
        for stage in self.stages:
            out = stage(out, weights, clients)
        each = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return each.mean(1) if real is None else (each * real).sum(1) / real.sum(1)

    def gradients(self, weights: Tree, x: Tensor, y: Tensor, real: Tensor | None, frozen: Collection[str] = ()) -> tuple[Tensor, ...]:
        """Losses (K,), and the gradient of every weight (K, …) that is not frozen, in their order."""
        leaves = {key: weights[key].detach().requires_grad_() for key in _leaves(weights, frozen)}
        with torch.enable_grad():
            losses = self.losses(weights | leaves, x, y, real)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), *found


def gradient(program: PackedProgram, weights: Tree, batch: Batch, frozen: Collection[str] = ()) -> tuple[Tensor, Tree]:
    """(loss (), gradient) of one client; under `vmap` the program runs once for all of them. `weights` may contain masks."""

    def gradients(x: Tensor, y: Tensor, real: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        return program.gradients(dict(zip(weights, values, strict=True)), x, y, real, frozen)

    loss, *found = by_rows(gradients, batch.x, batch.y, batch.real, *weights.values())
    return loss, dict(zip(_leaves(weights, frozen), found, strict=True))


def _leaves(weights: Tree, frozen: Collection[str]) -> list[str]:
    return [key for key in weights if key.startswith(keys.WEIGHTS) and key not in frozen]


# ---- layers
def program(module: nn.Module, made: Makers | None = None, pruning: ActivationPruning | None = None) -> PackedProgram | None:
    """The module as a program whose layers are `made` by these functions; None if it is not a plain sequence of such layers.

    pruning: how the inputs of all layers but the first are pruned.
    """
    first: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(value), keys.WEIGHTS + name)
    made = made or MADE
    pruned = made if pruning is None else made | _with_pruning(pruning)
    weighted = False
    stages: list[Stage] = []
    flat = False
    for layer in _pooled_first(_in_turn(module)):
        make = (pruned if weighted or not list(layer.parameters()) else made).get(type(layer))
        weighted |= bool(list(layer.parameters(recurse=False)))
        if make is None or type(layer) in (IMAGES if flat else FEATURES):
            return None
        flat |= isinstance(layer, nn.Flatten)
        stage = make(layer, {name: first[id(value)] for name, value in layer.named_parameters(recurse=False)})
        if stage is None:
            return None
        stages.append(stage)
    return PackedProgram(tuple(stages)) if flat else None


def _pooled_first(layers: list[nn.Module]) -> list[nn.Module]:
    """Moves a ReLU behind the max pool that follows it: the same value and gradient to the bit, on fewer values."""
    swapped = list(layers)
    for i, (one, other) in enumerate(pairwise(layers)):
        if type(one) is nn.ReLU and type(other) is nn.MaxPool2d:
            swapped[i : i + 2] = other, one
    return swapped


def _in_turn(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [layer for part in module for layer in _in_turn(part)]
    return [module]


def _conv2d(layer: nn.Conv2d, names: Keys) -> Stage | None:
    return partial(_convolved, layer, names["weight"], names.get("bias")) if layer.padding_mode == "zeros" else None


def _convolved(layer: nn.Conv2d, weight: str, bias: str | None, x: Tensor, weights: Tree, clients: int) -> Tensor:
    shift = None if bias is None else weights[bias].flatten()
    groups = clients * layer.groups
    return F.conv2d(x, weights[weight].flatten(0, 1), shift, layer.stride, layer.padding, layer.dilation, groups)


def _normalised(layer: NormalisedConv2d, names: Keys, pruning: ActivationPruning | None = None) -> Stage | None:
    """A convolution with a gain, and a mask where the weights have one."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    weight, mask = names["weight"], mask_of(names["weight"])

    def convolved(x: Tensor, weights: Tree, clients: int) -> Tensor:
        way = Layer(_grouped(layer, clients), layer.over, form=clients)
        cache = pruned_pack(x, weights.get(REAL_IMAGES), pruning, clients) if pruning else None
        held = weights[mask].flatten(0, 1) if mask in weights else None
        bias = weights[names["bias"]].flatten() if "bias" in names else None
        return way(x, cache, weights[weight].flatten(0, 1), bias, weights[names["gain"]].flatten(), held)

    return convolved


def _grouped(layer: nn.Conv2d, clients: int) -> Convolution:
    return replace(cast(Convolution, operation(layer)), groups=clients * layer.groups)


def _with_pruning(pruning: ActivationPruning) -> Makers:
    """The layers that differ under activation pruning."""
    linear: Makers = {nn.Linear: partial(_pruned_linear, pruning)} if pruning.layers == "all" else {}
    return {
        nn.Conv2d: partial(_pruned_conv2d, pruning),
        NormalisedConv2d: partial(_normalised, pruning=pruning),
        nn.ReLU: lambda layer, names: lambda x, weights, clients: relu(x),
        ScaledReLU: lambda layer, names: lambda x, weights, clients: relu(x, scale=RELU_SCALE),
        nn.MaxPool2d: _pruned_max_pool2d,
        nn.AvgPool2d: lambda layer, names: lambda x, weights, clients: averaged(layer, x),
        **linear,
    }


def _pruned_conv2d(pruning: ActivationPruning, layer: nn.Conv2d, names: Keys) -> Stage | None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None

    def convolved(x: Tensor, weights: Tree, clients: int) -> Tensor:
        cache, bias = (
            pruned_pack(x, weights.get(REAL_IMAGES), pruning, clients),
            weights[names["bias"]].flatten() if "bias" in names else None,
        )
        return Layer(_grouped(layer, clients), form=clients)(x, cache, weights[names["weight"]].flatten(0, 1), bias)

    return convolved


def _pruned_max_pool2d(layer: nn.MaxPool2d, names: Keys) -> Stage | None:
    if not has_places(layer):
        return _max_pool2d(layer, names)
    return lambda x, weights, clients: max_pool.halved(x) if max_pool.takes(x, layer) else largest_of_windows(layer, x)


def _pruned_linear(pruning: ActivationPruning, layer: nn.Linear, names: Keys) -> Stage:
    def product(x: Tensor, weights: Tree, clients: int) -> Tensor:
        cache = pruned_pack(x, weights.get(REAL_IMAGES), pruning, clients)
        return Layer(Products(), form=clients)(x, cache, weights[names["weight"]], weights[names["bias"]] if "bias" in names else None)

    return product


def _group_norm(layer: nn.GroupNorm, names: Keys) -> Stage:
    def normed(x: Tensor, weights: Tree, clients: int) -> Tensor:
        scale, shift = (weights[names[name]].flatten() if name in names else None for name in ("weight", "bias"))
        return F.group_norm(x, clients * layer.num_groups, scale, shift, layer.eps)

    return normed


def _linear(layer: nn.Linear, names: Keys) -> Stage:
    def product(x: Tensor, weights: Tree, clients: int) -> Tensor:
        weight = weights[names["weight"]].transpose(1, 2)
        return torch.baddbmm(weights[names["bias"]].unsqueeze(1), x, weight) if "bias" in names else torch.bmm(x, weight)

    return product


def _max_pool2d(layer: nn.MaxPool2d, names: Keys) -> Stage | None:
    return None if layer.return_indices else lambda x, weights, clients: max_pool.halved(x) if max_pool.takes(x, layer) else layer(x)


def _flatten(layer: nn.Flatten, names: Keys) -> Stage | None:
    whole = (layer.start_dim, layer.end_dim) == (1, -1)
    return (lambda x, weights, clients: x.reshape(len(x), clients, -1).transpose(0, 1)) if whole else None


def _itself(layer: nn.Module, names: Keys) -> Stage:
    """The layer itself, which reads one value, or one channel, at a time."""
    return lambda x, weights, clients: layer(x)


MADE: Makers = {
    nn.Conv2d: _conv2d,
    NormalisedConv2d: _normalised,
    nn.GroupNorm: _group_norm,
    nn.MaxPool2d: _max_pool2d,
    nn.Flatten: _flatten,
    nn.Linear: _linear,
    **dict.fromkeys((nn.ReLU, ScaledReLU, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _itself),
}
FEATURES = (nn.Linear,)  # for features alone
IMAGES = (nn.Conv2d, NormalisedConv2d, nn.GroupNorm, nn.MaxPool2d, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # for images alone
