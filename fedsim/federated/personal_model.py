"""A model that a client trains further for its own use, after the last round. It stays with the client, under "own/w/…" and "own/buf/…"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedsim.core import keys
from fedsim.core.tree import Tree, renamed, under
from fedsim.core.types import Feed, LocalOptimizer
from fedsim.core.validation import MAX_COHORT
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Report, Setting, Work

if TYPE_CHECKING:
    from fedsim.nn.net import Net


@dataclass(frozen=True)
class TrainPersonal(Train):
    """Local training whose result is not averaged but kept: the client's own model. total: its number of images alone.

    The aggregation adds nothing to the local loss or steps.
    """

    deployment_only: bool = True

    @classmethod
    def after(cls, setting: Setting, epochs: int, rate: LocalOptimizer | None = None) -> TrainPersonal:
        """So many epochs after the last round; rate: the local optimiser, by default that of the last round."""
        return cls.at(setting, setting.rounds, rate, feeds=(feed(setting, epochs),), aggregate=FedAvg())

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({keys.COUNT: sent.n.double()}, keep=kept(state))


def feed(setting: Setting, epochs: int) -> Feed:
    """The job's local training, but for its length."""
    return replace(setting.train.feed(), steps=0, epochs=epochs)


def kept(state: Tree) -> Tree:
    """What a client keeps of the model that it has trained; empty where `state` has none."""
    return {keys.OWN + key: value for key, value in under(state, keys.WEIGHTS, keys.BUFFERS).items()}


def personal(held: Tree) -> Tree:
    """The "w/" and "buf/" that a client has trained for its own use; empty where it has not."""
    return renamed(held, keys.OWN + keys.WEIGHTS, keys.WEIGHTS) | renamed(held, keys.OWN + keys.BUFFERS, keys.BUFFERS)


def by_all(setting: Setting, fleet: Fleet, work: Work, sent: Tree) -> Tree:
    """Every client with images carries out `work` after the last round; the total of all."""
    clients = fleet.pick(None, setting.rounds)
    totals = [fleet.run(work, clients[begin : begin + MAX_COHORT], sent).total for begin in range(0, len(clients), MAX_COHORT)]
    return {key: torch.stack([part[key] for part in totals]).sum(0) for key in totals[0]}
