"""One averaged round: who takes part, what is recorded, and what the server knows afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from small_federation import FLEETS, drawn, stored, world

from fedsim.core.tree import Tree
from fedsim.federated.averaged_round import AveragedState, averaged_round, trained
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Report
from fedsim.nn.net import Net


@dataclass(frozen=True)
class Counting(AveragedState):
    rounds: int = 0


@pytest.mark.parametrize("kind", FLEETS)
def test_the_cohort_of_the_round_takes_part(kind) -> None:
    made = world(stored(*drawn([4, 4, 4, 4, 4, 4])), kind=kind)
    setting = replace(made.setting, cohort=2)
    state = AveragedState.begin(setting, setting.net.initial)
    assert averaged_round(setting, made.fleet, state, 0) == (state, {})
    for r in (1, 2, 3, 4):
        made.fleet.open(r)
        state, columns = averaged_round(setting, made.fleet, state, r)
        assert columns == {"lr": setting.train.at(r).lr}
    assert [seen.clients for seen in made.seen] == [made.fleet.pick(2, r) for r in (1, 2, 3, 4)]
    assert len({tuple(seen.clients) for seen in made.seen}) > 1


@dataclass(frozen=True)
class WithMomentum(Train):
    """It hands its momentum over as well."""

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        moved = {key: sent.n.double() * value.double() for key, value in state.items() if key.startswith("opt/momentum/")}
        return replace(report, total=report.total | moved, each={key: value for key, value in state.items() if key in moved})


def test_momentum_that_a_work_sums_is_averaged_and_fields_of_the_state_stay() -> None:
    made = world(stored(*drawn([4, 8])))
    state = Counting.begin(made.setting, made.setting.net.initial, rounds=7)
    made.fleet.open(1)
    after, reply = trained(made.setting, made.fleet, state, 1, WithMomentum.at(made.setting, 1, momentum=0.9))
    assert after.rounds == 7
    momentum = {key: value for key, value in after.shared.items() if key.startswith("opt/momentum/")}
    assert momentum
    for key, value in momentum.items():
        mean = (4 * reply.each[key][0].double() + 8 * reply.each[key][1].double()) / 12
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-9)
    plain, _ = trained(made.setting, made.fleet, state, 1, Train.at(made.setting, 1, momentum=0.9))
    assert plain.shared.keys() == made.setting.net.initial.keys()
