"""What `fedsim estimate` foresees of every method: that one client stands for all alike, and rounds are not played, changes no figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TABLE, table

from fedsim.config import job
from fedsim.core import keys
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg as AverageOfWeights
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
    played = [r for r in range(1, 12) if estimate.recorded(parts.method, parts.setting, r) is None]
    assert played == {"fedtiny": [1, 2, 3, 4], "fedmef": [1, 2, 3, 4], "rigl": [1, 2, 3, 4]}.get(name, [])


def test_what_a_method_says_of_its_rounds_holds_for_itself_and_known_aggregations(folder: Path) -> None:
    class Other(FedAvg):
        """Its rounds may do more."""

    class Mine(AverageOfWeights):
        """Its server may do more."""

    setting = build_experiment(job.check(table("fedavg", "serial", folder))).setting
    assert estimate.recorded(FedAvg(), setting, 1) == {}
    assert estimate.recorded(FedAvg(), setting, 0) is None
    assert estimate.recorded(Other(), setting, 1) is None
    assert estimate.recorded(FedAvg(), replace(setting, aggregate=Mine()), 1) is None


def test_pretraining_is_left_out_only_where_it_changes_no_cost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are ranked together by what the server has learnt: it decides what each of them keeps."""
    fields = {"name": "magnitude", "density": 0.3, "scope": "global", "pretrain_epochs": 2}
    seen = figures("at-init-magnitude", folder, method=fields)
    monkeypatch.setattr(estimate, "replace", lambda setting, **change: setting)  # as a run has it
    assert seen == figures("at-init-magnitude", folder, method=fields)


@pytest.mark.parametrize("name", ["fedavg", "rigl", "fedtiny", "at-init-synflow"])
def test_rows_have_the_columns_and_rates_that_played_ones_have(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cohorts of all clients in a row cost the same; each row is one of its own."""
    train = table(name, "serial", folder)["train"] | {"schedule": "cosine"}
    parts = build_experiment(job.check(table(name, "serial", folder) | {"rounds": 7, "train": train}))
    rows = [row.values for row in estimate.rows(parts)]
    assert len({id(row) for row in rows}) == 8
    monkeypatch.setattr(estimate, "AveragedState", ())
    played = [row.values for row in estimate.rows(parts)]
    assert [(row.keys(), row.get("lr")) for row in rows] == [(row.keys(), row.get("lr")) for row in played]


def test_a_cohort_that_comes_again_pays_for_no_mask_again(folder: Path) -> None:
    """Whichever clients are drawn: masks are sent once to each, and the first weights in every round."""
    for seed in range(6):
        change = {"cohort": {"size": 2}, "seed": seed, "rounds": 12}
        short = figures("at-init-random", folder, **change)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimate, "AveragedState", ())
            assert short == figures("at-init-random", folder, **change), seed


def test_a_state_that_a_method_changes_in_place_is_looked_at_anew(folder: Path) -> None:
    """Round 2 prunes the tensors of the state it was given; what is sent after it is smaller."""

    @dataclass(frozen=True)
    class InPlace(FedAvg):
        def round(self, setting, state, fleet, r):
            if r == 2:
                for layer in setting.net.maskable:
                    state.shared[keys.mask(layer)] = torch.zeros_like(state.shared[keys.weight(layer)], dtype=torch.bool)
                    state.shared[keys.mask(layer)].view(-1)[:3] = True
            return state, {"lr": 0.05}

        def plain(self, setting, r):
            return None if r in (0, 2) else {}

    parts = replace(build_experiment(job.check(table("fedavg", "serial", folder) | {"rounds": 4})), method=InPlace())
    up = [row.values["bytes_up"] for row in estimate.rows(parts)]
    assert up[1] > up[3] == up[4] > 0
