"""The server's bill: what may be charged, and what is on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from small_federation import drawn, stored, world

from fedsim.core.tree import Tree
from fedsim.costs.server import ServerBill
from fedsim.federated import verbs
from fedsim.federated.averaged_round import AveragedState, averaged_round
from fedsim.federated.protocol import Method


@pytest.mark.parametrize(("what", "flops", "said"), [("a/b", 1, "'a/b'; the name must be letters"), ("scores", -1, "-1 FLOPs for scores")])
def test_a_wrong_charge_is_reported(what, flops, said) -> None:
    with pytest.raises(ValueError, match=said):
        ServerBill().charge(what, flops)


@dataclass(frozen=True)
class Scoring(Method[AveragedState]):
    """It computes on the server in each of its verbs."""

    def init(self, setting: Any, public: Any) -> AveragedState:
        setting.server.charge("scores", 1_000)
        return AveragedState.begin(setting, setting.net.initial)

    def round(self, setting: Any, state: AveragedState, fleet: Any, r: int) -> tuple[AveragedState, dict[str, float]]:
        setting.server.charge("scores", 10 * r)
        setting.server.charge("other", 5 * r)
        return averaged_round(setting, fleet, state, r)

    def deploy(self, setting: Any, state: AveragedState, fleet: Any, cohort: Any) -> tuple[Tree, Tree, None]:
        setting.server.charge("scores", 7)
        return state.shared, {}, None


def test_init_is_in_round_0_and_deploy_on_no_bill() -> None:
    made, method = world(stored(*drawn([3, 4]))), Scoring()
    state, rows = verbs.init(method, made.setting, None), []
    for r in range(3):
        verbs.deploy(method, made.setting, state, made.fleet, [])
        made.fleet.open(r)
        state, found = verbs.round(method, made.setting, state, made.fleet, r)
        rows.append({name: value for name, value in found.items() if name.startswith("server")})
    assert rows[0] == {"server_flops": 1_000, "server_flops_scores": 1_000}
    assert rows[1:] == [{"server_flops": 15 * r, "server_flops_scores": 10 * r, "server_flops_other": 5 * r} for r in (1, 2)]
