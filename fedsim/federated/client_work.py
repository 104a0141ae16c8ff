"""Works that methods share. Each is written for one client, as pure tensor arithmetic: no branch on a tensor's value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.core import keys, masks
from fedsim.core.keys import CORRECT, GATE, GATE_VALUES
from fedsim.core.tree import Tree, under, weigh
from fedsim.core.types import Batch, Feed, LocalOptimizer
from fedsim.costs.profile import VALUE_BYTES
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.protocol import ClientInput, Report, Setting, Work
from fedsim.nn import optim
from fedsim.nn.loss import cross_entropy

if TYPE_CHECKING:
    from fedsim.nn.net import Net


def _real(batch: Batch) -> Tensor:
    """(B,) 1 for every real image."""
    return torch.ones_like(batch.y, dtype=batch.x.dtype) if batch.real is None else batch.real


def _nothing(sent: ClientInput) -> Tensor:
    """(), a sum that begins."""
    return torch.zeros((), dtype=torch.float64, device=sent.n.device)


@dataclass(frozen=True)
class Train(Work):
    """Local SGD (or Adam) from the broadcast with a fresh optimiser; total: n · w, n · running statistics, n.

    Frozen weights (`requires_grad = False`) stay as they were sent and are not sent back.

    >>> work = Train((Feed("train", epochs=2, batch=16),), lr=0.1, momentum=0.9)
    >>> work.feeds[0].batch, work.aggregate, work.purpose
    (16, FedAvg(), 'Train')
    """

    feeds: tuple[Feed, ...]
    lr: float  # eta
    momentum: float = 0.0
    decay: float = 0.0  # weight decay
    aggregate: Any = field(default_factory=FedAvg)
    optimiser: str = "sgd"

    @classmethod
    def at(cls, setting: Setting, r: int, rate: LocalOptimizer | None = None, **own: Any) -> Self:
        """The job's local training in round `r` (from 1), as a work of this class.

        rate: the local optimiser's numbers, where a method has a schedule of its own; own: fields of a subclass, or others than the
        job's, by name.
        """
        rate = rate or setting.train.at(r)
        job: dict[str, Any] = {"feeds": (setting.train.feed(),), "lr": rate.lr, "momentum": rate.momentum, "decay": rate.decay}
        return cls(**(job | {"aggregate": setting.aggregate.at(rate), "optimiser": rate.optimiser} | own))

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return self.aggregate.init_kept(net, sent)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        held = sent.tree({})
        w = net.trained(net.effective(held))
        return w | under(held, keys.BUFFERS) | optim.fresh(w, self.momentum, self.optimiser)

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        loss, gradient, buffers, taps = self.gradient(net, sent, state, batch)
        return self.descend(net, sent, state | buffers | taps, gradient), loss

    def gradient(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree, Tree]:
        """What net.gradient gives, the aggregation's part added."""
        return net.gradient(sent.tree(state), batch, extra=self.aggregate.extra(sent, state))

    def descend(self, net: Net, sent: ClientInput, state: Tree, gradient: Tree, lr: float | Tensor | None = None) -> Tree:
        """One optimiser step, then the aggregation's correction. It overwrites `state`.

        lr: overrides the round's rate for the optimiser only. The correction (SCAFFOLD) always uses the round's rate, so that the server
        can undo it exactly.
        """
        state = net.descend(state, gradient, self.lr if lr is None else lr, self.momentum, self.decay, self.optimiser)
        return self.aggregate.moved(sent, state, self.lr)

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return self.aggregate.report(sent, state)


@dataclass(frozen=True)
class TrainAndTap(Train):
    """Train, and what a subclass makes of dense gradients in the feed that has `dense_gradient_layers`, all positions included.

    A feed after the first only probes, at the trained weights. A layer's gradient is handed to `tapped` as soon as it exists, then freed.
    """

    @classmethod
    def tapping(cls, setting: Setting, r: int, layers: Sequence[str], last_step: bool = False, **own: Any) -> Self:
        """Round `r`, plain training where there are no `layers`, probed on one more mini-batch at the trained weights.

        last_step: probed on the last mini-batch of the training instead, before its step. own: fields of a subclass, by name.
        """
        train, layers = setting.train.feed(), tuple(layers)
        feeds: tuple[Feed, ...] = (train,)
        if layers:
            probe = replace(train, epochs=0, steps=1, dense_gradient_layers=layers)
            feeds = (replace(train, dense_gradient_layers=layers, dense_gradient_steps=1),) if last_step else (train, probe)
        return cls.at(setting, r, feeds=feeds, **own)

    @abstractmethod
    def tapped(self, sent: ClientInput, layer: str, g: Tensor) -> Tree:
        """What the state gets of `g`, the dense gradient of a layer's weight."""

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        if batch.feed == 0:
            return super().step(net, sent, state, batch)
        layers = self.feeds[batch.feed].dense_gradient_layers
        loss, _, _, taps = net.gradient(sent.tree(state), batch, None, tap=partial(self.tapped, sent), layers=layers)
        return state | taps, loss

    def gradient(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree, Tree]:
        layers, extra = self.feeds[batch.feed].dense_gradient_layers, self.aggregate.extra(sent, state)
        return net.gradient(sent.tree(state), batch, extra=extra, tap=partial(self.tapped, sent) if layers else None, layers=layers)


@dataclass(frozen=True)
class TrainAndScore(TrainAndTap):
    """Train, and the largest dense gradients among the pruned positions of some layers.

    each: top/index/LAYER and top/value/LAYER (a,), and n/images (). A layer's gradient goes through a buffer of exactly a entries.
    """

    purpose: ClassVar[str] = "TrainAndProbe"

    moves: Mapping[str, int] = field(default_factory=dict)  # a_t^l of the layers in `dense_gradient_layers`

    @classmethod
    def growing(cls, setting: Setting, r: int, moves: Mapping[str, int], last_step: bool = False, **own: Any) -> Self:
        """`tapping` of the layers that move any weights."""
        moves = {layer: k for layer, k in moves.items() if k}
        return cls.tapping(setting, r, tuple(moves), last_step, moves=moves, **own)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        """Before any gradient is seen, one pruned weight is as good as another."""
        weights, seen = under(sent.tree({}), keys.WEIGHTS), super().init_state(net, sent)
        for layer, k in self.moves.items():
            if not 0 < k <= net.sizes.get(layer, 0):
                raise ValueError(f"{k} moves of layer {layer!r}; there can be 1 to its pruned weights, of layers {', '.join(net.maskable)}")
            seen |= self.tapped(sent, layer, torch.ones_like(weights[keys.weight(layer)]))
        return seen

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        return replace(report, each=report.each | under(state, keys.TOP) | {keys.COUNT: sent.n})

    def tapped(self, sent: ClientInput, layer: str, g: Tensor) -> Tree:
        index, value = masks.largest(g, sent.tree({})[keys.mask(layer)], self.moves[layer])
        return {keys.top_index(layer): index, keys.top_value(layer): value}


@dataclass(frozen=True)
class TrainAndGradient(TrainAndTap):
    """Train, and the whole dense gradient of one batch; total: also n · g of these layers, under grad/LAYER.weight.

    A client holds the gradients of all these layers until it sends them: those beside the largest layer's are its `extra_memory`.
    """

    extra_memory: int = 0  # bytes

    @classmethod
    def tapping(cls, setting: Setting, r: int, layers: Sequence[str], last_step: bool = False, **own: Any) -> Self:
        sizes = [setting.net.sizes[layer] for layer in layers]
        beside = VALUE_BYTES * (sum(sizes) - max(sizes, default=0))
        return super().tapping(setting, r, layers, last_step, **({"extra_memory": beside} | own))

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        held, layers = sent.tree({}), {layer for feed in self.feeds for layer in feed.dense_gradient_layers}
        nothing = {keys.gradient(layer): torch.zeros_like(held[keys.weight(layer)]) for layer in sorted(layers)}
        return super().init_state(net, sent) | nothing

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        return replace(report, total=report.total | weigh(sent.n, under(state, keys.GRADIENTS)))

    def tapped(self, sent: ClientInput, layer: str, g: Tensor) -> Tree:
        return {keys.gradient(layer): g}


@dataclass(frozen=True)
class Statistics(Work):
    """Running statistics of norms moved by forward passes in training mode; total: images · statistics, and images seen."""

    feeds: tuple[Feed, ...]
    momentum: float | None = None  # of the running statistics; None: each norm's own
    extra_memory: int = 0

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return under(sent.tree({}), keys.BUFFERS) | {keys.COUNT: _nothing(sent)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        logits, buffers = net(sent.tree(state), batch.x, True, batch.real, self.momentum, batch)
        seen = state[keys.COUNT] + _real(batch).sum().double()
        return state | buffers | {keys.COUNT: seen}, cross_entropy(logits, batch.y, batch.real)

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        seen = state[keys.COUNT]
        return Report(weigh(seen, under(state, keys.BUFFERS)) | {keys.COUNT: seen})


@dataclass(frozen=True)
class Loss(Work):
    """Cross-entropy in evaluation mode; total: its sum over the images seen, how many are classified rightly, and their number."""

    feeds: tuple[Feed, ...]
    extra_memory: int = 0
    method: Any = None  # for model_of, where the client does not use what it is sent as it is

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {keys.LOSS_SUM: _nothing(sent), CORRECT: _nothing(sent), keys.COUNT: _nothing(sent)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        held = sent.tree(state) if self.method is None else self.method.model_of(net, sent)
        logits, _ = net(held, batch.x, False, batch.real)
        mean, seen = cross_entropy(logits, batch.y, batch.real), _real(batch).sum().double()
        right = ((logits.argmax(-1) == batch.y) * _real(batch)).sum().double()
        found = {keys.LOSS_SUM: mean * seen, CORRECT: right, keys.COUNT: seen}
        return {key: state[key] + value for key, value in found.items()}, mean

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(state)


def _with_images(state: Tree, found: Tree) -> tuple[Tree, Tensor]:
    """The sums of `state` with these images (B,) added, and their mean loss."""
    sums = {key: state[key] + value.sum().double() for key, value in found.items()}
    return sums, found[keys.LOSS_SUM].sum() / found[keys.COUNT].sum()


@dataclass(frozen=True)
class Evaluate(Work):
    """A method's deployed model on test images; total and each: correct, loss (summed) and images."""

    feeds: tuple[Feed, ...]
    method: Any  # for model_of

    @classmethod
    def of(cls, method: Any, batch: int = 256, split: str = "test") -> Evaluate:
        """On a client's own test images, or with split = "global" each client on the whole global test set."""
        return cls((Feed(split, epochs=1, batch=batch, augment=False, cost="forward"),), method)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {CORRECT: _nothing(sent), keys.COUNT: _nothing(sent), keys.LOSS_SUM: _nothing(sent)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        return _with_images(state, self._of_images(net, sent, batch))

    def _of_images(self, net: Net, sent: ClientInput, batch: Batch) -> Tree:
        """(B,) of every image whether it is classified correctly, 1 as its number, and its loss; 0 where it is not real."""
        logits, _ = net(self.method.model_of(net, sent), batch.x, False, batch.real)
        real = _real(batch)
        losses = F.cross_entropy(logits, batch.y, reduction="none") * real
        return {CORRECT: (logits.argmax(-1) == batch.y) * real, keys.COUNT: real, keys.LOSS_SUM: losses}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(total=state, each=state)


@dataclass(frozen=True)
class EvaluateImages(Evaluate):
    """Evaluate; each: also what every single image came to, in the order of the client's images, 0 beyond its last."""

    places: int = 0  # of the longest client, rounded up to whole batches

    @classmethod
    def up_to(cls, images: int, method: Any, batch: int) -> EvaluateImages:
        """For clients with at most so many images."""
        whole = Evaluate.of(method, batch)
        return cls(whole.feeds, method, places=-(-images // batch) * batch)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        empty = torch.zeros(self.places, dtype=torch.float64, device=sent.n.device)
        return super().init_state(net, sent) | {keys.CORRECT_IMAGES: empty, keys.LOSS_IMAGES: empty.clone()}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        found = self._of_images(net, sent, batch)
        added, loss = _with_images(state, found)
        places = batch.t * self.feeds[0].batch + torch.arange(len(batch.y), device=batch.y.device)
        for one, of_images in ((CORRECT, keys.CORRECT_IMAGES), (keys.LOSS_SUM, keys.LOSS_IMAGES)):
            added[of_images] = state[of_images].index_copy(0, places, found[one].double())
        return added, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        total = {key: state[key] for key in super().init_state(net, sent)}
        return Report(total=total, each={key: state[key] for key in (keys.CORRECT_IMAGES, keys.LOSS_IMAGES)})


@dataclass(frozen=True)
class OwnGates(Evaluate):
    """Collects, without reading an image, each client's own hard gate and folded gate values (each: GATE, GATE_VALUES).

    Clients without gates of their own return nothing.
    """

    @classmethod
    def used(cls, method: Any) -> OwnGates:
        return cls((), method)

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        held = self.method.model_of(net, sent)
        mine = GATE in held and held[GATE].dtype == torch.bool and GATE not in sent.shared
        return Report({}, {key: held[key] for key in (GATE, GATE_VALUES) if key in held} if mine else {})
