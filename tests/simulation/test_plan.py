"""How candidates are compared: seconds are given here, for a test that measures them says nothing twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_job import FAKE, SMALL

from fedsim.config.job import check
from fedsim.errors import ClientFault
from fedsim.fleet.plan import Plan
from fedsim.methods.fedavg import FedAvg
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.planning import plan
from fedsim.storage import reader

ALL: Any = SimpleNamespace()


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], candidates: list[Plan]) -> tuple[Plan, list[int]]:
    """The fastest of the candidates when packs take so many seconds a client, and the packs that were tried."""
    tried: list[int] = []

    def given(parts: Any, candidate: Plan, load: Any) -> float:
        tried.append(candidate.packs)
        if seconds[candidate.packs] == float("inf"):
            raise ClientFault("out of memory") from torch.OutOfMemoryError()
        return seconds[candidate.packs]

    monkeypatch.setattr(plan, "seconds", given)
    return plan.fastest(ALL, candidates, ALL), tried


def test_packs_of_a_program_grow_until_that_pays_no_more(monkeypatch) -> None:
    plans = [Plan("cuda_graph", packs) for packs in (32, 16, 8, 4)]
    assert chosen(monkeypatch, {32: 3.0, 16: 1.0, 8: 2.0, 4: 0.5}, plans) == (plans[1], [32, 16, 8])


def test_packs_of_a_program_grow_until_memory_is_out(monkeypatch) -> None:
    plans = [Plan("cuda_graph", packs) for packs in (32, 16, 8, 4)]
    assert chosen(monkeypatch, {32: 3.0, 16: 1.0, 8: float("inf"), 4: 0.5}, plans) == (plans[1], [32, 16, 8])


def test_every_other_candidate_is_tried(monkeypatch) -> None:
    plans = [Plan("packed", packs) for packs in (16, 8, 4)]
    assert chosen(monkeypatch, {16: 1.0, 8: 2.0, 4: 0.5}, plans) == (plans[2], [16, 8, 4])


def test_another_fault_of_a_client_is_not_hidden(monkeypatch) -> None:
    def broken(*_: Any) -> float:
        raise ClientFault("a mask is no mask")

    monkeypatch.setattr(plan, "seconds", broken)
    with pytest.raises(ClientFault, match="no mask"):
        plan.fastest(ALL, [Plan()], ALL)


@dataclass(frozen=True)
class Half(FedAvg):
    density: Any = 0.5


@pytest.mark.parametrize(("density", "masked"), [(0.5, True), (1.0, False), (None, False), ((0.5, 0.2), False)])
def test_a_density_that_is_one_number_is_tried_with_masks(density: Any, masked: bool) -> None:
    """A method that prunes later is timed as it will be; one with a density for each layer says nothing of the whole."""
    parts = replace(build_experiment(check({**SMALL, "data": FAKE})), method=Half(density))
    shared = plan.Load.of(parts, None).shared
    assert any(key.startswith("mask/") for key in shared) == masked


@pytest.mark.parametrize("fleet", ["serial", "packed", "cuda_graph"])
def test_packs_are_counted_in_whole_numbers_and_read_back_as_such(fleet: str) -> None:
    """With a point they are as many; a run file whose plan had 1.0 packs was called damaged."""
    parts = build_experiment(check(SMALL | {"execution": {"fleet": fleet, "plan": "auto", "device": "cpu"}}))
    plans = list(plan._candidates(parts))
    assert {each.fleet for each in plans} == {fleet}
    for each in plans:
        text = each.text()
        pointed = text.replace(f'"packs": {each.packs}', f'"packs": {each.packs}.0')
        assert pointed != text
        for written in (text, pointed):
            assert Plan.of(written) == each
            assert [type(value) for value in (Plan.of(written).packs, reader._plan({"plan": written})["packs"])] == [int, int]
