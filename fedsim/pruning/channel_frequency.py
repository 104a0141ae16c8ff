"""Works of clients that have more than the broadcast: tensors that stay with them, and the channels that their own images use (ADP, 3.4).

What a client measures it keeps under "own/…": "own/frequency" (n,) the share of its training images for which a channel's gate is open,
"own/gate" (n,) the gate's mean over them, "own/values" (n,) its mean once the unused channels are gone, and "own/w/…", "own/buf/…"
the model that it has trained for its own use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import ACTIVE_CONVS, FOLDED_GATE, FREQUENCY, GATE, GATE_VALUES, MEAN_GATE, VARYING_CHANNELS
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch, Feed
from fedsim.federated import aggregation, personal_model
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Report, Setting
from fedsim.pruning import dynamic_channels
from fedsim.pruning.dynamic_channels import Costs

if TYPE_CHECKING:
    from fedsim.nn.net import Net


@dataclass(frozen=True)
class TrainLocal(Train):
    """Train; tensors whose keys begin with one of `local` are not sent but stay with the client, which goes on from them."""

    local: tuple[str, ...] = ()  # "w/gates.", "buf/norm1.running_mean" …

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return super().init_kept(net, sent) | under(net.initial, *self.local)

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        mine = under(state, *self.local)
        report = super().finish(net, sent, {key: value for key, value in state.items() if key not in mine})
        return replace(report, keep=report.keep | mine)


@dataclass(frozen=True)
class MeasureChannelFrequency(TrainLocal):
    """How often a client's own training images, not augmented, open every channel; keep: the frequencies and mean gates.

    With `personal` it first trains the model for its own use, and keeps that too. total: ACTIVE_CONVS, VARYING_CHANNELS and images;
    with `shared` the frequencies and mean gates as well, under "loss/", each client's alike.
    """

    purpose: ClassVar[str] = "Frequency"

    personal: bool = False
    folded: bool = False  # the gates' means are taken once more, under the client's own mask
    counts: tuple[int, ...] = ()  # channels of every layer that such a mask keeps
    shared: bool = False
    costs: Costs | None = None
    deployment_only: bool = True

    @classmethod
    def after(cls, setting: Setting, r: int, personalise: int, folded: bool, **own: Any) -> MeasureChannelFrequency:
        """`personalise` more epochs of round `r`'s local training, then the client's images once; with `folded` twice."""
        train = setting.train.feed()
        look = Feed("train", epochs=1, batch=train.batch, augment=False, cost="forward")
        trains = (personal_model.feed(setting, personalise),) if personalise else ()
        feeds = (*trains, look, *([look] if folded else []))
        return cls.at(setting, r, feeds=feeds, aggregate=aggregation.FedAvg(), personal=bool(personalise), folded=folded, **own)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        zeros = torch.zeros(net.channels.n, dtype=torch.float64, device=sent.n.device)
        found = {FREQUENCY: zeros, MEAN_GATE: zeros, ACTIVE_CONVS: zeros.sum()}
        return found | ({FOLDED_GATE: zeros} if self.folded else {}) | (super().init_state(net, sent) if self.personal else {})

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        if self.personal and batch.feed == 0:
            return super().step(net, sent, state, batch)
        if batch.feed > self.personal:
            return self._mean_under_mask(net, sent, state, batch)
        g = net.saliency(sent.tree(state), batch.x)  # (B, n)
        active, real = g > 0, _real(g, batch).double()
        assert self.costs is not None
        found = {
            FREQUENCY: state[FREQUENCY] + (active.double() * real[:, None]).sum(0),
            MEAN_GATE: state[MEAN_GATE] + (g.double() * real[:, None]).sum(0),
            ACTIVE_CONVS: state[ACTIVE_CONVS] + (self.costs.convs(active) * real).sum() / self.costs.dense["convs"],
        }
        return state | found, real.sum() * 0

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        mine, n = {key: state[key] / sent.n for key in (FREQUENCY, MEAN_GATE, FOLDED_GATE) if key in state}, sent.n.double()
        sometimes = (state[FREQUENCY] > 0) & (state[FREQUENCY] < n)
        total = {ACTIVE_CONVS: state[ACTIVE_CONVS], keys.COUNT: n, VARYING_CHANNELS: n * sometimes.double().mean()}
        if self.shared:
            total |= {keys.FREQUENCY_SUM: mine[FREQUENCY], keys.GATE_SUM: mine[MEAN_GATE]}
        return Report(total, keep={key: value.float() for key, value in mine.items()} | personal_model.kept(state))

    def mask(self, net: Net, sent: ClientInput, state: Tree) -> Tensor:
        """(n,) bool, the channels that the client will keep."""
        f, mean = ((state[key] / sent.n).float() for key in (FREQUENCY, MEAN_GATE))
        return dynamic_channels.kept(f, mean, net.channels.widths, self.counts)

    def _mean_under_mask(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        g = net.saliency(sent.tree(state) | {GATE: self.mask(net, sent, state)}, batch.x)
        real = _real(g, batch)
        return state | {FOLDED_GATE: state[FOLDED_GATE] + (g * real[:, None]).double().sum(0)}, real.sum() * 0


def _real(g: Tensor, batch: Batch) -> Tensor:
    """(B,) 1 for every real image."""
    return torch.ones_like(g[:, 0]) if batch.real is None else batch.real


def model_of(net: Net, sent: ClientInput, counts: Sequence[int], folded: bool) -> Tree:
    """The network of a client that has measured: its own weights where it has some, under the mask of its own channels."""
    held = sent.tree({})
    mask = dynamic_channels.kept(held[FREQUENCY], held[MEAN_GATE], net.channels.widths, counts)
    return held | personal_model.personal(held) | {GATE: mask} | ({GATE_VALUES: held[FOLDED_GATE]} if folded else {})
