"""FedDIP: Long et al., ICDM 2023, arXiv:2309.06805. The largest weights of a dense model, chosen anew, under a growing penalty.

Long, Anagnostopoulos, Puthiya Parambath and Bi, "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental
Regularization".

The server holds a dense model and a mask. Clients train the masked model with a penalty on the norms of its layers, which grows over
the rounds. Every few rounds the server keeps the largest weights of the dense model, all layers ranked together, at a density that
falls; a weight that returns has the value it had when it was pruned. Only kept weights travel. What a client would move at pruned positions
changes neither its masked model nor, since it is not sent, the server's: so clients here train the masked model alone. They are
charged what the paper's clients compute, which form weight gradients at all positions.

Paper -> code:  omega -> dense,  omega' = omega * m -> shared,  d_0 -> first_density,  d_f -> density,  T -> rounds of the job,
                R -> reconfigure_every,  lambda_t -> penalty_at,  Q -> segments,  lambda_max -> penalty
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.tree import Tree
from fedsim.core.types import Batch, Data
from fedsim.core.validation import TINY, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity import layer_densities
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, drawn, empty_layers, masked


@dataclass(frozen=True)
class TrainWithNorms(Train):
    """Train, the loss with strength · sum over `layers` of |w_l|_2, of the kept weights."""

    purpose: ClassVar[str] = "Train"  # without a penalty it is Train, draws included

    strength: float = 0.0  # lambda_t
    layers: tuple[str, ...] = ()

    def gradient(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree, Tree]:
        extra = self.aggregate.extra(sent, state) or {}
        if self.strength:
            pulls = self.pulls(state)
            extra = extra | {key: extra[key] + pull if key in extra else pull for key, pull in pulls.items()}
        return net.gradient(sent.tree(state), batch, extra=extra or None)

    def pulls(self, state: Tree) -> Tree:
        """The gradient of the penalty: lambda w / |w|, and 0 at w = 0; frozen weights are not in `state`."""
        weights = {key: state[key] for layer in self.layers if (key := keys.weight(layer)) in state}
        tiny = torch.finfo(torch.float32).tiny
        return {key: self.strength * w / w.square().sum().sqrt().clamp(min=tiny) for key, w in weights.items()}


@dataclass(frozen=True)
class DenseState(AveragedState):
    """What the server knows: the broadcast, whose pruned weights are 0, and the weights of masked layers with their pruned values."""

    dense: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class FedDIP(MaskedAveraging):
    """Trains a masked model, and now and then masks the dense one behind it anew."""

    density: float = 0.1  # d_f, share of all conv and linear weights that is kept after the last round, dense layers included
    first_density: float = 0.5  # d_0, the same before the first round
    reconfigure_every: int = 10  # R, rounds between two masks; the last round of the job makes one as well
    penalty: float = 1e-3  # lambda_max, of the layers' norms in the last segment; half of it in the second one, 0 in the first; 0: none
    segments: int = 20  # Q, equal parts of the job's rounds, each with one strength of the penalty
    dense_gradients: bool = (
        True  # clients are charged weight gradients at all positions, as in the paper; false: at kept ones, same weights
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, first_density=(TINY, 1), reconfigure_every=(1, inf), penalty=(0, inf), segments=(1, inf))
        if self.first_density < self.density:
            raise BadInput(f"[method] first_density = {self.first_density}: should be at least density = {self.density}")

    def init(self, setting: Setting, public: Data | None) -> DenseState:
        state = super().init(setting, public)
        dense = {key: setting.net.initial[key] for key in map(keys.weight, self.layers(setting.net))}
        return DenseState(state.shared, state.memory, dense)

    def first_masks(self, setting: Setting, public: Data | None) -> Tree:
        """At positions drawn from the seed, in layer densities by `sharing`; ValueError also for a final density below a weight a layer."""
        self.counts(setting.net)
        counts = layer_densities.kept_counts(setting.net, self.layers(setting.net), self.first_density, self.sharing)
        return drawn(setting.net, counts, setting.seed)

    def round(self, setting: Setting, state: Any, fleet: Fleet, r: int) -> tuple[DenseState, dict[str, float]]:
        if r == 0:
            return state, {}
        layers, strength = self.layers(setting.net), self.penalty_at(r, setting.rounds)
        feed = replace(setting.train.feed(), dense_gradient_layers=layers if self.dense_gradients else ())
        work = TrainWithNorms.at(setting, r, feeds=(feed,), strength=strength, layers=layers)
        state, _ = trained(setting, fleet, state, r, work)
        shared, density = state.shared, mask_adjustment.falling_density(r, 0, setting.rounds, self.first_density, self.density)
        dense = {key: torch.where(shared[keys.mask_of(key)], shared[key], value) for key, value in state.dense.items()}
        if r % self.reconfigure_every == 0 or r == setting.rounds:
            budget = layer_densities.budget(setting.net, layers, density)
            found = masks.top_of_all({layer: dense[keys.weight(layer)].abs() for layer in layers}, budget)
            shared = masked(shared | dense, {keys.mask(layer): mask for layer, mask in found.items()})
        columns = {"lr": work.lr, "target_density": density, "norm_penalty": strength, "empty_layers": empty_layers(shared)}
        return replace(state, shared=shared, dense=dense), columns

    def penalty_at(self, r: int, rounds: int) -> float:
        """lambda_t of round `r`: 0 in the first segment, then from half of `penalty` in equal steps to `penalty` in the last."""
        segment = self.segments * (r - 1) // rounds
        return self.penalty * (1 + (segment - 1) / max(1, self.segments - 2)) / 2 if segment else 0.0
