"""Fine-tuning: what devices of their own networks are judged against: one dense model, which each client trains further by itself.

FedAvg: McMahan et al., AISTATS 2017, arXiv:1602.05629. That a client's own steps from the averaged model personalise it: Yu, Bagdasaryan,
Shmatikov, "Salvaging Federated Learning by Local Adaptation", arXiv:2002.04758 (their "fine-tuning").

Paper -> code:  the averaged model -> state.shared,  epochs of adaptation -> epochs,  their rate -> lr,  a client's model -> own/w/

All rounds are FedAvg's, under any aggregation. After the last round every client with images trains its copy of the model, which no
server sees. Accuracy on the clients' images is that of these copies, accuracy on the global test set that of the averaged model; what
this one comes to on the clients' images is recorded beside it. With `model.match` all this is done with the small dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from fedsim.core.tree import Tree
from fedsim.core.validation import TINY, within
from fedsim.federated import personal_model
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.personal_model import TrainPersonal
from fedsim.federated.protocol import ClientInput, Fleet, Method, Setting
from fedsim.methods.fedavg import FedAvg
from fedsim.nn.net import Net


@dataclass(frozen=True)
class FineTune(FedAvg):
    """Dense federated averaging, after which each client fine-tunes a copy of the model on its own training images."""

    epochs: int = 1  # of a client over its own images after the last round
    lr: float | None = None  # eta of these epochs; None: that of the last round

    def __post_init__(self) -> None:
        within(self, epochs=(1, inf), lr=(TINY, inf))

    @property
    def stays(self) -> str:
        return "weights"

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        state, columns = super().round(setting, state, fleet, r)
        if r == setting.rounds:
            last = setting.train.at(r)
            rate = last if self.lr is None else replace(last, lr=self.lr)
            personal_model.by_all(setting, fleet, TrainPersonal.after(setting, self.epochs, rate), state.shared)
        return state, columns

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        held = sent.tree({})
        return held | personal_model.personal(held)

    def variants(self) -> Mapping[str, Method[Any]]:
        """The averaged model, evaluated on the clients' images too."""
        return {"averaged": FedAvg()}
