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
from fedsim.federated.averaged_round import AveragedState, averaged_round
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net


@dataclass(frozen=True)
class FedAvg(Method[AveragedState]):
    """Averages what a cohort trained, round after round; no hyperparameters of its own."""

    follows_rounds = False
    asynchronous = True

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        return AveragedState.begin(setting, setting.net.initial)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        return averaged_round(setting, fleet, state, r)

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        return {} if r > 0 else None

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None
