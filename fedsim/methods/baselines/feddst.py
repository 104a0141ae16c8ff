"""FedDST: Bibikar et al., "Federated Dynamic Sparse Training", AAAI 2022, arXiv:2112.09824. Clients move masks, the server merges them.

All clients train one sparse model. In some rounds each client drops its smallest weights and grows the pruned positions of largest
gradient, for itself, and uploads its weights and its mask. The server averages every weight over the clients that hold it, and keeps the
largest averages, as many of each layer as before. A grown weight starts at 0. Where clients adjust after the last epoch, it is still 0
when it is uploaded, so it can only take the place of a weight that every client dropped; of equal magnitudes the lower position goes first.

Paper -> code:  w -> w,  m -> mask,  S -> 1 - density,  alpha -> adjust_fraction,  alpha_r -> moves / nnz_l,  R_adj -> adjust_every,
                R_end -> stop_round,  n_k -> images,  A -> adjust_epoch,  K -> cohort.size,  E -> train.epochs,  B -> train.batch

The paper averages over the clients that hold a weight and adjusts after the last local epoch. The form of the FedPruning library is
average = "zeros" and adjust_epoch = 0. `fedsim estimate`, which trains nobody, moves no mask: it leaves out what the changes of masks cost,
up in a round that adjusts and down in the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Literal

from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.tree import Tree, renamed, under, weigh
from fedsim.core.types import Batch, Data, Feed
from fedsim.core.validation import within
from fedsim.costs.profile import VALUE_BYTES
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, averaged_round, trained
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Report, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging


@dataclass(frozen=True)
class TrainAndAdjust(Train):
    """Train, and where a feed has `dense_gradient_layers` the client exchanges weights of its own masks by that batch's gradient.

    total: also the number of clients that keep each weight of these layers (mask/LAYER.weight) and the sum of their images (vote/…).
    """

    moves: Mapping[str, int] = field(default_factory=dict)  # layer -> weights that leave, and as many that enter
    regrow: bool = True
    extra_memory: int = 0

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        held = sent.tree({})
        return super().init_state(net, sent) | {keys.mask(layer): held[keys.mask(layer)] for layer in self.moves}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        layers = self.feeds[batch.feed].dense_gradient_layers
        if not layers:
            return super().step(net, sent, state, batch)
        loss, _, _, adjusted = net.gradient(sent.tree(state), batch, None, tap=partial(self.adjusted, state), layers=layers)
        return state | adjusted, loss

    def adjusted(self, state: Tree, layer: str, g: Tensor) -> Tree:
        """The layer's new mask; its weights, and what the optimiser remembers of them, are 0 where one has left or entered."""
        mask, k = state[keys.mask(layer)], self.moves[layer]
        dropped = masks.smallest(state[keys.weight(layer)], mask, k)
        stay = mask.flatten().scatter(0, dropped, False).view(mask.shape)
        grown, _ = masks.largest(g, stay if self.regrow else mask, k)
        after = stay.flatten().scatter(0, grown.long(), True).view(mask.shape)
        held = {keys.mask(layer): stay}
        mine = {key: value for key, value in under(state, keys.WEIGHTS, keys.OPTIMISER).items() if keys.mask_of(key) in held}
        return masks.apply(mine, held) | {keys.mask(layer): after}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report, own = super().finish(net, sent, state), weigh(1, under(state, keys.MASKS))
        return replace(report, total=report.total | own | renamed(weigh(sent.n, own), keys.MASKS, keys.VOTES))


@dataclass(frozen=True)
class FedDST(MaskedAveraging):
    """Clients adjust their masks; the server averages over those that hold a weight, and prunes back to each layer's number of weights."""

    density: float = 0.2  # d, kept share of all conv and linear weights, dense layers included
    adjust_every: int = 15  # R_adj, rounds from one adjustment to the next; the first is in round 2
    stop_round: int | None = None  # R_end, the last round that may adjust; None: half of the rounds; 0: never
    adjust_fraction: float = 0.01  # alpha; alpha_r = alpha / 2 (1 + cos(pi r / R_end)) of a layer's kept weights move
    adjust_epoch: int | None = None  # A, local epochs before a client adjusts; None: all of them; 0: it adjusts, then trains
    average: Literal["cover", "zeros"] = "cover"  # of a weight over the clients that hold it, or over all with 0 where it is pruned
    min_votes: int = 1  # clients; weights that fewer of them hold are kept only where a layer has too few others
    regrow: bool = True  # whether a weight that a client has just dropped may grow again, from 0 (RigL); false: only those pruned before

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, adjust_fraction=(0, 1), adjust_every=(1, inf), stop_round=(0, inf), adjust_epoch=(0, inf), min_votes=(1, inf))

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        self._check(setting)
        return super().init(setting, public)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        moves = self.moves(setting, state.shared, r)
        if not moves:
            after, columns = averaged_round(setting, fleet, state, r)
            return after, columns | ({"weights_swapped": 0.0} if r else {})
        feeds = self.feeds(setting.train.feed(), tuple(moves))
        buffers = 2 * VALUE_BYTES * sum(moves.values())  # positions that leave and that enter
        work = TrainAndAdjust.at(setting, r, feeds=feeds, moves=moves, regrow=self.regrow, extra_memory=buffers)
        after, reply = trained(setting, fleet, state, r, work)
        merged = self.merged(after.shared, reply.total)
        held = under(reply.total, keys.MASKS)
        entered = sum(masks.count(merged[key] & ~state.shared[key]) for key in held)
        agreed, any_holds = (sum(int((count >= least).sum()) for count in held.values()) for least in (setting.cohort, 1))
        return replace(after, shared=merged), {"lr": work.lr, "weights_swapped": entered, "mask_agreement": agreed / any_holds}

    def moves(self, setting: Setting, shared: Tree, r: int) -> dict[str, int]:
        """How many weights of each layer a client exchanges in round `r`: none, but in rounds 2, 2 + R_adj … up to R_end."""
        stop = setting.rounds // 2 if self.stop_round is None else self.stop_round
        if r < 2 or r > stop or (r - 2) % self.adjust_every:
            return {}
        layers = mask_adjustment.trainable(setting.net, self.layers(setting.net))
        return mask_adjustment.moving(shared, layers, self.adjust_fraction / 2, r, stop)

    def feeds(self, train: Feed, layers: tuple[str, ...]) -> tuple[Feed, ...]:
        """The local training `train`, interrupted after A epochs by one more mini-batch, whose dense gradient says what grows."""
        probe = replace(train, epochs=0, steps=1, dense_gradient_layers=layers)
        if self.adjust_epoch is None or self.adjust_epoch == train.epochs > 0:
            return train, probe
        if self.adjust_epoch == 0:
            return probe, train
        return replace(train, epochs=self.adjust_epoch), probe, replace(train, epochs=train.epochs - self.adjust_epoch)

    def merged(self, shared: Tree, total: Tree) -> Tree:
        """`shared`, the average over all clients, after its adjusted layers are averaged and pruned to as many weights as they had."""
        changed: Tree = {}
        for key, holders in under(total, keys.MASKS).items():
            weight, images = keys.weight_of(key), total[keys.VOTES + keys.name_of(key)]
            w = shared[weight]
            if self.average == "cover":
                w = (total[weight] / images.clamp(min=1)).to(w.dtype)
            changed[key] = best_held(w, holders, masks.count(shared[key]), self.min_votes)
            changed[weight] = w * changed[key]
        return shared | changed

    def _check(self, setting: Setting) -> None:
        """BadInput for an aggregation that needs one mask for all, an epoch that no client reaches, and votes that nothing can have."""
        if not setting.aggregate.is_plain_mean:
            name = setting.aggregate.called
            why = "feddst averages weights over the clients that hold them, and the formulas of this aggregation have one mask for all"
            raise BadInput(f'train.aggregate = "{name}": {why}; take "fedavg" or "fedprox"')
        epochs, steps = setting.train.epochs, setting.train.steps
        if self.adjust_epoch and (steps or self.adjust_epoch > epochs):
            most = f"should be at most train.epochs = {epochs}"
            if steps:
                most = f"the job trains by train.steps = {steps}; take 0, or leave it out to adjust after the last step"
            raise BadInput(f"[method] adjust_epoch = {self.adjust_epoch}: {most}")
        if self.min_votes > setting.cohort:
            raise BadInput(f"[method] min_votes = {self.min_votes}: should be at most {setting.cohort}, the clients of a round")


def best_held(w: Tensor, holders: Tensor, k: int, min_votes: int = 1) -> Tensor:
    """A mask of the `k` largest |w| among the weights that at least `min_votes` clients hold.

    Where there are fewer than `k`, the largest follow of those that any client holds. holders: clients that hold each weight.
    """
    order = masks.rank(w.abs())
    trust = (holders >= min_votes).int() + (holders > 0).int()
    order = order[trust.flatten()[order].sort(descending=True, stable=True).indices]
    return masks.first(order, k, w.shape)
