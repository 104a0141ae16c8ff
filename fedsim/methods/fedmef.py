"""FedMef: Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning", CVPR 2024, arXiv:2403.14737.

A sparse model of constant density, from random Erdős-Rényi-kernel masks, that now and then exchanges its smallest weights for the
pruned positions of largest gradient. Budget-aware extrusion: before weights are dropped, a penalty presses them towards zero while
the rest takes over their work. Scaled activation pruning and the normalised sparse convolution are the model's and the trainer's, of
use to every method: the whole of FedMef is this method with model.norm = "nsconv" and train.activation_keep = 0.3 in the job.

Paper -> code:  theta -> w,  m -> mask,  d -> density,  theta_low -> the marked weights,  K_l -> moves,  lambda -> penalty,  T -> budget,
                Delta R -> adjust_every,  R_stop -> stop_round,  gamma -> 1 - train.activation_keep,  eta_r -> train.lr by train.schedule
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from torch import Tensor

from fedsim.core.keys import COUNT, MARKED
from fedsim.core.tree import Tree
from fedsim.core.types import Data
from fedsim.core.validation import TINY, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import TrainAndScore
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning import extrusion, mask_adjustment
from fedsim.pruning.extrusion import ExtrudeAndProbe, marked, norm_of
from fedsim.pruning.sparsity import layer_densities
from fedsim.pruning.sparsity.masked_averaging import drawn, largest, masked


@dataclass(frozen=True)
class Extrusion:
    """What one round presses down, and why."""

    moves: Mapping[str, int] = field(default_factory=dict)  # K_l of an adjustment at the end of the round
    marks: Mapping[str, int] = field(default_factory=dict)  # K_l of that one, or of the one that comes next
    before: int = 0  # rounds of the extrusion that are done
    rounds: int = 1


@dataclass(frozen=True)
class FedMef(Method[AveragedState]):
    """Moves its masks all at once, and presses down what it is about to drop."""

    follows_rounds = False

    density: float = 0.1  # d, kept share of all conv and linear weights, the dense first layer included
    adjust_every: int = 10  # Delta R, rounds
    stop_round: int = 300  # R_stop, the last round that may adjust; 0: never
    adjust_fraction: float = 0.2  # K_l = adjust_fraction (1 + cos(pi r / R_stop)) n_l weights of a layer move
    penalty: float = 1e-4  # lambda, of the marked weights' norm; 0: no extrusion
    penalty_form: Literal["squared", "norm"] = "squared"  # lambda |theta_low|^2, or lambda |theta_low|
    ramp: bool = False  # lambda grows by itself at every step of an extrusion, up to 100 times
    beta_norm: Literal["l2", "l1"] = "l2"  # of the marked weights, in the extrusion's learning rate
    budget: int | None = None  # T, the last steps of local training, in which they are pressed; None: all of them
    extrusion_rounds: int = 0  # rounds just before an adjusting one that extrude as well, T counted over all of them
    remark_every_step: bool = False  # marked anew at every step; false: once, from the broadcast
    drop_rule: Literal["smallest", "marked"] = "smallest"  # what leaves: the smallest weights of the average, or the marked ones
    blocks: int | Literal["stages", "layer", "all"] = "all"  # layers that move at once; FedTiny has 5 blocks, one after the other
    start: Literal["erk", "erk_magnitude"] = "erk"  # which positions are kept at first: random ones, or the largest weights
    mask_classifier: bool = True  # whether the last layer is pruned as well
    sharing: Literal["erk", "er", "uniform"] = "erk"  # how layers share the density: by Erdős-Rényi-kernel, by Erdős-Rényi, or all alike

    def __post_init__(self) -> None:
        within(self, density=(TINY, 1), adjust_fraction=(0, 0.5), penalty=(0, inf), adjust_every=(1, inf), stop_round=(0, inf))
        within(self, budget=(1, inf), extrusion_rounds=(0, inf))
        if self.extrusion_rounds >= self.adjust_every:
            limit = f"should be below adjust_every = {self.adjust_every}"
            raise BadInput(f"[method] extrusion_rounds = {self.extrusion_rounds}: {limit}, the rounds from one adjustment to the next")
        if isinstance(self.blocks, int):
            within(self, blocks=(1, inf))

    def unread(self) -> dict[str, str]:
        if self.penalty:
            return {}
        names = ("penalty_form", "ramp", "beta_norm", "budget", "extrusion_rounds", "remark_every_step")
        return dict.fromkeys(names, "penalty = 0 extrudes nothing")

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        try:
            mask_adjustment.blocks(self._masked(setting.net), self.blocks)
            held = self.masks_of(setting)
        except ValueError as error:
            raise BadInput(f"[method] {error}") from error
        return AveragedState.begin(setting, masked(setting.net.initial, held))

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return state, {}
        extrusion = self.extrusion(setting.net, state.shared, r)
        work = self.training(setting, r, extrusion)
        after, reply = trained(setting, fleet, state, r, work)
        shared, columns = after.shared, {"lr": work.lr, "weights_swapped": 0.0}
        if extrusion.marks:
            low = marked(state.shared, extrusion.marks)
            columns |= {"marked_norm_before": float(norm_of(state.shared, low)), "marked_norm_after": float(norm_of(shared, low))}
        if extrusion.moves:
            n, leaving = reply.each[COUNT].double(), self._leaving(state.shared, extrusion.moves)
            shared, columns["weights_swapped"] = mask_adjustment.swapped(shared, reply.each, extrusion.moves, n / n.sum(), leaving)
        return replace(after, shared=shared), columns

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        return None if r == 0 or self.ahead(r) else {"weights_swapped": 0}

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None

    def training(self, setting: Setting, r: int, extrusion: Extrusion) -> TrainAndScore:
        """What the cohort does in round `r`: local training under the old masks, and where weights are about to move the votes."""
        if not (extrusion.marks and self.penalty):
            return TrainAndScore.growing(setting, r, extrusion.moves)
        how: dict[str, Any] = {"penalty": self.penalty, "form": self.penalty_form, "ramp": self.ramp, "beta_norm": self.beta_norm}
        how |= {"budget": self.budget, "before": extrusion.before, "rounds": extrusion.rounds, "remark": self.remark_every_step}
        return ExtrudeAndProbe.growing(setting, r, extrusion.moves, lr0=setting.train.lr, marks=extrusion.marks, **how)

    def extrusion(self, net: Net, shared: Tree, r: int) -> Extrusion:
        """What round `r` presses down and moves: for the adjustment that it ends with, or one at most `extrusion_rounds` rounds ahead."""
        if not self.ahead(r):
            return Extrusion()
        due, first = self._next(r)
        groups = mask_adjustment.blocks(self._masked(net), self.blocks)
        layers = mask_adjustment.trainable(net, groups[mask_adjustment.turn(due, self.adjust_every, len(groups)) - 1])
        moves = mask_adjustment.moving(shared, layers, self.adjust_fraction, due, self.stop_round)
        return Extrusion(moves if r == due else {}, moves, r - first, due - first + 1)

    def ahead(self, r: int) -> bool:
        """Whether round `r` presses weights down for an adjustment, or adjusts."""
        due, first = self._next(r)
        return r >= first and mask_adjustment.due(due, self.adjust_every, self.stop_round)

    def _next(self, r: int) -> tuple[int, int]:
        """The next adjustment from round `r` on, and the first round that presses down for it."""
        due = -(-r // self.adjust_every) * self.adjust_every
        return due, max(1, due - self.extrusion_rounds)

    def _leaving(self, shared: Tree, moves: Mapping[str, int]) -> dict[str, Tensor] | None:
        """The weights that the broadcast had marked, where these are what leaves."""
        if self.drop_rule == "smallest":
            return None
        return {key.removeprefix(MARKED): index for key, index in extrusion.marked(shared, moves).items()}

    # ---- masks

    def _masked(self, net: Net) -> tuple[str, ...]:
        return net.maskable if self.mask_classifier else net.maskable[:-1]

    def masks_of(self, setting: Setting) -> Tree:
        """Masks of layer densities that meet the whole density, at positions drawn from the seed or by magnitude."""
        net = setting.net
        counts = layer_densities.kept_counts(net, self._masked(net), self.density, self.sharing)
        return drawn(net, counts, setting.seed) if self.start == "erk" else largest(net.initial, counts)
