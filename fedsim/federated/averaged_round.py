"""One round of averaged local training under the job's aggregation: FedAvg, FedProx, FedNova or SCAFFOLD."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.tree import Tree
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import Fleet, Reply, Setting


@dataclass(frozen=True)
class AveragedState:
    """The server's state of a method that averages."""

    shared: Tree  # the broadcast: weights, running statistics, and masks where the method has some
    memory: Tree  # of the aggregation, such as SCAFFOLD's control variate

    @classmethod
    def begin(cls, setting: Setting, shared: Tree) -> AveragedState:
        """The state before the first round, whose broadcast is `shared`."""
        return cls(shared, setting.aggregate.init_memory(shared))


def trained(setting: Setting, fleet: Fleet, state: AveragedState, r: int, work: Train) -> tuple[AveragedState, Reply]:
    """The state after a cohort has carried out `work` and its results are averaged, and all that the clients handed back."""
    sent = setting.aggregate.shared(state.memory, state.shared)
    reply = fleet.run(work, fleet.pick(setting.cohort, r), sent)
    return AveragedState(*setting.aggregate.server(state.memory, state.shared, reply.total, setting)), reply


def averaged_round(
    setting: Setting, fleet: Fleet, state: AveragedState, r: int, work: Train | None = None
) -> tuple[AveragedState, dict[str, float]]:
    """What `Method.round` returns for a method that averages: the state after round `r`, and the learning rate as a column.

    work: what the cohort of the round does; the job's local training by default. Round 0 precedes training and changes nothing.
    """
    if r == 0:
        return state, {}
    work = work or Train.at(setting, r)
    return trained(setting, fleet, state, r, work)[0], {"lr": work.lr}
