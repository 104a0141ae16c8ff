"""FedRTS: Huang et al., "FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling", NeurIPS 2025, arXiv:2501.19122.

Each weight that a mask may remove is an arm of a bandit, with a Beta posterior of how much it matters. Every round updates the arms
that are kept, by the magnitudes of the average and of each client's weights. An adjustment updates the others too, by the positions
that clients name, draws from all posteriors, and keeps the largest draws of each layer. No layer changes its number of kept weights.

Paper -> code:  m -> mask,  (a, b) -> alpha, beta of FedRTSState,  X -> reward,  xi -> drawn,  gamma -> average_share,
                lambda -> step,  K -> the ones of a mask,  K - kappa -> loose,  I_k -> top/index,  alpha -> adjust_fraction,
                Delta -> adjust_every,  T_end -> stop_round,  p_k -> n_k / total n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys, masks, rng
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under, weigh
from fedsim.core.types import Data
from fedsim.core.validation import TINY, within
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import TrainAndScore
from fedsim.federated.protocol import ClientInput, Fleet, Reply, Report, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, masked


@dataclass(frozen=True)
class FedRTSState(AveragedState):
    """The averaged model, and the posteriors of all weights that a mask may remove, by "vote/LAYER.weight", float32."""

    alpha: Tree
    beta: Tree


@dataclass(frozen=True)
class TrainAndVote(TrainAndScore):
    """Train, and what this client would keep; total: also n · 1[its largest weights]; each: only the positions of TrainAndScore."""

    loose: Mapping[str, int] = field(default_factory=dict)  # K_l - kappa_l: kept weights that get no vote

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report, held = super().finish(net, sent, state), sent.tree({})
        votes = {
            _vote(layer): masks.without_smallest(state[keys.weight(layer)], held[keys.mask(layer)], k) for layer, k in self.loose.items()
        }
        each = under(report.each, keys.TOP_INDEX) | {COUNT: report.each[COUNT]}
        return replace(report, total=report.total | weigh(sent.n, votes), each=each)


@dataclass(frozen=True)
class FedRTS(MaskedAveraging):
    """Chooses its masks by Thompson sampling."""

    follows_rounds = False

    average_share: float = 0.5  # gamma, share of the averaged model in a reward; the clients have the rest
    step: float = 10.0  # lambda, how much one reward adds to a posterior
    adjust_every: int = 10  # Delta, rounds between two adjustments
    stop_round: int = 300  # T_end, the last round that may adjust; 0: never
    adjust_fraction: float = 0.4  # alpha: f(r) = alpha / 2 (1 + cos(pi r / T_end)) of a layer's kept weights get no vote

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, average_share=(0, 1), step=(TINY, inf), adjust_every=(1, inf), stop_round=(0, inf), adjust_fraction=(0, 1))

    def init(self, setting: Setting, public: Data | None) -> FedRTSState:
        begin = super().init(setting, public)
        arms = mask_adjustment.trainable(setting.net, self.layers(setting.net))
        ones = {_vote(layer): torch.ones_like(begin.shared[keys.weight(layer)]).float() for layer in arms}
        return FedRTSState(begin.shared, begin.memory, ones, ones)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return state, {}
        assert isinstance(state, FedRTSState)
        loose, adjusts = self.loose(setting.net, state.shared, r), mask_adjustment.due(r, self.adjust_every, self.stop_round)
        held = {layer: state.shared[keys.mask(layer)] for layer in loose}
        named = {layer: min(k, masks.count(~held[layer])) for layer, k in loose.items() if adjusts}
        work = TrainAndVote.growing(setting, r, named, loose=loose)
        after, reply = trained(setting, fleet, state, r, work)
        after = replace(after, **self._posteriors(after, reply, loose, adjusts))
        new = {layer: drawn(after, layer, rng.number(setting.seed, "beta", r, i)) for i, layer in enumerate(held) if adjusts}
        moved = sum(masks.count(mask & ~held[layer]) for layer, mask in new.items())
        shared = masked(after.shared, {keys.mask(layer): mask for layer, mask in new.items()})
        return replace(after, shared=shared), {"lr": work.lr, "weights_swapped": float(moved)}

    def loose(self, net: Net, shared: Tree, r: int) -> dict[str, int]:
        """K_l - kappa_l = floor(f(r) K_l) of every layer whose mask may move, also where fewer are pruned; 0 after the last adjustment."""
        ones = {layer: masks.count(shared[keys.mask(layer)]) for layer in mask_adjustment.trainable(net, self.layers(net))}
        if r > self.stop_round:
            return dict.fromkeys(ones, 0)
        return {layer: mask_adjustment.moves(k, 2 * k, self.adjust_fraction / 2, r, self.stop_round) for layer, k in ones.items()}

    def _posteriors(self, after: FedRTSState, reply: Reply, loose: Mapping[str, int], adjusts: bool) -> dict[str, Tree]:
        """Both parameters after the rewards of a round: of kept weights always, of pruned ones where the masks are adjusted."""
        alpha, beta = {}, {}
        for layer, k in loose.items():
            key, mask = _vote(layer), after.shared[keys.mask(layer)]
            largest = masks.without_smallest(after.shared[keys.weight(layer)], mask, k).double()
            reward = self._reward(largest, reply.total[key] / reply.total[COUNT])
            seen = mask
            if adjusts:
                reward, seen = torch.where(mask, reward, self._reward(0.5, _named(reply, layer, mask))), torch.ones_like(mask)
            up, down = torch.where(seen, reward, 0.0), torch.where(seen, 1 - reward, 0.0)
            alpha[key] = (after.alpha[key].double() + self.step * up).float()
            beta[key] = (after.beta[key].double() + self.step * down).float()
        return {"alpha": alpha, "beta": beta}

    def _reward(self, average: Tensor | float, clients: Tensor) -> Tensor:
        """X = gamma · average + (1 - gamma) · clients, every part between 0 and 1."""
        return self.average_share * average + (1 - self.average_share) * clients


def drawn(state: FedRTSState, layer: str, seed: int) -> Tensor:
    """The mask of a layer's K_l largest draws from its posteriors."""
    mask = state.shared[keys.mask(layer)]
    if bool(mask.all()):
        return mask
    alpha, beta = (part[_vote(layer)].cpu().double().numpy() for part in (state.alpha, state.beta))
    xi = np.random.default_rng(seed % 2**64).beta(alpha, beta)
    return masks.top(torch.from_numpy(xi), masks.count(mask)).to(mask.device)


def _named(reply: Reply, layer: str, mask: Tensor) -> Tensor:
    """sum_k p_k 1[j in I_k], in the shape of the mask; 0 where no client was asked."""
    index = reply.each.get(keys.top_index(layer))
    if index is None:
        return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    n = reply.each[COUNT].double()
    return (mask_adjustment.votes(index, torch.ones_like(index), n, mask.numel()) / n.sum()).view(mask.shape)


def _vote(layer: str) -> str:
    """The key of what is known of a layer's arms: votes on the way up, posteriors on the server."""
    return f"{keys.VOTES}{layer}.weight"
