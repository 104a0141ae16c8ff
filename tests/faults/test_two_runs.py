"""Two runs on one file: the second is refused at once, and the first goes on as if it were alone."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from processes import LOOK, Console, Lab, assert_same, snapshot

from fedsim.storage.checkpoint import folder_of


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.full), 2])
def test_a_second_run_on_a_file_is_refused_until_the_first_was_killed(lab: Lab, console: Console, reference: Path, ranks: int) -> None:
    first = lab.start(ranks=ranks, hold=2)
    first.until(1)
    rank = first.rank(0) if ranks else first.process.pid
    second = console()
    assert second.code == 2
    assert second.err.startswith(f"tiny.toml: run.h5 is being written by another run (process {rank} on {socket.gethostname()}, since 20")
    assert second.err.count("\n") == 1
    first.until(1)
    first.kill()
    assert console().code == 0
    assert_same(lab.folder / "run.h5", reference)
    assert not (lab.folder / "run.h5.lock").exists()


@pytest.mark.full
def test_a_stopped_run_is_gone_on_with_once(lab: Lab, console: Console, reference: Path) -> None:
    first = lab.start(hold=3)
    first.until(2)
    first.kill()
    again = lab.start("--resume", "must", hold=4)
    again.until(3)
    while not (folder_of(again.run) / "000003.json").exists():  # it follows the row
        time.sleep(LOOK)
    before = snapshot(folder_of(lab.folder / "run.h5"))
    refused = console("--resume", "must")
    assert (refused.code, "is being written by another run" in refused.err) == (2, True)
    assert snapshot(folder_of(lab.folder / "run.h5")) == before
    again.kill()
    assert console().code == 0
    assert_same(lab.folder / "run.h5", reference)
