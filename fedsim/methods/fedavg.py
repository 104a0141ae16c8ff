"""FedAvg: McMahan et al., AISTATS 2017, arXiv:1602.05629. Dense federated averaging, the reference of every pruning method.

Paper -> code:  w -> w,  K -> clients,  C·K -> cohort,  E -> train.epochs,  B -> train.batch,  eta -> train.lr

The paper divides by the images of all clients; like every code base we divide by those of the cohort. With
`train.aggregate = "fedprox"`, "fednova" or "scaffold" the same file is FedProx, FedNova or SCAFFOLD; with `model.match` it trains the
small dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.core.tree import Tree
from fedsim.core.types import Data
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net


@dataclass(frozen=True)
class State:
    shared: Tree  # the broadcast: w, running statistics
    memory: Tree  # of the aggregation


@dataclass(frozen=True)
class FedAvg(Method[State]):
    """Averages what a cohort trained, round after round; no hyperparameters of its own."""

    def init(self, setting: Setting, public: Data | None) -> State:
        shared = setting.net.initial
        return State(shared, setting.aggregate.init_memory(shared))

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        work = Train.at(setting, r)
        reply = fleet.run(work, fleet.pick(setting.cohort, r), setting.aggregate.shared(state.memory, state.shared))
        return State(*setting.aggregate.server(state.memory, state.shared, reply.total, setting)), {"lr": work.lr}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None
