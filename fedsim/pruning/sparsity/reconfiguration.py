"""Masks that are chosen anew by squared gradients and the seconds that weights cost.

PruneFL: Jiang et al., IEEE TNNLS 2022, arXiv:1909.12326 (specification of the baselines, section 9).

Paper -> code:  z_j -> z,  t_j -> seconds,  c -> constant,  Gamma -> rate,  P -> must_keep,  q -> share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any, Self

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch, Feed
from fedsim.core.validation import read_where
from fedsim.costs.profile import VALUE_BYTES, ModelProfile
from fedsim.federated.client_work import TrainAndTap
from fedsim.federated.protocol import ClientInput, Report, Setting
from fedsim.nn.net import Net

SUM = "own/sum/"  # NAME -> sum over the batches of the round, of gradients or of their squares
KEPT = "own/squares/"  # LAYER -> z of a client since the last reconfiguration
KEPT_REST = "own/rest"  # (), the same of all parameters without a mask, summed
SINCE = "n/reconfigured"  # (), int64, the round of that reconfiguration
REST = "loss/rest"  # total: z of all parameters without a mask, summed
UNIT = 2.0**20  # of z on its way: its sums may be large, and only ratios of it matter
TRAFFIC = 8  # bytes of a weight in a round: 4 down and 4 up
STEP_FLOPS = 6  # of a weight at one position, for an image: forward, and backward twice
TIMES = ("seconds_per_weight", "flops_per_second", "bytes_per_second")
STAGE = ("initial_every", "initial_batch", "initial_batches", "start_accuracy", "settled_change", "settled")
PAPER = ("importance", "prunable", "half_life", "max_density", *TIMES, "constant_seconds", "initial_iterations", *STAGE)
LIBRARY = ("sharing", "stop_round", "adjust_fraction", "regrow")


def unread(method: Any) -> dict[str, str]:
    """The fields of PruneFL that its other fields leave without a use, as `Method.unread`."""
    found = {} if method.initial_iterations else dict.fromkeys(STAGE, "initial_iterations = 0 leaves this stage out")
    found |= read_where(method, "seconds_per_weight", (None,), *TIMES[1:])
    return found | read_where(method, "form", ("paper",), *PAPER) | read_where(method, "form", ("library",), *LIBRARY)


def kept(net: Net, shared: Tree) -> int:
    """Kept weights of all layers, dense ones included."""
    return sum((net.sizes | net.used(shared)).values())


# ---- the choice


def chosen(
    z: Tensor, seconds: Tensor, must_keep: Tensor, constant: float, rest: float = 0.0, most: int | None = None
) -> tuple[Tensor, float]:
    """(mask (N,), rate): the mask with the largest rate, (rest + sum of its z) / (constant + sum of its seconds).

    Candidates enter by falling z / seconds, as long as each is above the rate without it. That is the best of all subsets.

    Args:
        z: (N,) importance of every weight, at least 0.
        seconds: (N,) what each weight adds to a round, above 0.
        must_keep: (N,) bool, weights that stay; all others are candidates.
        constant: seconds of a round without any of these weights, above 0.
        rest: importance of all other parameters.
        most: weights that the mask may keep; those that must stay do so even if they are more.

    >>> chosen(torch.tensor([4.0, 9, 1, 2]), torch.tensor([1.0, 1, 1, 2]), torch.tensor([True, False, False, False]), constant=2)
    (tensor([ True,  True, False, False]), 3.25)
    """
    z, seconds = z.double(), seconds.double()
    candidates = (~must_keep).nonzero().flatten()
    order = candidates[masks.rank((z / seconds)[candidates])]
    nothing = torch.zeros(1, dtype=torch.float64, device=z.device)
    gain = rest + z[must_keep].sum() + torch.cat([nothing, z[order]]).cumsum(0)  # (candidates + 1,), after 0, 1 … of them
    spent = constant + seconds[must_keep].sum() + torch.cat([nothing, seconds[order]]).cumsum(0)
    rate = gain / spent
    enters = z[order] / seconds[order] > rate[:-1]
    count = len(order) if bool(enters.all()) else int((~enters).nonzero()[0])
    if most is not None:
        count = min(count, max(0, most - int(must_keep.sum())))
    mask = must_keep.clone()
    mask[order[:count]] = True
    return mask, float(rate[count])


def must_keep(shared: Tree, layers: Sequence[str], share: float) -> dict[str, Tensor]:
    """The kept weights of each layer without its floor(`share` · nnz) smallest."""
    found = {}
    for layer in layers:
        mask = shared[keys.mask(layer)]
        found[layer] = masks.without_smallest(shared[keys.weight(layer)], mask, floor(share * masks.count(mask) + 1e-9))
    return found


def seconds_per_weight(
    model_profile: ModelProfile, layers: Sequence[str], images: float, flops_per_second: float, bytes_per_second: float
) -> list[float]:
    """Seconds that one weight of each of the `layers` adds to a round in which a client trains on so many images, repetitions counted."""
    positions = {layer.name: layer.positions for layer in model_profile.layers}
    return [images * STEP_FLOPS * positions[layer] / flops_per_second + TRAFFIC / bytes_per_second for layer in layers]


# ---- what clients measure


@dataclass(frozen=True)
class TrainAndSquare(TrainAndTap):
    """Train, and the importance z of every weight of the layers in `dense_gradient_layers`, pruned ones included.

    z is n (sum of the batch gradients)^2, or with `each_batch` n · the mean of the squared batch gradients. total, if it `sends`: z in
    UNITs under grad/LAYER.weight, and of the parameters without a mask the sum, under REST.
    """

    each_batch: bool = False
    sends: bool = True
    since: int | None = None  # z is added up since this round, and kept by the client; None: z is of this round alone
    rest: bool = True  # whether parameters without a mask are measured
    extra_memory: int = 0

    @classmethod
    def measuring(cls, setting: Setting, r: int, layers: Sequence[str], feed: Feed | None = None, **own: Any) -> Self:
        """Round `r`, the dense gradients of `layers` measured at every batch. feed: other images than the job's local training has."""
        feed = replace(feed or setting.train.feed(), dense_gradient_layers=tuple(layers))
        sizes = {key: value.numel() for key, value in under(setting.net.initial, keys.WEIGHTS).items()}
        measured = sum(sizes[keys.weight(layer)] for layer in layers)
        values = sum(sizes.values()) if own.get("rest", True) else measured  # of the sums over batches
        values += measured + 1 if own.get("since") is not None else 0
        return cls.at(setting, r, None, feeds=(feed,), extra_memory=VALUE_BYTES * values, **own)

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        kept = super().init_kept(net, sent)
        if self.since is None:
            return kept
        w = next(iter(under(sent.shared, keys.WEIGHTS).values()))
        zeros = {KEPT + layer: torch.zeros_like(sent.shared[keys.weight(layer)]) for layer in self._layers()}
        return kept | zeros | {KEPT_REST: torch.zeros((), dtype=w.dtype, device=w.device), SINCE: self._since(sent)}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        state = super().init_state(net, sent)
        sums = {_sum(keys.weight(layer)): torch.zeros_like(sent.tree({})[keys.weight(layer)]) for layer in self._layers()}
        return state | sums | {_sum(key): torch.zeros_like(state[key]) for key in self._others(state)}

    def gradient(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree, Tree]:
        loss, gradient, buffers, taps = super().gradient(net, sent, state, batch)
        extra = self.aggregate.extra(sent, state) or {}  # no part of the loss whose gradient is measured
        others = {_sum(key): self._counted(gradient[key] - extra.get(key, 0.0)) for key in self._others(state)}
        return loss, gradient, buffers, {key: state[key] + value for key, value in (taps | others).items()}

    def tapped(self, sent: ClientInput, layer: str, g: Tensor) -> Tree:
        return {_sum(keys.weight(layer)): self._counted(g)}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        z = {KEPT + layer: self._importance(sent, state[_sum(keys.weight(layer))]) for layer in self._layers()}
        w = next(iter(under(state, keys.WEIGHTS).values()))
        z[KEPT_REST] = torch.zeros((), dtype=w.dtype, device=w.device)
        for key in self._others(state):
            z[KEPT_REST] = z[KEPT_REST] + self._importance(sent, state[_sum(key)]).sum()
        keep = report.keep
        if self.since is not None:
            valid = sent.kept[SINCE] == self.since  # else it is from before a reconfiguration that this client was not part of
            z = {key: value + torch.where(valid, sent.kept[key], 0.0) for key, value in z.items()}
            keep = keep | z | {SINCE: self._since(sent)}
        total = {keys.gradient(layer): z[KEPT + layer].double() / UNIT for layer in self._layers()} if self.sends else {}
        if self.sends and self.rest:
            total[REST] = z[KEPT_REST].double() / UNIT
        return replace(report, total=report.total | total, keep=keep)

    def _layers(self) -> tuple[str, ...]:
        return self.feeds[0].dense_gradient_layers

    def _others(self, state: Tree) -> list[str]:
        """Keys of the trained parameters that are not tapped."""
        tapped = {keys.weight(layer) for layer in self._layers()}
        return [key for key in under(state, keys.WEIGHTS) if key not in tapped] if self.rest else []

    def _counted(self, g: Tensor) -> Tensor:
        return g.square() if self.each_batch else g

    def _importance(self, sent: ClientInput, total: Tensor) -> Tensor:
        return sent.n * (total / sent.steps[0] if self.each_batch else total.square())

    def _since(self, sent: ClientInput) -> Tensor:
        return torch.full_like(sent.n, self.since or 0, dtype=torch.int64)


def _sum(key: str) -> str:
    return SUM + keys.name_of(key)
