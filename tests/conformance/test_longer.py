"""A finished run that is extended is the longer run to the last bit, and what would not be it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import ROUNDS, TABLE, table
from rich.console import Console
from run_files import assert_same

from fedsim.config.job import check
from fedsim.config.method_registry import find
from fedsim.errors import BadInput
from fedsim.simulation import launch
from fedsim.storage import checkpoint
from fedsim.storage.doctor.command import doctor
from fedsim.storage.reader import RunReader

MORE = ROUNDS + 2
OFTEN = ("fedavg", "scaffold", "fedtiny", "at-init-magnitude")


def lines() -> list[Any]:
    steady = [name for name, case in TABLE.items() if vars(find(case.method)).get("follows_rounds", True) is False]
    assert {*OFTEN, "fedmef", "rigl", "fedrts"} <= {*steady}
    return [pytest.param(name, marks=() if name in OFTEN else pytest.mark.full) for name in steady]


def made(name: str, folder: Path, out: Path, rounds: int, first: Path | None = None, **changed: Any) -> Path:
    assert launch.main(check(table(name, "serial", folder) | {"rounds": rounds} | changed), out, "auto", first=first) == 0
    return out


@pytest.mark.parametrize("name", lines())
def test_an_extended_run_is_the_longer_run(name, alone, folder, tmp_path) -> None:
    first = alone[name, "serial"]
    before = first.read_bytes()
    longer = made(name, folder, tmp_path / "longer.h5", MORE, first)
    assert_same(longer, made(name, folder, tmp_path / "whole.h5", MORE))
    assert first.read_bytes() == before
    assert RunReader(longer).attributes["rounds_planned"] == MORE
    assert doctor(longer, False, Console()) == 0
    assert made(name, folder, longer, MORE, first) == longer  # the same command again: it is finished


def test_a_run_that_is_extended_may_be_killed_at_its_beginning(folder, alone, tmp_path) -> None:
    """Its checkpoints are there, and the file is not."""
    first, out = alone["scaffold", "serial"], tmp_path / "longer.h5"
    made("scaffold", folder, out, MORE, first)
    out.rename(tmp_path / "gone.h5")
    assert_same(made("scaffold", folder, out, MORE, first), tmp_path / "gone.h5")


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("feddip", {}, "rounds of method feddip may depend on how many there are"),
        (
            "fedavg",
            {"seed": 7},
            r"goes on with the same job and more rounds, and here is another \(there rounds = 3, here 5, there seed = 0",
        ),
        ("fedavg", {"rounds": ROUNDS}, rf"and here is another \(both have {ROUNDS} rounds\)"),
        ("fedavg", {"rounds": ROUNDS - 1}, r"and here is another \(there rounds = 3, here 2\)"),
    ],
)
def test_what_is_another_run_is_refused(name, changed, reason, alone, folder, tmp_path) -> None:
    with pytest.raises(BadInput, match=reason):
        launch.main(
            check(table(name, "serial", folder) | {"rounds": MORE} | changed), tmp_path / "a.h5", "auto", first=alone[name, "serial"]
        )
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_that_follows_the_rounds_is_refused(folder, tmp_path) -> None:
    cosine = {"train": {"epochs": 1, "batch": 10, "schedule": "cosine"}}
    first = made("fedavg", folder, tmp_path / "first.h5", 2, **cosine)
    with pytest.raises(
        BadInput, match=r'the learning rate follows the number of rounds \(train.schedule = "cosine"\), so the first 2 rounds of 5'
    ):
        made("fedavg", folder, tmp_path / "longer.h5", MORE, first, **cosine)


def test_a_run_without_its_last_checkpoint_cannot_be_extended(folder, tmp_path) -> None:
    first = made("fedavg", folder, tmp_path / "first.h5", 2)
    checkpoint.clear(checkpoint.folder_of(first))
    with pytest.raises(BadInput, match="the checkpoint of its last round is gone from"):
        made("fedavg", folder, tmp_path / "longer.h5", MORE, first)


def test_a_method_says_for_itself_whether_it_can_be_extended() -> None:
    """A subclass may follow the rounds although its parent does not."""
    fedavg = find("fedavg")

    class Mine(fedavg):  # type: ignore[misc, valid-type]
        pass

    assert fedavg.follows_rounds is False
    assert vars(Mine).get("follows_rounds", True) is True
