"""Gradual magnitude pruning under FedAvg: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.

Training begins dense. Every few rounds the server prunes the smallest weights of the average, fast at first and slowly at the end,
until the density of the job is reached; a pruned weight never returns, so that the masks of all rounds are nested. Clients train under
the masks. The method starts denser than its `density` by design, and its costs are those of the densities it has passed through.

Paper -> code:  s_t -> 1 - mask_adjustment.falling_density,  s_i -> 0,  s_f -> 1 - density,  t_0 -> start_round,
                t_0 + n Delta t -> stop_round,  Delta t -> adjust_every (rounds, not steps)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch

from fedsim.core import keys, masks
from fedsim.core.tree import Tree
from fedsim.core.types import Data
from fedsim.core.validation import read_where, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, averaged_round
from fedsim.federated.protocol import Fleet, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity import layer_densities
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, empty_layers, masked


@dataclass(frozen=True)
class Gradual(MaskedAveraging):
    """Prunes a dense model little by little while it trains."""

    density: float = 0.1  # d_f = 1 - s_f, share of all conv and linear weights that is kept from stop_round on, dense layers included
    sharing: Literal["erk", "er", "uniform"] = "uniform"  # how layers share the density, where scope = "layer": uniform as in the paper
    scope: Literal["layer", "global"] = "layer"  # global: one ranking of all layers together, which may empty a layer
    start_round: int = 0  # t_0, the last round that is dense
    stop_round: int | None = None  # the round from which on the model has its final density; None: at three quarters of the rounds
    adjust_every: int = 10  # Delta t, rounds between two prunings; stop_round prunes as well

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, start_round=(0, inf), stop_round=(1, inf), adjust_every=(1, inf))

    def unread(self) -> dict[str, str]:
        return read_where(self, "scope", ("layer",), "sharing")

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        stop = self.stop(setting)
        if stop > setting.rounds:
            limit = f"should be at most the job's rounds = {setting.rounds}, or the model never reaches density = {self.density}"
            raise BadInput(f"[method] stop_round = {stop}: {limit}")
        if self.start_round >= stop:
            raise BadInput(f"[method] start_round = {self.start_round}: should be below {stop}, the round of the last pruning")
        return super().init(setting, public)

    def stop(self, setting: Setting) -> int:
        """The round of the last pruning."""
        return max(1, 3 * setting.rounds // 4) if self.stop_round is None else self.stop_round

    def first_masks(self, setting: Setting, public: Data | None) -> Tree:
        """Everything is kept; ValueError where the final density leaves a layer without a weight."""
        return {keys.mask(layer): torch.ones_like(setting.net.initial[keys.weight(layer)]) > 0 for layer in self.counts(setting.net)}

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        state, columns = averaged_round(setting, fleet, state, r)
        stop = self.stop(setting)
        density = mask_adjustment.falling_density(r, self.start_round, stop, 1.0, self.density)
        if self.due(r, stop):
            held = self.smaller_masks(setting.net, state.shared, density)
            state = replace(state, shared=masked(state.shared, held))
        return state, columns | ({"target_density": density, "empty_layers": empty_layers(state.shared)} if r else {})

    def due(self, r: int, stop: int) -> bool:
        """Whether round `r` prunes: every `adjust_every` rounds after start_round, and in round `stop`, the last one."""
        done = r - self.start_round
        return r == stop or (done > 0 and mask_adjustment.due(done, self.adjust_every, stop - self.start_round))

    def smaller_masks(self, net: Net, shared: Tree, density: float) -> Tree:
        """Masks within those of `shared` that leave the whole network this density: the largest of the kept weights."""
        layers = self.layers(net)
        held = {layer: shared[keys.mask(layer)] for layer in layers}
        scores = {layer: shared[keys.weight(layer)].abs().masked_fill(~mask, -1.0) for layer, mask in held.items()}
        budget = layer_densities.budget(net, layers, density)
        if self.scope == "global":
            found = masks.top_of_all(scores, budget)
        else:
            shapes = {layer: net.shapes[layer] for layer in layers}
            most = {layer: masks.count(mask) for layer, mask in held.items()}
            counts = layer_densities.shared_out(shapes, budget, self.sharing, most)
            found = {layer: masks.top(scores[layer], k) for layer, k in counts.items()}
        return {keys.mask(layer): mask for layer, mask in found.items()}
