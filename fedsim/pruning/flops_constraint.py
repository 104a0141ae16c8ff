"""The FLOPs of gated layers as a function of the gates, T(m), and the regulariser that holds their share at a target (DWFNP, 3.4).

T counts every layer that a gate makes smaller, multiply-adds once, and 3 operations an output value for norm and activation:
T = sum over layers of (kernel area · inputs in use · outputs in use + 3 · outputs in use) · positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from fedsim.costs.profile import ModelProfile
from fedsim.nn.channels import Channels

DEAD = 0.005  # half the width of the band around the target where nothing pulls
ELEMENTWISE = 3  # operations of norm and activation for each output value


@dataclass(frozen=True)
class GatedLayer:
    """A layer that gates make smaller."""

    layer: str
    maker: str | None  # group of its outputs
    reader: str | None  # group of its inputs
    depthwise: bool
    inputs: int
    outputs: int
    area: int  # of the kernel, and positions of an input channel that was flattened
    positions: int


@dataclass(frozen=True)
class FlopsConstraint:
    """T of gates (…, n), differentiable in them; exact where they are hard. Plain numbers, so that a Work may hold it."""

    groups: tuple[str, ...]
    widths: tuple[int, ...]  # C_l
    terms: tuple[GatedLayer, ...]
    squared: bool = True  # a depth-wise layer with c of C filters costs c^2 / C, as in the published code; false: c

    @classmethod
    def of(cls, channels: Channels, model_profile: ModelProfile, squared: bool = True) -> FlopsConstraint:
        return cls(tuple(group.name for group in channels.groups), tuple(channels.widths), tuple(terms(channels, model_profile)), squared)

    @property
    def n(self) -> int:
        """Gates."""
        return sum(self.widths)

    @cached_property
    def full(self) -> int:
        """T_tot."""
        return int(self(torch.ones(self.n, dtype=torch.float64)))

    def __call__(self, gate: Tensor) -> Tensor:
        """(…,) T; in float64 where the gate is hard."""
        parts = (gate if gate.is_floating_point() else gate.double()).split(self.widths, -1)
        kept = {name: part.sum(-1) for name, part in zip(self.groups, parts, strict=True)}
        return torch.stack([self._of(term, kept) for term in self.terms]).sum(0)

    def share(self, gate: Tensor) -> Tensor:
        """(…,) T / T_tot."""
        return self(gate) / self.full

    def _of(self, term: GatedLayer, kept: Mapping[str, Tensor]) -> Tensor:
        like = next(iter(kept.values()))
        outputs = kept[term.maker] if term.maker else torch.full_like(like, term.outputs)
        if term.depthwise:
            inputs = outputs / term.outputs if self.squared else torch.ones_like(like)
        else:
            inputs = kept[term.reader] if term.reader else torch.full_like(like, term.inputs)
        return (term.area * inputs + ELEMENTWISE) * outputs * term.positions

    @property
    def least(self) -> float:
        """The lowest share that can be reached: one channel in every group."""
        one = torch.cat([torch.arange(width) == 0 for width in self.widths])
        return float(self.share(one))


def terms(channels: Channels, model_profile: ModelProfile) -> list[GatedLayer]:
    """Of every layer that a group's channels leave or enter."""
    readers = {column.removesuffix(".weight"): group for group in channels.groups for column in group.columns}
    found = []
    for layer in model_profile.layers:
        maker, reader = channels.rows.get(f"{layer.name}.weight"), readers.get(layer.name)
        if maker or reader:
            outputs, inputs, *kernel = layer.shape
            flat = inputs // reader.size if reader else 1
            found.append(
                GatedLayer(
                    layer.name,
                    maker,
                    reader.name if reader else None,
                    depthwise=layer.name in channels.depthwise,
                    inputs=inputs // flat,
                    outputs=outputs,
                    area=flat * prod(kernel),
                    positions=layer.positions,
                )
            )
    return found


def regulariser(r: Tensor, target: Tensor | float, slope: float = 1.0, weight: float = 2.0, two_sided: bool = True) -> Tensor:
    """R(r, q): weight · log(max(r, q + 0.005) / q) above the target q, weight · slope · log(q / min(r, q - 0.005)) below; (…,).

    One-sided, as in earlier work of the group: weight · log(max(r, q) / q).
    """
    q = torch.as_tensor(target, dtype=r.dtype, device=r.device)
    if not two_sided:
        return weight * torch.log(torch.maximum(r, q) / q)
    above = torch.log(torch.maximum(r, q + DEAD) / q)
    below = slope * torch.log(q / torch.minimum(r, q - DEAD))
    return weight * torch.where(r > q, above, below)
