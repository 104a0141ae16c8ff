"""FedTiny: Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", ICDCS 2023, arXiv:2212.01977.

Adaptive batch-norm selection: the server prunes a model, pretrained on a few public images, in C ways; clients re-estimate the
running statistics of each candidate on their own images, and the one of lowest loss is taken. Progressive pruning: every
Delta R rounds one block of layers, from the output to the input, exchanges its smallest weights for the pruned positions of
largest gradient, of which a client sends a few.

Paper -> code:  Theta -> w,  m -> mask,  d_target -> density,  C -> pool,  D_s -> public,  a_t^l -> moves,  g~ -> votes,
                Delta R -> adjust_every,  R_stop -> stop_round,  K -> clients,  E -> train.epochs,  B -> train.batch,  eta -> train.lr
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Literal

import torch
from torch import Tensor

from fedsim.core import keys, masks, rng, tree
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under
from fedsim.core.types import Data, Feed
from fedsim.core.validation import MAX_COHORT, TINY, read_where, within
from fedsim.costs import profile
from fedsim.errors import BadInput
from fedsim.federated import pretraining
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Loss, Statistics, Train, TrainAndScore
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity import saliency

DRAWS = 10_000  # of layer densities for one candidate


@dataclass(frozen=True)
class FedTiny(Method[AveragedState]):
    """Selects a sparse model by batch-norm statistics, then prunes and regrows its weights while it trains."""

    follows_rounds = False
    density: float = 0.01  # d_target, kept share of all conv and linear weights, the dense first layer included
    selection: Literal["bn", "vanilla", "none"] = "bn"  # vanilla: judged with the server's statistics; none: the first candidate
    pool: int | None = None  # C, candidates; None: ceil(0.1 / density), at most pool_cap
    pool_cap: int = 100  # candidates
    spread: float = 0.5  # layer densities are drawn within 1 - spread … 1 + spread times the density of the masked layers
    tol: float = 0.02  # a candidate's whole density is within (1 - tol) density … density
    tol_two_sided: bool = False  # the authors' window: within tol on either side, the first layer not counted; exceeds the density
    class_weights: int = 0  # weights that every output of the classifier keeps at least in a candidate, within the density; 0: as drawn
    pretrain_epochs: int = 3  # of the server on its public images (partition.public, per class)
    probe_share: float = 0.1  # of a client's images, at least one batch: those it selects on
    bn_passes: int = 10  # over them, for each candidate's statistics
    bn_momentum: float = 0.1  # 1 - gamma, share of a batch in the statistics
    selection_clients: int | None = None  # that select; None: all
    adjust_every: int = 10  # Delta R, rounds
    stop_round: int = 100  # R_stop, the last round that may adjust; 0: never
    adjust_fraction: float = 0.15  # a_t^l = alpha (1 + cos(pi r / R_stop)) n_l weights of a layer move
    blocks: int | Literal["stages", "layer", "all"] = 5  # so many contiguous blocks (fewer where there are fewer layers)
    order: Literal["backward", "forward"] = "backward"  # backward: from the output to the input
    growth: Literal["batch", "last_step"] = "batch"  # gradient of a batch after local training, or of its last one before the step
    rounding: Literal["floor", "ceil"] = "floor"  # of a_t^l
    uniform: bool = False  # votes count alike; false: by a client's number of images

    def __post_init__(self) -> None:
        within(self, density=(TINY, 1), spread=(0, 1), tol=(0, 1), probe_share=(TINY, 1), bn_momentum=(TINY, 1), adjust_fraction=(0, 0.5))
        within(self, pool=(1, inf), pool_cap=(1, inf), bn_passes=(1, inf), selection_clients=(1, inf), adjust_every=(1, inf))
        within(self, pretrain_epochs=(0, inf), stop_round=(0, inf), class_weights=(0, inf))
        within(self, **({"blocks": (1, inf)} if isinstance(self.blocks, int) else {}))

    def unread(self) -> dict[str, str]:
        found = read_where(self, "pool", (None,), "pool_cap") | read_where(self, "selection", ("bn",), "bn_passes", "bn_momentum")
        return found | read_where(self, "selection", ("bn", "vanilla"), "pool", "pool_cap", "probe_share", "selection_clients")

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        self._check(setting, public)
        shared = pretraining.pretrained(setting, public, self.pretrain_epochs, not setting.costs_only) if public else setting.net.initial
        return AveragedState.begin(setting, shared)  # dense until the candidates are drawn in round 0

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return self._selected(setting, state, fleet)
        block, moves = self.adjustment(setting.net, state.shared, r)
        work = TrainAndScore.growing(setting, r, moves, self.growth == "last_step") if moves else Train.at(setting, r)
        state, reply = trained(setting, fleet, state, r, work)
        swapped = 0
        if moves:
            n = (torch.ones_like(reply.each[COUNT]) if self.uniform else reply.each[COUNT]).double()
            shared, swapped = mask_adjustment.swapped(state.shared, reply.each, moves, n / n.sum())
            state = replace(state, shared=shared)
        return state, {"lr": work.lr, "weights_swapped": swapped} | ({"adjusted_block": block} if block else {})

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        return None if r == 0 or mask_adjustment.due(r, self.adjust_every, self.stop_round) else {"weights_swapped": 0}

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None

    # ---- adaptive batch-norm selection

    def _selected(self, setting: Setting, state: AveragedState, fleet: Fleet) -> tuple[AveragedState, dict[str, float]]:
        """The candidate of lowest loss, the first of equals, with the statistics that its clients agreed on."""
        pool = self._pool(setting)[: 1 if self.selection == "none" else None]
        each, sizes = {setting.net.maskable[-1]: self.class_weights}, setting.net.sizes
        most = {layer: max(counts[layer] for counts in pool) for layer in setting.net.maskable}
        ranking = {layer: saliency.ranked(state.shared[keys.weight(layer)].abs(), each.get(layer, 0), k) for layer, k in most.items()}
        kept = [(layer, count) for counts in pool for layer, count in counts.items()]  # stored sparse, and expanded when its turn comes
        stored = sum(profile.VALUE_BYTES * count + profile.positions_bytes(count, sizes[layer]) for layer, count in kept)
        losses: list[float] = []
        for counts in pool:
            candidate = _pruned(state.shared, ranking, counts)
            candidate, loss = (candidate, 0.0) if self.selection == "none" else self._judged(setting, candidate, fleet, stored)
            if all(loss < other for other in losses):
                chosen = candidate
            losses.append(loss)
        found: dict[str, float] = {"candidates": len(pool), "chosen_candidate": losses.index(min(losses)) + 1}
        if self.selection != "none":
            found |= {"candidate_loss": min(losses), "pool_loss": sum(losses) / len(losses)}
        return AveragedState.begin(setting, chosen), found

    def _judged(self, setting: Setting, candidate: Tree, fleet: Fleet, stored: int) -> tuple[Tree, float]:
        """The candidate with the clients' mean statistics, and their mean loss on it, both by images seen."""
        clients = fleet.pick(self.selection_clients, 0)
        feed = Feed("probe", epochs=1, batch=setting.train.batch, augment=False, share=self.probe_share, cost="forward")
        if self.selection == "bn":
            total = fleet.run(Statistics((replace(feed, epochs=self.bn_passes),), self.bn_momentum, stored), clients, candidate).total
            seen = total[COUNT].clamp(min=1)  # an estimate's clients see none
            candidate = candidate | tree.mean(total, seen, under(candidate, keys.BUFFERS))
        total = fleet.run(Loss((feed,), stored), clients, candidate).total
        return candidate, float(total[keys.LOSS_SUM] / total[COUNT].clamp(min=1))

    def _pool(self, setting: Setting) -> list[dict[str, int]]:
        """Kept weights of every layer, for each candidate: layer densities are drawn until the whole density is in the window.

        At density 1 there is nothing to draw: one candidate, which keeps all weights.
        """
        sizes = setting.net.sizes
        if self.density == 1:
            return [{layer: sizes[layer] for layer in setting.net.maskable}]
        count = self.pool or min(ceil(0.1 / self.density - 1e-9), self.pool_cap)
        sure = self.class_weights * setting.net.shapes[setting.net.maskable[-1]][0]
        return [self._drawn(sizes, rng.key(setting.seed, "pool", c), sure) for c in range(count)]

    def _drawn(self, sizes: Mapping[str, int], key: Tensor, sure: int) -> dict[str, int]:
        (_, first), *rest = sizes.items()
        layers, n = [layer for layer, _ in rest], torch.tensor([size for _, size in rest])
        fewest = torch.tensor([1] * (len(rest) - 1) + [max(1, sure)])
        whole = first + int(n.sum())
        budget = self.density * whole if self.tol_two_sided else masks.budget(sizes, self.density)
        least, most = (1 - self.tol) * self.density * whole - first, budget
        if self.tol_two_sided:
            least, most = (1 - self.tol) * budget, (1 + self.tol) * budget
        for draws in torch.arange(DRAWS).split(500):
            u = rng.uniform(rng.fold(key, draws), len(layers)).double()
            share = budget / n.sum() * (1 + 2 * self.spread * (u - 0.5))  # d_l
            counts = (share * n).floor().long().maximum(fewest).minimum(n)  # (draws, L)
            fits = ((counts.sum(1) >= least) & (counts.sum(1) <= most)).nonzero()
            if len(fits):
                return dict(zip(layers, counts[int(fits[0])].tolist(), strict=True))
        listed = ", ".join(f"{layer} {size:,}" for layer, size in sizes.items())
        way = f"take a smaller spread, a larger tol or fewer class_weights. The weights of the layers: {listed}"
        raise ValueError(f"density = {self.density}: none of {DRAWS:,} draws was within tol = {self.tol} of it; {way}")

    # ---- progressive pruning

    def adjustment(self, net: Net, shared: Tree, r: int) -> tuple[int, dict[str, int]]:
        """The block that round `r` adjusts, 1 nearest the input (0: none), and a_t^l of those of its layers that move."""
        if not mask_adjustment.due(r, self.adjust_every, self.stop_round):
            return 0, {}
        blocks = mask_adjustment.blocks(net.maskable, self.blocks)
        block = mask_adjustment.turn(r, self.adjust_every, len(blocks), self.order)
        layers = mask_adjustment.trainable(net, blocks[block - 1])
        moves = mask_adjustment.moving(shared, layers, self.adjust_fraction, r, self.stop_round, self.rounding == "ceil")
        return block if moves else 0, moves

    # ---- what cannot be

    def _check(self, setting: Setting, public: Data | None) -> None:
        """BadInput for a job that leaves a layer without a weight, has no statistics to select by, or no images to prune by."""
        if self.selection == "bn" and not any(key.endswith("running_var") for key in setting.net.initial):
            raise BadInput('[method] selection = "bn" needs batch norms: take model.norm = "batch", or selection = "vanilla" or "none"')
        if public is None and self.pretrain_epochs:
            raise BadInput("fedtiny prunes a model pretrained on public images: set partition.public = 5 (a class), or pretrain_epochs = 0")
        most = min(setting.clients, MAX_COHORT)
        if self.selection != "none" and (self.selection_clients or setting.clients) > most:
            raise BadInput(f"[method] selection_clients: of {setting.clients:,} clients at most {most:,} can select")
        try:
            mask_adjustment.blocks(setting.net.maskable, self.blocks)
            self._pool(setting)
        except ValueError as error:
            raise BadInput(f"[method] {error}") from error


def _pruned(shared: Tree, ranking: Tree, counts: Mapping[str, int]) -> Tree:
    """The model with the largest weights of every layer."""
    held = {keys.mask(layer): masks.first(ranking[layer], k, shared[keys.weight(layer)].shape) for layer, k in counts.items()}
    return masks.apply(shared, held) | held
