"""What every layer costs dense and sparse on this machine, and so up to which density it is faster sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedsim.core import rng
from fedsim.kernels.sparse import layers
from fedsim.kernels.sparse.chwn_layout import as_chwn, as_nchw
from fedsim.kernels.sparse.cost_model import Cost
from fedsim.kernels.sparse.pattern import Geometry, Pattern
from fedsim.nn.net import Net
from fedsim.simulation.planning.timing import least_seconds

DENSITIES = (0.02, 0.2)  # at which a layer is timed sparse
TRIALS = 3  # timed runs, after one that warms up


def costs(net: Net, x: Tensor) -> dict[str, Cost]:
    """layer -> Cost of all layers that can run sparse, for batches like x (B, C, H, W); layers that are alike are timed once."""
    found: dict[object, Cost] = {}
    known = {}
    for name, layer, given in seen(net, x):
        geometry = net.geometries[name]
        alike = (tuple(given.shape), tuple(layer.weight.shape), geometry)
        if alike not in found:
            found[alike] = _cost(layer, given, geometry)
        known[name] = found[alike]
    return known


Weighted = nn.Conv2d | nn.Linear


def seen(net: Net, x: Tensor) -> list[tuple[str, Weighted, Tensor]]:
    """Every such layer with what it is given when the net is called with x, in the order of the calls."""
    module = net.plain(net.initial)
    calls: dict[str, tuple[str, Weighted, Tensor]] = {}

    def note(name: str, layer: Weighted, given: tuple[Tensor]) -> None:
        calls.setdefault(name, (name, layer, given[0]))

    for name, layer in module.named_modules():
        if name in net.geometries:
            layer.register_forward_pre_hook(partial(note, name))
    module(x)
    return [call for call in calls.values() if call[2].dim() in (2, 4)]


def _cost(layer: Weighted, x: Tensor, geometry: Geometry) -> Cost:
    weight = layer.weight
    leaves = [x.detach().requires_grad_(), weight.detach().clone().requires_grad_()]
    out = output(layer, *leaves)
    g = torch.ones_like(out)
    dense = least_seconds(lambda: torch.autograd.grad(output(layer, *leaves), leaves, g), x.device, TRIALS)
    laid = [as_chwn(value.detach()).movedim(-1, 0) for value in (x, out)]
    both = list(zip((x, out), laid, strict=True))
    moved = least_seconds(lambda: [(as_chwn(value.detach()), as_nchw(other)) for value, other in both], x.device, TRIALS)
    at = [least_seconds(_sparse(weight, laid[0], density, geometry), x.device, TRIALS) for density in DENSITIES]
    slope = max(0.0, (at[1] - at[0]) / (DENSITIES[1] - DENSITIES[0]))
    return Cost(dense, moved if x.dim() == 4 else 0.0, max(0.0, at[0] - slope * DENSITIES[0]), slope)


def output(layer: Weighted, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer makes of x with this weight and no bias; can be differentiated."""
    given = {"weight": weight} | ({} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)})
    with torch.enable_grad():
        return torch.func.functional_call(layer, given, (x,))


def _sparse(weight: Tensor, x: Tensor, density: float, geometry: Geometry) -> Callable[[], object]:
    """Both passes of the layer with a random share of its weights."""
    chance = rng.uniform(rng.key(0, "crossover"), weight.numel()).view(weight.shape)
    pattern = Pattern((chance < density).to(weight.device), geometry)
    leaves = x.detach().requires_grad_(), pattern.values(weight.detach()).requires_grad_()
    call = layers.conv2d if x.dim() == 4 else layers.linear

    def run() -> object:
        with torch.enable_grad():
            out = call(*leaves, None, pattern)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run
