"""What methods share that train, cut channels once, and fine-tune the smaller network: their phases, rates and averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, TypeVar

from fedsim.core import keys
from fedsim.core.keys import CORRECT, COUNT
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed, LocalOptimizer
from fedsim.core.validation import within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Loss
from fedsim.federated.protocol import Fleet, Setting
from fedsim.nn.net import Net
from fedsim.pruning.gated_training import TrainGated

State = TypeVar("State", bound=AveragedState)

MAX_JUDGES = 1_000  # clients at most whose held-out images choose the best model


@dataclass(frozen=True)
class CutAndFinetune:
    """Mixin of methods with three phases: train (and learn gates) for `cotrain` rounds, cut channels once, fine-tune the smaller network.

    Gives the fields, the learning rate of each phase, local training under gates, and the values after the cut.
    """

    cotrain: int | None = None  # rounds before the cut, warm-up included; None: half of all rounds. [train] schedules these
    finetune_lr: float | None = None  # learning rate after the cut; None: train.lr
    finetune_schedule: Literal["constant", "cosine", "step"] = "cosine"  # over the rounds after the cut
    finetune_warmup: int = 0  # rounds after the cut in which its learning rate rises
    weights: Literal["uniform", "samples"] = "uniform"  # how the clients' weights are averaged
    momentum: Literal["averaged", "reset"] = "averaged"  # averaged with the weights; reset: from 0 in every round, as Adam's moments
    norm_over: Literal["kept", "all"] = "kept"  # channels a norm sees under a gate; all: masked dense, FLOPs counted as if saved
    fold_ws: bool = False  # with norm_over = "all": filters are standardised before the cut and stored so

    def __post_init__(self) -> None:
        within(self, cotrain=(1, inf), finetune_lr=(0, inf), finetune_warmup=(0, inf))
        if self.fold_ws and self.norm_over == "kept":
            raise BadInput('[method] fold_ws = true needs norm_over = "all"; over the kept channels filters keep their statistics anyway')

    def cut_after(self, setting: Setting) -> int:
        """The round that ends with the cut."""
        return self.cotrain or max(1, setting.rounds // 2)

    def rate(self, setting: Setting, r: int) -> LocalOptimizer:
        """The local optimiser's numbers in round `r`: either phase has its own schedule."""
        last = self.cut_after(setting)
        if r <= last:
            return replace(setting.train, rounds=last).at(r)
        after = replace(setting.train, rounds=setting.rounds - last, schedule=self.finetune_schedule)
        rate = replace(after, lr=setting.train.lr if self.finetune_lr is None else self.finetune_lr).at(r - last)
        return replace(rate, lr=rate.lr * min(1.0, (r - last) / (self.finetune_warmup + 1)))

    def training(self, setting: Setting, r: int) -> TrainGated:
        """The job's local training in round `r`, under the gates that the client is sent."""
        rate = self.rate(setting, r)
        carried = self.momentum == "averaged" and rate.optimiser == "sgd" and rate.momentum > 0
        return TrainGated.at(setting, r, rate, uniform=self.weights == "uniform", carried=carried, norm_over=self.norm_over)

    def cut(self, setting: Setting, shared: Tree, kept: Tree) -> Tree:
        """The values of the smaller network, of an optimiser that has taken no step."""
        held = under(setting.net.folded(shared) if self.fold_ws else shared, keys.WEIGHTS, keys.BUFFERS, keys.MASKS)
        return setting.net.compact(held, kept, removed=self.norm_over == "kept")

    def begun(self, setting: Setting, before: State, after: State, kept: Tree) -> State:
        """The state `after` the cut to the `kept` channels. Where all are kept the aggregation goes on: its clients cannot see a cut."""
        whole = sum(map(len, kept.values())) == setting.net.channels.n
        return replace(after, memory=before.memory) if whole else after

    def check(self, setting: Setting) -> None:
        """BadInput for a job whose rounds are too few, or whose model has no channels to cut, or gates of its own."""
        if setting.net.has_dynamic_gates:
            raise BadInput(
                "[model] gate_keep gives the model dynamic gates, which choose channels anew for every image; this method removes"
                " channels for good: leave gate_keep out"
            )
        if self.cut_after(setting) > setting.rounds:
            raise BadInput(f"[method] cotrain = {self.cotrain}: the cut comes after the last of {setting.rounds} rounds")
        try:
            _ = setting.net.channels
        except ValueError as error:
            raise BadInput(f"[model] {error}") from error


def all_seen(setting: Setting, fleet: Fleet, rounds: Iterable[int]) -> None:
    """BadInput where clients with images are in no cohort of these rounds."""
    missing = set(fleet.pick(None, 0)) - {client for r in rounds for client in fleet.pick(setting.cohort, r)}
    if missing:
        raise BadInput(
            f"{len(missing):,} of {setting.clients:,} clients (the first: {min(missing)}) are in no cohort while masks are learned:"
            ' sub-networks of untrained embeddings. Take a larger cohort.size, more rounds, or unseen_clients = "accept"'
        )


def held_out_accuracy(method: Any, feed: Feed, fleet: Fleet, judges: list[int], model: tuple[Tree, Tree, Net | None]) -> float:
    """Share of the judges' images of the feed's split that a deployed model classifies rightly, as they use it."""
    shared, own, net = model
    every = replace(feed, steps=0, epochs=1, augment=False, cost="forward")
    total = fleet.run(Loss((every,), method=method), judges, shared, own, net).total
    return float(total[CORRECT] / total[COUNT].clamp(min=1))
