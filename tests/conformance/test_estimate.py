"""What `fedsim estimate` foresees of every method: that one client stands for all alike, and rounds are not played, changes no figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import TABLE, table

from fedsim.config import job
from fedsim.errors import BadInput
from fedsim.methods.fedavg import FedAvg
from fedsim.simulation import estimate
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.planning.idle_fleet import IdleFleet

NAMES = [name for name, case in TABLE.items() if not case.devices]
COSTS = ("bytes_up", "bytes_down", "train_flops", "extra_flops", "max_client_flops", "max_client_flops_at_mean", "max_client_memory")
COSTS += ("density", "server_flops", "inference_flops", "max_client_model_memory", "memory_activations")


def figures(name: str, folder: Path, **change: Any) -> list[dict[str, float]] | str:
    """The rows of 7 rounds of a line of the table; why it cannot be estimated, where a method needs trained clients."""
    parts = build_experiment(job.check(table(name, "serial", folder) | {"rounds": 7} | change))
    try:
        rows = list(estimate.rows(parts))
    except BadInput as error:
        return str(error)
    return [{cost: row.values.get(cost, 0.0) for cost in COSTS} | {"layers": row.layers["density"].tolist()} for row in rows]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_played_costs_as_much(name: str, size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every client of every round, one by one."""
    short = figures(name, folder, cohort={"size": size})
    monkeypatch.setattr(estimate, "OneForAllFleet", IdleFleet)
    monkeypatch.setattr(estimate, "AveragedState", ())  # no round is plain
    assert short == figures(name, folder, cohort={"size": size})


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedtiny", "fedmef", "rigl", "at-init-synflow"])
def test_rounds_of_averaged_training_are_not_played(name: str, folder: Path) -> None:
    parts = build_experiment(job.check(table(name, "serial", folder)))
    played = [r for r in range(1, 12) if not estimate.is_plain(parts.method, parts.setting, r)]
    assert played == {"fedtiny": [1, 2, 3, 4], "fedmef": [1, 2, 3, 4], "rigl": [1, 2, 3, 4]}.get(name, [])


def test_a_method_with_rounds_of_its_own_does_not_inherit_that_they_are_plain(folder: Path) -> None:
    class Other(FedAvg):
        def round(self, setting, state, fleet, r):
            return super().round(setting, state, fleet, r)

    setting = build_experiment(job.check(table("fedavg", "serial", folder))).setting
    assert estimate.is_plain(FedAvg(), setting, 1)
    assert not estimate.is_plain(Other(), setting, 1)
    assert not estimate.is_plain(FedAvg(), setting, 0)
