"""One round of averaged local training under the job's aggregation: FedAvg, FedProx, FedNova or SCAFFOLD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from fedsim.core import keys
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import Fleet, Reply, Setting
from fedsim.nn.net import Net


@dataclass(frozen=True)
class AveragedState:
    """The server's state of a method that averages. A method that knows more adds fields in a subclass.

    >>> @dataclass(frozen=True)
    ... class Counting(AveragedState):
    ...     rounds: int = 0
    >>> Counting({}, {}).rounds
    0
    """

    shared: Tree  # the broadcast: weights, running statistics, and masks where the method has some
    memory: Tree  # of the aggregation, such as SCAFFOLD's control variate

    @classmethod
    def begin(cls, setting: Setting, shared: Tree, **own: Any) -> Self:
        """The state before the first round, whose broadcast is `shared`. own: fields of a subclass, by name."""
        return cls(shared, setting.aggregate.init_memory(setting.net.trained(shared)), **own)


State = TypeVar("State", bound=AveragedState)


def trained(
    setting: Setting,
    fleet: Fleet,
    state: State,
    r: int,
    work: Train,
    own: Tree | None = None,
    net: Net | None = None,
) -> tuple[State, Reply]:
    """The state after a cohort has carried out `work` and its results are averaged, and all that the clients handed back.

    Where the work sums its momentum (`pruning.gated_training.TrainGated`), the broadcast gets the clients' mean momentum as well.
    own: (K, …) rows for the clients of the cohort; net: the network after a permanent cut.
    """
    sent = setting.aggregate.shared(state.memory, state.shared)
    reply = fleet.run(work, fleet.pick(setting.cohort, r), sent, own, net)
    shared, memory = setting.aggregate.server(state.memory, state.shared, reply.total, setting)
    return replace(state, shared=shared | _mean_momentum(state.shared, reply), memory=memory), reply


def _mean_momentum(shared: Tree, reply: Reply) -> Tree:
    """The momentum of each weight, averaged with the same weights as its sum; empty where the work sums none."""
    moved = under(reply.total, keys.MOMENTUM)
    return {key: (value / reply.total[COUNT]).to(shared[keys.weight_of(key)].dtype) for key, value in moved.items()}


def averaged_round(setting: Setting, fleet: Fleet, state: State, r: int, work: Train | None = None) -> tuple[State, dict[str, float]]:
    """What `Method.round` returns for a method that averages: the state after round `r`, and the learning rate as a column.

    work: what the cohort of the round does; the job's local training by default. Round 0 precedes training and changes nothing.

    >>> from fedsim import load_job
    >>> from fedsim.simulation.experiment import build_experiment
    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 80, "test_images": 20}
    >>> job = load_job({"data": data, "partition": {"clients": 4}, "method": {"name": "fedavg"}})
    >>> setting = build_experiment(job).setting
    >>> begin = AveragedState.begin(setting, setting.net.initial)
    >>> averaged_round(setting, None, begin, r=0) == (begin, {})
    True
    """
    if r == 0:
        return state, {}
    work = work or Train.at(setting, r)
    return trained(setting, fleet, state, r, work)[0], {"lr": work.lr}
