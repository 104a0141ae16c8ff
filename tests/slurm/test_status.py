"""The exit code of `fedsim submit --status`, and what --resubmit takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.slurm import records
from fedsim.slurm.status import DONE, FAILED, LOST, STOPPED, UNREADABLE, WAITING, Fate, Status


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ((DONE,), 0),
        ((DONE, FAILED), 1),
        ((DONE, LOST), 1),
        ((DONE, UNREADABLE), 2),
        ((DONE, WAITING), 3),
        ((DONE, STOPPED), 3),
    ],
)
def test_the_exit_code_is_that_of_the_worst(tmp_path: Path, found: tuple[str, ...], code: int) -> None:
    made = Status(records.Ledger(tmp_path), tuple(Fate(f"run{i}", state) for i, state in enumerate(found)))
    assert made.code == code
    again = {FAILED, LOST, STOPPED} & set(found)
    assert bool(made.again) == bool(again)
