"""Works that methods share. Each is written for one client, as pure tensor arithmetic: no branch on a tensor's value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim import aggregate
from fedsim.core import Batch, Feed, Report, Sent, Setting, Work
from fedsim.net import cross_entropy
from fedsim.tree import Tree, renamed, under, weigh, zeros

if TYPE_CHECKING:
    from fedsim.net import Net


def _real(batch: Batch) -> Tensor:
    """(B,) 1 for every real image."""
    return torch.ones_like(batch.y, dtype=batch.x.dtype) if batch.real is None else batch.real


def _nothing(sent: Sent) -> Tensor:
    """(), a sum that begins."""
    return torch.zeros((), dtype=torch.float64, device=sent.n.device)


@dataclass(frozen=True)
class Train(Work):
    """Local SGD from the broadcast with a fresh optimiser; total: n · w, n · running statistics, n."""

    feeds: tuple[Feed, ...]
    lr: float  # eta
    momentum: float = 0.0
    decay: float = 0.0  # weight decay
    aggregate: Any = field(default_factory=aggregate.FedAvg)

    @classmethod
    def at(cls, setting: Setting, r: int) -> Train:
        """The job's local training in round `r`."""
        rate = setting.train.at(r)
        return cls((setting.train.feed(),), rate.lr, rate.momentum, rate.decay, setting.aggregate)

    def fresh(self, net: Net, sent: Sent) -> Tree:
        return self.aggregate.fresh(net, sent)

    def start(self, net: Net, sent: Sent) -> Tree:
        held = sent.tree({})
        w = net.effective(held)
        momentum = renamed(zeros(w), "w/", "opt/momentum/") if self.momentum else {}
        return w | under(held, "buf/") | momentum

    def step(self, net: Net, sent: Sent, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        loss, gradient, buffers, _ = net.gradient(sent.tree(state), batch, extra=self.aggregate.extra(sent, state))
        return net.descend(state | buffers, gradient, self.lr, self.momentum, self.decay), loss

    def finish(self, net: Net, sent: Sent, state: Tree) -> Report:
        return self.aggregate.report(sent, state)


@dataclass(frozen=True)
class Statistics(Work):
    """Running statistics of norms moved by forward passes in training mode; total: images · statistics, and images seen."""

    feeds: tuple[Feed, ...]

    def start(self, net: Net, sent: Sent) -> Tree:
        return under(sent.tree({}), "buf/") | {aggregate.COUNT: _nothing(sent)}

    def step(self, net: Net, sent: Sent, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        logits, buffers = net(sent.tree(state), batch.x, True, batch.real)
        seen = state[aggregate.COUNT] + _real(batch).sum().double()
        return state | buffers | {aggregate.COUNT: seen}, cross_entropy(logits, batch.y, batch.real)

    def finish(self, net: Net, sent: Sent, state: Tree) -> Report:
        seen = state[aggregate.COUNT]
        return Report(weigh(seen, under(state, "buf/")) | {aggregate.COUNT: seen})


@dataclass(frozen=True)
class Loss(Work):
    """Cross-entropy in evaluation mode; total: its sum over the images seen, and their number."""

    feeds: tuple[Feed, ...]

    def start(self, net: Net, sent: Sent) -> Tree:
        return {"loss/sum": _nothing(sent), aggregate.COUNT: _nothing(sent)}

    def step(self, net: Net, sent: Sent, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        logits, _ = net(sent.tree(state), batch.x, False, batch.real)
        mean, seen = cross_entropy(logits, batch.y, batch.real), _real(batch).sum().double()
        found = {"loss/sum": mean * seen, aggregate.COUNT: seen}
        return {key: state[key] + value for key, value in found.items()}, mean

    def finish(self, net: Net, sent: Sent, state: Tree) -> Report:
        return Report(state)


@dataclass(frozen=True)
class Evaluate(Work):
    """A method's deployed model on test images; total and each: correct, loss (summed) and images."""

    feeds: tuple[Feed, ...]
    method: Any  # for model_of

    @classmethod
    def of(cls, method: Any, batch: int = 256) -> Evaluate:
        return cls((Feed("test", epochs=1, batch=batch, augment=False, charge="forward"),), method)

    def start(self, net: Net, sent: Sent) -> Tree:
        return {"n/correct": _nothing(sent), "n/images": _nothing(sent), "loss/sum": _nothing(sent)}

    def step(self, net: Net, sent: Sent, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        logits, _ = net(self.method.model_of(net, sent), batch.x, False, batch.real)
        real = _real(batch)
        losses = F.cross_entropy(logits, batch.y, reduction="none") * real
        correct = (logits.argmax(-1) == batch.y) * real
        found = {"n/correct": correct, "n/images": real, "loss/sum": losses}
        return {key: state[key] + value.sum().double() for key, value in found.items()}, losses.sum() / real.sum()

    def finish(self, net: Net, sent: Sent, state: Tree) -> Report:
        return Report(total=state, each=state)
