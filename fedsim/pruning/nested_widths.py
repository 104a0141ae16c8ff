"""Nested widths: every client trains the first channels of a network, as many as its rate allows (HeteroFL, Diao et al., ICLR 2021).

What clients do, and how the server averages weights that not all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedsim.core import keys, tree
from fedsim.core.keys import COUNT, COVER, GATE, OWNED_CLASSES, WIDTH_RATE
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch
from fedsim.federated.client_work import Evaluate, Statistics, Train
from fedsim.federated.protocol import ClientInput, Report
from fedsim.nn.loss import LossFunction, cross_entropy

if TYPE_CHECKING:
    from fedsim.nn.net import Net


def nested(widths: Sequence[int], rates: Tensor) -> Tensor:
    """(…, n) bool hard gates of rates (…,): of each group the first ceil(r W) channels are open, at least 1."""
    counts = [torch.ceil(rates.unsqueeze(-1) * width - 1e-9).clamp(min=1) for width in widths]
    return torch.cat([torch.arange(width, device=rates.device) < count for width, count in zip(widths, counts, strict=True)], -1)


def mean_over_owners(total: Tree, like: Tree) -> Tree:
    """Every entry of `like` as the mean over the clients that have it; an entry that no client has keeps its value."""
    found = {}
    for key, old in like.items():
        owners = total[COVER + key]
        mean = total[key] / owners.clamp(min=1)
        found[key] = torch.where(owners > 0, mean if old.dtype.is_floating_point else mean.round(), old.double()).to(old.dtype)
    return found


def scaled(net: Net, tree: Tree, rate: Tensor) -> Tree:
    """The weights and biases that make cut channels, of those in the tree, divided by the rate: so are these layers' outputs."""
    layers = [group.name for group in net.channels.groups]
    made = [key for layer in layers for key in (keys.weight(layer), f"{keys.WEIGHTS}{layer}.bias") if key in tree]
    return {key: tree[key] / rate.to(tree[key].dtype) for key in made}


def with_classes(tree: Tree, classifier: str, owned: Tensor) -> Tree:
    """The classifier's weight and bias in the tree, their rows 0 for classes that are not owned (classes,)."""
    rows = {key: tree[key] for key in (keys.weight(classifier), f"{keys.WEIGHTS}{classifier}.bias") if key in tree}
    return {key: value * owned.view(-1, *[1] * (value.dim() - 1)) for key, value in rows.items()}


@dataclass(frozen=True)
class TrainNested(Train):
    """Train of the first channels; total: sums of the weights over their owners, and of the owners, under COVER."""

    compact: ClassVar[bool] = True
    uniform: bool = True  # clients count alike; false: by their number of images
    scaler: bool = True
    static_norm: bool = True
    classifier: str = ""  # the last layer, if the loss is masked

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        buffers = under(net.initial, keys.BUFFERS) if self.static_norm else {}
        return buffers | super().init_state(net, sent) | {GATE: nested(net.channels.widths, sent.own[WIDTH_RATE])}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        rate = sent.own[WIDTH_RATE].to(batch.x.dtype)
        divided = scaled(net, state, rate) if self.scaler else {}
        extra = self.aggregate.extra(sent, state)
        if extra:
            extra = extra | {key: extra[key] * rate for key in divided}  # the gradient is divided below
        loss, gradient, buffers, _ = net.gradient(sent.tree(state | divided), batch, loss=self._loss(sent), extra=extra, compact=True)
        for key in divided:
            gradient[key] = gradient[key] / rate
        return self.descend(net, sent, state | buffers, gradient), loss

    def _loss(self, sent: ClientInput) -> LossFunction:
        """Cross-entropy; the logits of classes that the client has no images of are 0."""
        if not self.classifier:
            return cross_entropy
        return lambda logits, y, real: cross_entropy(torch.where(sent.own[OWNED_CLASSES], logits, 0.0), y, real)

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        weight = torch.ones_like(sent.n) if self.uniform else sent.n
        held = under(state, keys.WEIGHTS) if self.static_norm else under(state, keys.WEIGHTS, keys.BUFFERS)
        cover = net.channels.cover(held, state[GATE])
        cover |= with_classes(cover, self.classifier, sent.own[OWNED_CLASSES]) if self.classifier else {}
        sums = {key: torch.where(entries, held[key].double() * weight, 0.0) for key, entries in cover.items()}
        owners = {COVER + key: entries.double() * weight for key, entries in cover.items()}
        return Report(sums | owners | {COUNT: sent.n.double()})


@dataclass(frozen=True)
class FindClasses(Evaluate):
    """The classes of a client's training images. The paper takes them as known, so they are on no bill; each: OWNED_CLASSES."""

    classes: int = 0

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {OWNED_CLASSES: torch.zeros(self.classes, dtype=torch.bool, device=sent.n.device)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        seen = batch.y.unsqueeze(-1) == torch.arange(self.classes, device=batch.y.device)
        seen = seen if batch.real is None else seen & (batch.real > 0).unsqueeze(-1)
        return {OWNED_CLASSES: state[OWNED_CLASSES] | seen.any(0)}, batch.x.sum() * 0

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({}, each=state)


@dataclass(frozen=True)
class GatherStatistics(Statistics):
    """The statistics of each batch, summed by images: those of batches alone, whatever the running ones are."""

    momentum: float | None = 1.0
    deployment_only: bool = True

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return tree.each(torch.Tensor.double, tree.zeros(super().init_state(net, sent)))

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        found, loss = super().step(net, sent, {COUNT: state[COUNT]}, batch)
        found, images = under(sent.tree({}), keys.BUFFERS) | found, found[COUNT] - state[COUNT]
        return {key: found[COUNT] if key == COUNT else value + images * found[key] for key, value in state.items()}, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(state)
