"""Dynamic channel pruning in plain numbers (ADP, arXiv:2106.06921 v1): what dynamic gates use, and which channels a client keeps.

Shapes: n channels of all gated layers in network order, C_l those of layer l; g (…, n) are gates, active where they are above 0.
Costs are multiply-adds of one image. The reference is the same backbone without gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedsim.costs.profile import Breakdown, LayerProfile, ModelProfile
from fedsim.nn.channels import Channels
from fedsim.pruning.flops_constraint import GatedLayer, terms


@dataclass(frozen=True)
class Costs:
    """What an image costs a network whose gates see it. Plain numbers, so that a Work may hold it."""

    groups: tuple[str, ...]  # gated layers
    widths: tuple[int, ...]  # C_l
    terms: tuple[GatedLayer, ...]  # convolutions
    gates: int  # the sum of C_in C_out
    others: int  # of the layers behind the convolutions, which gates do not make smaller

    @classmethod
    def of(cls, channels: Channels, model_profile: ModelProfile) -> Costs:
        gates = {group.gate for group in channels.groups}
        touched = {term.layer: term for term in terms(channels, model_profile)}
        parts = {True: 0, False: 0}
        for layer in model_profile.layers:
            if len(layer.shape) == 2:
                parts[layer.name in gates] += layer.weights * layer.positions
        found = tuple(touched.get(layer.name) or _whole(layer) for layer in model_profile.layers if len(layer.shape) > 2)
        return cls(tuple(group.name for group in channels.groups), tuple(channels.widths), found, parts[True], parts[False])

    @property
    def dense(self) -> Breakdown:
        """Of the same network without gates."""
        convs = sum(term.area * term.inputs * term.outputs * term.positions for term in self.terms)
        return Breakdown(convs=convs, others=self.others)

    def convs(self, active: Tensor) -> Tensor:
        """(…,) float64, the convolutions' with the `active` (…, n) channels alone: k^2 inputs outputs H W, a stream's inputs all."""
        counts = {name: part.double().sum(-1) for name, part in zip(self.groups, active.split(self.widths, -1), strict=True)}
        total = torch.zeros(active.shape[:-1], dtype=torch.float64, device=active.device)
        for term in self.terms:
            inputs = counts[term.reader] if term.reader else term.inputs
            outputs = counts[term.maker] if term.maker else term.outputs
            total = total + term.area * term.positions * inputs * outputs
        return total

    def nominal(self, counts: Sequence[int]) -> dict[str, float]:
        """Shares of `dense` with `counts` channels of every layer active: of the convolutions alone, and of all, the gates added."""
        active = torch.cat([torch.arange(width) < count for width, count in zip(self.widths, counts, strict=True)])
        used = float(self.convs(active))
        whole = self.dense
        return {"nominal_convs_share": used / whole["convs"], "nominal_share": (used + self.gates + self.others) / whole.total}


def _whole(layer: LayerProfile) -> GatedLayer:
    """A convolution that no gate touches."""
    outputs, inputs, *kernel = layer.shape
    return GatedLayer(layer.name, None, None, False, inputs, outputs, prod(kernel), layer.positions)


def exported(channels: Channels, model_profile: ModelProfile, counts: Sequence[int], folded: bool) -> int:
    """Of the physically smaller network with `counts` channels of every layer, at its real shapes; folded: without gates."""
    used, names = channels.used(counts), {group.gate for group in channels.groups if folded}
    return sum(used.get(layer.name, layer.weights) * layer.positions for layer in model_profile.layers if layer.name not in names)


def aligned(counts: Sequence[int], widths: Sequence[int], align: int) -> tuple[int, ...]:
    """Every count rounded up to a multiple of `align`, never above its width."""
    return tuple(min(width, -(-count // align) * align) for count, width in zip(counts, widths, strict=True))


def kept(frequency: Tensor, mean: Tensor, widths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(n,) bool, of every layer the channels of largest `frequency`; of equals those of larger `mean` gate, then the lower ones."""
    parts = []
    for f, g, count in zip(frequency.split(list(widths)), mean.split(list(widths)), counts, strict=True):
        by_mean = g.sort(descending=True, stable=True).indices
        order = by_mean.gather(0, f.gather(0, by_mean).sort(descending=True, stable=True).indices)
        parts.append(torch.zeros_like(f, dtype=torch.bool).scatter(0, order[:count], True))
    return torch.cat(parts)
