"""A run that was stopped and resumed is a run that was never stopped; what a checkpoint holds, and for whom."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cases import FLEETS, ROUNDS, SIZES, TABLE, run, table
from run_files import assert_same, sha

from fedsim.errors import BadInput
from fedsim.storage import checkpoint
from fedsim.storage.reader import RunReader

ON_BOTH = ("keeper", "adp-options", "dwfnp")  # kept states, state of clients, a cut net: what a fleet hands back differs most


def lines() -> list[Any]:
    """(method, fleet): each method on one fleet, in turn, and ON_BOTH on both; with the marker full, all on both."""
    every = [(name, fleet, place) for place, name in enumerate(TABLE) for fleet in FLEETS]
    return [
        pytest.param(name, fleet, marks=() if fleet == FLEETS[place % 2] or name in ON_BOTH else pytest.mark.full)
        for name, fleet, place in every
    ]


@pytest.mark.parametrize(("name", "fleet"), lines())
def test_stopped_and_resumed_is_never_stopped(name, fleet, alone, folder, tmp_path) -> None:
    """Stopped at the 5th question whether to stop, which comes before a pack of round 1 or 2; then, resumed, at the 6th."""
    out = tmp_path / "run.h5"
    for after in (5, 6):
        asked = iter(range(1000))
        assert run(name, fleet, folder, out, stopped=lambda asked=asked, after=after: next(asked) >= after) == 3
    assert RunReader(out).rounds < ROUNDS
    assert run(name, fleet, folder, out) == 0
    assert_same(out, alone[name, fleet])


def test_a_checkpoint_rewrites_the_kept_states_of_its_round_alone(alone) -> None:
    path = alone["keeper", "serial"]
    manifest = json.loads(max(checkpoint.folder_of(path).glob("*.json")).read_text())["manifest"]
    took = np.flatnonzero(RunReader(path).clients("in_cohort", ROUNDS) == 1)
    assert manifest["kept"][f"{ROUNDS:06d}.kept.safetensors"] == took.tolist()
    assert len(took) < len(SIZES)


def test_a_run_does_not_go_on_from_another_jobs_checkpoint(folder, tmp_path, capsys) -> None:
    """Nor under another plan unsaid."""
    out, asked = tmp_path / "run.h5", iter(range(1000))
    assert run("fedavg", "serial", folder, out, lambda: next(asked) >= 17) == 3
    assert run("fedavg", "serial", folder, out, lambda: True, change={"execution": {"plan": "reference", "fleet": "packed"}}) == 3
    assert "fleet packed (plan: serial)" in capsys.readouterr().out
    found = checkpoint.latest(checkpoint.folder_of(out))
    checkpoint.save(checkpoint.folder_of(out), found.round, found.state, found.extra | {"job_sha256": "another's"})
    with pytest.raises(BadInput, match="are not of the run in"):
        run("fedavg", "serial", folder, out)


@pytest.mark.parametrize("fleet", FLEETS)
def test_kept_state_comes_back_at_the_next_visit(fleet, alone) -> None:
    """Every client counts its own visits in what it keeps."""
    reader = RunReader(alone["keeper", fleet])
    took = reader.clients("in_cohort") == 1
    for r in range(1, ROUNDS + 1):
        assert reader.column("visits")[r] == took[1 : r + 1].sum(0)[took[r]].sum()


def test_kept_states_of_rounds_without_a_checkpoint_are_in_the_next(alone, folder, tmp_path) -> None:
    out, name = tmp_path / "run.h5", ("keeper", "serial")
    seldom = {"execution": table(*name, folder)["execution"] | {"checkpoint_every": 2}}
    asked = iter(range(1000))
    assert run(*name, folder, out, lambda: next(asked) >= 27, change=seldom) == 3
    assert RunReader(out).rounds == 2
    assert run(*name, folder, out, change=seldom) == 0
    assert sha(out) == sha(alone[name])
