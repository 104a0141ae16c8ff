"""A user's own methods, as they would stand beside the job: one that uses all a checkpoint must hold, and what goes wrong."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core import rng
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Report, Setting
from fedsim.methods.fedavg import FedAvg
from fedsim.nn.net import Net


@dataclass(frozen=True)
class TrainHead(Train):
    """Local training with a last layer that never leaves the client."""

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return {"w/fc2.weight": sent.shared["w/fc2.weight"]}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return replace(super().finish(net, sent, state), keep=under(state, "w/fc2.weight"))


@dataclass(frozen=True)
class Lasting(FedAvg):
    """Personal last layers, and a mask that is drawn anew every other round. Round HOLD_ROUND, of the environment, never ends."""

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r % 2 == 0:
            state = replace(state, shared=_masked(state.shared, r))
        if r == 0:
            return state, {}
        train = Train.at(setting, r)
        work = TrainHead(train.feeds, train.lr, train.momentum, train.decay, train.aggregate)
        cohort = fleet.pick(setting.cohort, r)
        while os.environ.get("SLEEP_ROUND") == str(r):  # a pack that lasts and lasts
            time.sleep(0.05)
        while os.environ.get("HOLD_ROUND") == str(r):  # clients work on until a test stops or kills the run: it cannot come too late
            fleet.run(work, cohort, state.shared)
        reply = fleet.run(work, cohort, state.shared)
        return AveragedState(*setting.aggregate.server(state.memory, state.shared, reply.total, setting)), {}


def _masked(shared: Tree, r: int) -> Tree:
    w = shared["w/fc1.weight"]
    mask = rng.uniform(rng.key(r), w.numel()).view(w.shape) < 0.5
    return shared | {"w/fc1.weight": w * mask, "mask/fc1.weight": mask}


@dataclass(frozen=True)
class Boom(Train):
    """Local training that fails in client 5's second step of round 3."""

    r: int = 0

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        if self.r == 3 and sent.own["n/client"] == 5 and batch.t == 1:
            raise ValueError("this is not what I wanted")
        return super().step(net, sent, state, batch)


@dataclass(frozen=True)
class Lost(Train):
    """Local training whose loss is no number for client 5 in round 3."""

    r: int = 0

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        state, loss = super().step(net, sent, state, batch)
        return state, torch.where((sent.own["n/client"] == 5) & (batch.t == 1), loss * (float("nan") if self.r == 3 else 1.0), loss)


@dataclass(frozen=True)
class Garbled(Train):
    """Local training that reports what no rank can send."""

    r: int = 0

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        return replace(report, each={"n/none": None}) if self.r == 3 else report  # type: ignore[dict-item]


class Heavy(nn.Sequential):
    """A model that fits into the memory of every rank but the second."""

    def named_parameters(self, *arguments: Any, **named: Any) -> Any:
        if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
            raise LookupError("only on this rank")
        return super().named_parameters(*arguments, **named)


def heavy(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Heavy(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


@dataclass(frozen=True)
class Faulty(FedAvg):
    """Goes wrong in round 3."""

    where: str = "step"  # step | loss | report | round

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 3 and self.where == "round":
            raise KeyError("the line of the user")
        if r == 0:
            return state, {}
        train = Train.at(setting, r)
        made = {"step": Boom, "loss": Lost, "report": Garbled, "round": Train}[self.where]
        work = made(train.feeds, train.lr, train.momentum, train.decay, train.aggregate, **({"r": r} if made is not Train else {}))
        cohort = fleet.pick(setting.cohort, r)
        reply = fleet.run(work, cohort, state.shared, {"n/client": torch.tensor(cohort)})
        return AveragedState(*setting.aggregate.server(state.memory, state.shared, reply.total, setting)), {}
