"""Budget-aware extrusion: before weights are dropped, a penalty presses them towards zero, in a budget of steps, at its own rate.

FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification section 3.3. Marked are the weights that will be dropped, as every
client computes them from the broadcast, so that nothing travels.

Paper -> code:  theta_low -> marked,  lambda -> penalty,  T -> budget,  p(t) -> rex,  beta_t -> beta,  eta_0 -> lr0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.keys import MARKED
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch
from fedsim.federated.client_work import TrainAndScore
from fedsim.federated.protocol import ClientInput

if TYPE_CHECKING:
    from fedsim.nn.net import Net

RAMP = 100  # times the penalty: where a growing one ends


def rex(t: Tensor | float, budget: Tensor | float) -> Tensor | float:
    """p(t) = (2 T - 2 t) / (2 T - t), from 1 at t = 0 to 0 at t = T."""
    return (2 * budget - 2 * t) / (2 * budget - t)


def beta(norm: Tensor, t: Tensor | float, budget: Tensor | float, lr0: float) -> Tensor:
    """beta_t = p(t) (2 sigmoid(|theta_low|) - 1) eta_0."""
    t, budget = (torch.as_tensor(value).to(norm.dtype) for value in (t, budget))
    return rex(t, budget) * torch.tanh(norm / 2) * lr0


def marked(shared: Tree, moves: Mapping[str, int]) -> Tree:
    """MARKED + LAYER: the K_l kept weights of smallest magnitude of every layer in `moves`, smallest first."""
    return {MARKED + layer: masks.smallest(shared[keys.weight(layer)], shared[keys.mask(layer)], k) for layer, k in moves.items()}


def norm_of(weights: Tree, marks: Tree, kind: str = "l2") -> Tensor:
    """|theta_low| over all marked weights of all layers, ()."""
    low = torch.cat([weights[keys.weight(key.removeprefix(keys.MARKED))].flatten()[index] for key, index in marks.items()])
    return low.abs().sum() if kind == "l1" else low.square().sum().sqrt()


@dataclass(frozen=True)
class ExtrudeAndProbe(TrainAndScore):
    """TrainAndScore whose training presses the marked weights down; `marks` are the weights that `moves`, of this round or a later one."""

    penalty: float = 1e-4  # lambda
    form: str = "squared"  # lambda |theta_low|^2, or the "norm" itself
    ramp: bool = False  # lambda grows from step to step, by itself, to RAMP times what it is
    beta_norm: str = "l2"  # of the marked weights, in their rate: l2 | l1
    lr0: float = 0.0  # eta_0
    budget: int | None = None  # T, the last steps of local training; None: all
    before: int = 0  # rounds of this extrusion that came before this one
    rounds: int = 1  # of this extrusion
    remark: bool = False  # marked anew at every step
    marks: Mapping[str, int] = field(default_factory=dict)  # K_l

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return super().init_state(net, sent) | marked(sent.tree({}), self.marks)

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        if batch.feed:
            return super().step(net, sent, state, batch)
        held = sent.tree(state)
        if self.remark:
            state = state | marked(held, self.marks)
        marks = under(state, MARKED)
        norm, (t, budget) = norm_of(held, marks, self.beta_norm).detach(), self._spent(batch)
        inside = (t >= 0).to(norm.dtype)
        loss, gradient, buffers, taps = self.gradient(net, sent, state, batch)
        strength = self._penalty(t) * inside
        for key, index in marks.items():
            name = keys.weight(key.removeprefix(keys.MARKED))
            if name not in gradient:  # a frozen weight, which no penalty moves
                continue
            low = state[name].flatten()[index]
            press = 2 * strength * low if self.form == "squared" else strength * low / norm_of(held, marks).clamp(min=1e-12)
            gradient[name] = gradient[name].flatten().index_add(0, index, press).view(state[name].shape)
        lr = torch.clamp(inside * beta(norm, t.clamp(min=0), budget, self.lr0), min=self.lr)
        rate: float | Tensor = self.lr if self.lr >= self.lr0 else lr  # beta is below eta_0
        return self.descend(net, sent, state | buffers | taps, gradient, rate), loss

    def _spent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t, below 0 where the budget is not begun, and T."""
        whole = self.rounds * batch.T
        budget = whole if self.budget is None else whole.clamp(max=self.budget)
        return self.before * batch.T + batch.t - (whole - budget), budget

    def _penalty(self, t: Tensor) -> Tensor:
        grown = self.penalty * (t + 1) if self.ramp else torch.full_like(t, self.penalty, dtype=torch.float32)
        return grown.clamp(max=RAMP * self.penalty if self.ramp else inf)
