"""PruneFL: Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, arXiv:1909.12326.

Every now and then the server chooses the masks anew, so that the squared gradients of what is kept, over the seconds of a round, are
as large as possible. One client prunes the dense model first; then all train. The density follows from the data and from the time
model. The form "library" is a simpler one that others compare with: it exchanges weights of a sparse model, of constant density.

`fedsim estimate`, which trains nobody, predicts dense masks, or the cap, and all initial iterations without a reconfiguration.

Paper -> code:  Gamma, z_j, t_j, c, P -> pruning/sparsity/reconfiguration.py,  q(r) -> prunable · 0.5^(r / half_life),
                d_max -> max_density,  Delta -> adjust_every;  of the library: alpha -> adjust_fraction,  T_end -> stop_round
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch

from fedsim.core import keys
from fedsim.core.keys import CORRECT, COUNT
from fedsim.core.tree import Tree
from fedsim.core.types import Data, Feed
from fedsim.core.validation import TINY, within
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Loss, Train
from fedsim.federated.protocol import Fleet, Setting
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.pruning.sparsity import layer_densities, reconfiguration
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, masked
from fedsim.pruning.sparsity.reconfiguration import REST, UNIT, TrainAndSquare

Columns = dict[str, float]


@dataclass(frozen=True)
class PruneFL(MaskedAveraging):
    """Chooses its masks by squared gradients and by time."""

    density: float = 0.1  # d, kept share of all weights, dense layers included; paper: what the cap falls to, of no use without one
    form: Literal["paper", "library"] = "paper"  # the published method, or the simple one of constant density
    adjust_every: int = 50  # Delta, rounds between two reconfigurations; library: 10
    importance: Literal["every_round", "reconfiguration_round"] = "every_round"  # rounds whose squared gradients make z
    prunable: float = 0.3  # q(0), share of a layer's kept weights, the smallest, that may leave at once
    half_life: int = 10000  # rounds in which this share halves
    max_density: float | None = None  # d_max, cap on the whole density, falling linearly to `density`; None: no cap
    seconds_per_weight: tuple[float, ...] | None = None  # t_l of each masked layer, seconds a round; None: by the next two
    flops_per_second: float = 3e9  # of a client
    bytes_per_second: float = 1e6  # to and from a client
    constant_seconds: float = 86.8495  # c, seconds of a round without masked layers; of the authors' VGG11
    initial_iterations: int = 1000  # of the stage at one client, at most; 0: no such stage
    initial_every: int = 50  # iterations between two reconfigurations of that stage
    initial_batch: int = 20  # images of an iteration
    initial_batches: int = 10  # such batches that the client uses again and again
    start_accuracy: float = 1.5  # training accuracy, in units of 1 / classes, at which its reconfigurations begin
    settled_change: float = 0.1  # relative change of the density that counts as none
    settled: int = 5  # so many in a row end the stage
    stop_round: int = 300  # library: T_end, the last round that may exchange weights
    adjust_fraction: float = 0.2  # library: alpha: f(r) = alpha / 2 (1 + cos(pi r / T_end)) of a layer's kept weights leave
    regrow: bool = True  # library: whether weights that have just left may enter again

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, adjust_every=(1, inf), prunable=(0, 1), half_life=(1, inf), max_density=(TINY, 1), stop_round=(0, inf))
        within(self, flops_per_second=(TINY, inf), bytes_per_second=(TINY, inf), constant_seconds=(TINY, inf), adjust_fraction=(0, 1))
        within(self, initial_iterations=(0, inf), initial_every=(1, inf), initial_batch=(1, inf), initial_batches=(1, inf))
        within(self, start_accuracy=(0, inf), settled_change=(0, inf), settled=(1, inf))
        if self.max_density is not None and self.max_density < self.density:
            raise BadInput(f"[method] max_density = {self.max_density}: should be at least density = {self.density}, to which it falls")
        if any(not 0 < seconds < inf for seconds in self.seconds_per_weight or ()):
            raise BadInput(f"[method] seconds_per_weight = {list(self.seconds_per_weight or ())}: each should be above 0")

    def unread(self) -> dict[str, str]:
        return reconfiguration.unread(self)

    def layers(self, net: Net) -> tuple[str, ...]:
        """The layers that have masks; of the paper's form without those that are frozen, where nothing could come back."""
        every = super().layers(net)
        return every if self.form == "library" else tuple(mask_adjustment.trainable(net, every))

    def first_masks(self, setting: Setting, public: Data | None) -> Tree:
        """Of the paper's form all ones."""
        if self.form == "library":
            return super().first_masks(setting, public)
        layers = self.layers(setting.net)
        layer_densities.budget(setting.net, layers, 1.0 if self.max_density is None else self.density)
        if self.seconds_per_weight is not None and len(self.seconds_per_weight) != len(layers):
            right = f"{len(layers)} layers have masks ({', '.join(layers)})"
            raise ValueError(f"seconds_per_weight has {len(self.seconds_per_weight)} numbers; {right}, and each needs one")
        return {keys.mask(layer): torch.ones_like(setting.net.initial[keys.weight(layer)], dtype=torch.bool) for layer in layers}

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, Columns]:
        if self.form == "library":
            return (state, {}) if r == 0 else self._exchange(setting, state, fleet, r)
        if r == 0:
            return self._initial(setting, state, fleet) if self.initial_iterations else (state, {})
        due, accumulates = r % self.adjust_every == 0, self.importance == "every_round"
        work = Train.at(setting, r)
        if due or accumulates:
            since = (r - 1) // self.adjust_every * self.adjust_every if accumulates else None
            work = TrainAndSquare.measuring(setting, r, self.layers(setting.net), sends=due, since=since)
        after, reply = trained(setting, fleet, state, r, work)
        if not due:
            return after, {"lr": work.lr}
        mean = float(reply.total[COUNT]) / setting.cohort
        shared, columns = self.reconfigured(setting, after.shared, reply.total, r, _images(setting, mean))
        return replace(after, shared=shared), {"lr": work.lr} | columns

    # ---- the paper's form

    def reconfigured(self, setting: Setting, shared: Tree, total: Tree, r: int, images: float) -> tuple[Tree, Columns]:
        """The model under the best masks. total: what `TrainAndSquare` sends; images: that a client trains on in a round."""
        layers, net = self.layers(setting.net), setting.net
        stay = reconfiguration.must_keep(shared, layers, self.prunable * 0.5 ** (r / self.half_life))
        rates = self.flops_per_second, self.bytes_per_second
        each = self.seconds_per_weight or reconfiguration.seconds_per_weight(setting.model_profile, layers, images, *rates)
        seconds = torch.cat([torch.full((net.sizes[layer],), t, dtype=torch.float64) for layer, t in zip(layers, each, strict=True)])
        z = torch.cat([total[keys.gradient(layer)].flatten() for layer in layers])
        most, seconds = self._most(setting, r), seconds.to(z.device)
        flat = torch.cat([stay[layer].flatten() for layer in layers])
        if not (z.any() or total[REST]):  # no gradient: all masks are equally good, and what is kept stays
            z = seconds * torch.cat([shared[keys.mask(layer)].flatten() for layer in layers])
        mask, rate = reconfiguration.chosen(z, seconds, flat, self.constant_seconds, float(total[REST]), most)
        parts = mask.split([net.sizes[layer] for layer in layers])
        new = {keys.mask(layer): part.view(net.shapes[layer]) for layer, part in zip(layers, parts, strict=True)}
        spent = self.constant_seconds + float(seconds[mask].sum())
        return masked(shared, new), {"importance_per_second": rate * UNIT / float(total[COUNT]), "modelled_seconds": spent}

    def _most(self, setting: Setting, r: int) -> int | None:
        """Weights that the masked layers may keep at most."""
        if self.max_density is None:
            return None
        cap = self.max_density + (self.density - self.max_density) * min(1.0, r / setting.rounds)
        return layer_densities.budget(setting.net, self.layers(setting.net), cap)

    def _initial(self, setting: Setting, state: AveragedState, fleet: Fleet) -> tuple[AveragedState, Columns]:
        """The stage at one client: the server sends, it trains some iterations, the server chooses masks, until the density settles.

        Only one client takes part, so that the job's aggregation has no say in it.
        """
        client, shared, share, mine = fleet.pick(1, 0), state.shared, 1.0, 0.0
        done, calm, started = 0, 0, False
        columns: Columns = {}
        while done < self.initial_iterations and calm < self.settled:
            if not started:
                look = Feed("probe", epochs=1, batch=self.initial_batch, augment=False, cost="forward", share=share)
                seen = fleet.run(Loss((look,)), client, shared).total
                mine = mine or float(seen[COUNT])  # the first look is at all of its images; an estimate's, at none
                share = min(1.0, self.initial_batches * self.initial_batch / (mine or 1.0))
                started = float(seen[CORRECT] / seen[COUNT]) >= self.start_accuracy / _classes(setting.net)
            steps = min(self.initial_every, self.initial_iterations - done)
            feed = Feed("probe", steps=steps, batch=self.initial_batch, augment=setting.train.augment, share=share)
            total = fleet.run(self._iterations(setting, feed, started), client, shared).total
            shared, _ = FedAvg().server({}, shared, total, setting)
            done, mine = done + steps, mine or float(total[COUNT])
            if started:
                before = reconfiguration.kept(setting.net, shared)
                shared, columns = self.reconfigured(setting, shared, total, 0, _images(setting, mine))
                change = abs(reconfiguration.kept(setting.net, shared) - before) / before
                calm = calm + 1 if change <= self.settled_change else 0
        return replace(state, shared=shared), columns | {"initial_iterations": float(done)}

    def _iterations(self, setting: Setting, feed: Feed, measured: bool) -> Train:
        """Some iterations at the one client. Each counts as a round of one local step, so that z is of squared batch gradients."""
        if not measured:
            return Train.at(setting, 1, feeds=(feed,), aggregate=FedAvg())
        return TrainAndSquare.measuring(setting, 1, self.layers(setting.net), feed, each_batch=True, aggregate=FedAvg())

    # ---- the library's form

    def _exchange(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, Columns]:
        """A round of masked averaging; where weights move, the smallest leave and those of largest mean squared gradient enter."""
        moves: dict[str, int] = {}
        if mask_adjustment.due(r, self.adjust_every, self.stop_round):
            layers = mask_adjustment.trainable(setting.net, self.layers(setting.net))
            moves = mask_adjustment.moving(state.shared, layers, self.adjust_fraction / 2, r, self.stop_round)
        work = Train.at(setting, r)
        if moves:
            work = TrainAndSquare.measuring(setting, r, tuple(moves), each_batch=True, rest=False)
        after, reply = trained(setting, fleet, state, r, work)
        scores = {layer: reply.total[keys.gradient(layer)] for layer in moves}
        shared, moved = mask_adjustment.exchanged(after.shared, scores, moves, regrow=self.regrow)
        return replace(after, shared=shared), {"lr": work.lr, "weights_swapped": float(moved)}


def _images(setting: Setting, mine: float) -> float:
    """Images that a client with so many of its own trains on in a round, repetitions counted."""
    return setting.train.steps * setting.train.batch if setting.train.steps else setting.train.epochs * mine


def _classes(net: Net) -> int:
    """Outputs of the last layer."""
    return list(net.shapes.values())[-1][0]
