"""Structured baselines of device-wise pruning: dense training, one cut to a share of the FLOPs, fine-tuning of what is left.

uniform: every gated layer keeps the same share of its channels, those whose filters have the largest L1 norm. random: as many, drawn.
fl1: channels of all layers in one order of their feature norm, measured by the clients; the smallest go, `prune_size` at a time
(after gaosh/DWNP, whose mistakes are left out: the very smallest channel goes too, images count alike, no layer is emptied).

Paper -> code:  p -> flops_share,  T -> FlopsConstraint,  R(r, p) <= 0.05 -> r <= 1.025 p
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, inf
from typing import Literal

import torch
from torch import Tensor

from fedsim.core import keys, rng
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under
from fedsim.core.types import Data, Feed
from fedsim.core.validation import MAX_COHORT, TINY, read_where, within
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning.cut_and_finetune import CutAndFinetune
from fedsim.pruning.flops_constraint import FlopsConstraint
from fedsim.pruning.gate_controller import reachable
from fedsim.pruning.gated_training import ENERGY_UNIT, Energy

SLACK = exp(0.05 / 2)  # of r over p where R(r, p) = 2 log(r / p) is 0.05


@dataclass(frozen=True)
class State(AveragedState):
    kept: Tree = field(default_factory=dict)  # group -> positions of the channels that the cut has left; empty before it


@dataclass(frozen=True)
class Structured(CutAndFinetune, Method[State]):
    """Cuts one network for all clients, once."""

    choice: Literal["uniform", "random", "fl1"] = "uniform"  # which channels stay
    flops_share: float = 0.5  # p, FLOPs share of the gated layers that stays
    strict: bool = False  # with fl1: r <= p; false: R(r, p) <= 0.05
    prune_size: int = 10  # with fl1: channels removed at a time
    norm: Literal["l2", "l1"] = "l2"  # with fl1: squared or absolute activations
    over: Literal["sum", "mean"] = "sum"  # with fl1: over a channel's positions; with the sum those of a linear layer, one each, go first
    depthwise: Literal["squared", "true"] = "squared"  # FLOPs of depth-wise layers: c^2 / C as in the authors' code, or c

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, flops_share=(TINY, 1), prune_size=(1, inf))

    def unread(self) -> dict[str, str]:
        return read_where(self, "choice", ("fl1",), "strict", "prune_size", "norm", "over")

    def init(self, setting: Setting, public: Data | None) -> State:
        self.check(setting)
        reachable(self._flops(setting), "flops_share", self.flops_share)
        return State.begin(setting, under(setting.net.initial, keys.WEIGHTS, keys.BUFFERS))

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        work, net = self.training(setting, r), setting.net.cut(state.kept) if state.kept else None
        state, _ = trained(setting, fleet, state, r, work, net=net)
        found = {"lr": work.lr}
        if r == self.cut_after(setting):
            gate = self.chosen(setting, state.shared, fleet, r)
            found["base_flops_share"] = float(self._flops(setting).share(gate))
            kept = setting.net.channels.kept(gate)
            state = self.begun(setting, state, State.begin(setting, self.cut(setting, state.shared, kept), kept=kept), kept)
        return state, found

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return under(state.shared, keys.WEIGHTS, keys.BUFFERS), {}, setting.net.cut(state.kept) if state.kept else None

    # ---- which channels stay

    def chosen(self, setting: Setting, shared: Tree, fleet: Fleet, r: int) -> Tensor:
        """(n,) bool."""
        if self.choice == "fl1":
            return self._by_features(setting, self._importance(setting, shared, fleet, r))
        groups, counts = setting.net.channels.groups, self.uniform(self._flops(setting))
        if self.choice == "random":
            scores = [rng.uniform(rng.key(setting.seed, "channels", i), group.size) for i, group in enumerate(groups)]
        else:
            scores = [shared[keys.weight(group.name)].abs().flatten(1).sum(1) for group in groups]
        return torch.cat([_largest(score.cpu(), count) for score, count in zip(scores, counts, strict=True)])

    def uniform(self, flops: FlopsConstraint) -> list[int]:
        """round(s C_l) >= 1 channels of every group, s the largest with r <= p."""
        steps = sorted({1.0, *((j + 0.5) / width + 1e-9 for width in flops.widths for j in range(width))})

        def widths(s: float) -> list[int]:
            return [min(width, max(1, round(s * width))) for width in flops.widths]

        def share(s: float) -> float:
            return float(
                flops.share(torch.cat([_largest(torch.arange(width), c) for width, c in zip(flops.widths, widths(s), strict=True)]))
            )

        fits = bisect_right(steps, self.flops_share + 1e-12, key=share)
        return widths(steps[fits - 1] if fits else 0.0)

    def _importance(self, setting: Setting, shared: Tree, fleet: Fleet, r: int) -> Tensor:
        """(n,) feature norms, their mean over all clients' training images, each the sum or the mean of its positions."""
        feed = Feed("train", epochs=1, batch=setting.train.batch, augment=False, cost="forward")
        clients = fleet.pick(None if setting.clients <= MAX_COHORT else setting.cohort, r)
        total = fleet.run(Energy((feed,), 2 if self.norm == "l2" else 1), clients, under(shared, keys.WEIGHTS, keys.BUFFERS)).total
        norms = (total[keys.ENERGY] * ENERGY_UNIT / total[COUNT]).cpu()
        if self.over == "sum":
            return norms
        positions = {layer.name: layer.positions for layer in setting.model_profile.layers}
        return norms / torch.cat([torch.full((group.size,), positions[group.name]) for group in setting.net.channels.groups])

    def _by_features(self, setting: Setting, importance: Tensor) -> Tensor:
        """What is left when the smallest go until the share fits; the best of a group stays, and its cost counts."""
        flops = self._flops(setting)
        best = torch.cat([_largest(part, 1) for part in importance.split(list(flops.widths))])
        order = importance.masked_fill(best, inf).argsort(stable=True)[: int((~best).sum())]
        gate = torch.ones(flops.n, dtype=torch.bool)
        for part in order.split(self.prune_size):
            if float(flops.share(gate)) <= self.flops_share * (1 if self.strict else SLACK):
                break
            gate[part] = False
        return gate

    def _flops(self, setting: Setting) -> FlopsConstraint:
        return FlopsConstraint.of(setting.net.channels, setting.model_profile, self.depthwise == "squared")


def _largest(score: Tensor, count: int) -> Tensor:
    """(C,) bool, the `count` largest, of equals the first."""
    return torch.zeros(len(score), dtype=torch.bool).index_fill(0, score.argsort(descending=True, stable=True)[:count], True)
