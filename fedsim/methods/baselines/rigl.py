"""RigL under FedAvg: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv:1911.11134.

A sparse model of constant density. Every Delta rounds each layer drops its smallest weights and grows the pruned positions of largest
gradient: every client of the cohort sends the dense gradient of one batch, at its weights after local training. This is FedTiny
without selection, blocks and buffers of largest gradients, a baseline of that paper's authors. SET (Mocanu et al., Nature Communications
2018, arXiv:1707.04780) is this method with growth = "random": positions are drawn, and clients send nothing more.

Paper -> code:  theta -> w,  s^l -> layer densities by `sharing`,  f_decay(t; alpha, T_end) -> mask_adjustment.moves (alpha / 2),
                alpha -> adjust_fraction,  Delta T -> adjust_every (rounds, not steps),  T_end -> stop_round,  grad L -> grad/LAYER.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from torch import Tensor

from fedsim.core import keys, rng
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree
from fedsim.core.types import Data
from fedsim.core.validation import within
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Train, TrainAndGradient
from fedsim.federated.protocol import Fleet, Reply, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, drawn


@dataclass(frozen=True)
class RigL(MaskedAveraging):
    """Moves the masks of all layers together: the smallest weights leave, and positions of large gradient, or drawn ones, enter as 0."""

    follows_rounds = False

    growth: Literal["gradient", "random"] = "gradient"  # where weights grow: at the largest gradients, or at drawn positions (SET)
    regrow: bool = True  # a weight that has just been dropped may grow back, as 0; false: only positions that were pruned before can grow
    start: Literal["magnitude", "random"] = (
        "magnitude"  # positions that are kept at first: the largest weights, or drawn ones (as the papers)
    )
    adjust_every: int = 10  # Delta T, rounds
    stop_round: int = 300  # T_end, the last round that may adjust; 0: never
    adjust_fraction: float = 0.2  # alpha: alpha / 2 (1 + cos(pi r / T_end)) of a layer's kept weights move

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, adjust_every=(1, inf), stop_round=(0, inf), adjust_fraction=(0, 1))

    def first_masks(self, setting: Setting, public: Data | None) -> Tree:
        if self.start == "magnitude":
            return super().first_masks(setting, public)
        return drawn(setting.net, self.counts(setting.net), setting.seed)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return state, {}
        moves = self.moves(setting.net, state.shared, r)
        work: Train = Train.at(setting, r)
        if moves and self.growth == "gradient":
            work = TrainAndGradient.tapping(setting, r, tuple(moves))
        state, reply = trained(setting, fleet, state, r, work)
        swapped = 0
        if moves:
            shared, swapped = mask_adjustment.exchanged(state.shared, self.scores(setting, moves, reply, r), moves, regrow=self.regrow)
            state = replace(state, shared=shared)
        return state, {"lr": work.lr, "weights_swapped": swapped}

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        return None if r == 0 or mask_adjustment.due(r, self.adjust_every, self.stop_round) else {"weights_swapped": 0}

    def moves(self, net: Net, shared: Tree, r: int) -> dict[str, int]:
        """k_l = floor(f(r) nnz_l) of every layer that round `r` adjusts."""
        if not mask_adjustment.due(r, self.adjust_every, self.stop_round):
            return {}
        layers = mask_adjustment.trainable(net, self.layers(net))
        return mask_adjustment.moving(shared, layers, self.adjust_fraction / 2, r, self.stop_round)

    def scores(self, setting: Setting, moves: Mapping[str, int], reply: Reply, r: int) -> dict[str, Tensor]:
        """Layer -> what says which positions grow: the clients' mean gradient by images, or a rank drawn from seed, round and layer."""
        if self.growth == "gradient":
            return {layer: reply.total[keys.gradient(layer)] / reply.total[COUNT] for layer in moves}
        weights = {layer: setting.net.initial[keys.weight(layer)] for layer in moves}
        places = {layer: place for place, layer in enumerate(setting.net.sizes)}
        drawn_keys = {layer: rng.key(setting.seed, "grow", r, places[layer]) for layer in moves}
        return {layer: rng.permutation(drawn_keys[layer], w.numel()).to(w.device).double() + 1 for layer, w in weights.items()}
