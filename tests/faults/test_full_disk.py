"""A full disk ends a run with exit code 3 and one line; with room, the same command gives a run that was never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import Console, Lab, assert_same, environment, rows
from small_disk import limited, small_disk

from fedsim.storage.checkpoint import folder_of
from fedsim.storage.reader import RunReader


def stopped_half_way(lab: Lab) -> Path:
    """A run that is killed in round 5."""
    running = lab.start(hold=5)
    running.until(3)
    running.kill()
    return running.run


@pytest.mark.full
@pytest.mark.processes
def test_ranks_on_a_full_disk_stop_with_one_line(lab: Lab) -> None:
    """Row 0 does not fit; it is written while the ranks train round 1. (Under `ulimit -f` Open MPI's own files would not fit.)"""
    with small_disk("300k") as disk:
        (lab.folder / "disk").symlink_to(disk)
        ended = lab.run(ranks=3, run="disk/run.h5")
        assert rows(disk / "run.h5") == -1
    assert ended.code == 3, ended.err
    assert ended.err.count("no room for disk/run.h5: it needs ") == 1
    assert "make room, and the same command goes on from there\n" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.processes
def test_a_run_without_room_stops_with_one_line_and_goes_on(lab: Lab, console: Console, reference: Path) -> None:
    """First from the start, then half-way: there is room for the copy that a resumed run makes, and none for more."""
    with limited(80_000):
        ended = console()
    assert ended.code == 3, ended.err
    assert ended.err.startswith("no room for run.h5: it needs ")
    assert ended.err.endswith("a file may have 80,000 at most (ulimit -f); raise the limit, and the same command goes on from there\n")
    assert rows(lab.folder / "run.h5") == -1
    run = stopped_half_way(lab)
    before, size = rows(run), run.stat().st_size
    with limited(size + 100_000):
        ended = console()
    assert ended.code == 3, ended.err
    assert ended.err.count("\n") == 1
    assert rows(run) in (before - 1, before)
    assert console().code == 0
    assert_same(run, reference)
    assert not list(lab.folder.glob("*.new")) + list(folder_of(run).glob("*.new"))


@pytest.mark.full
@pytest.mark.processes
def test_output_on_a_full_disk_is_left_out(lab: Lab) -> None:
    """The run is done, and the exit code tells that something is missing."""
    command = [sys.executable, "-m", "fedsim", "run", "tiny.toml", "--out", "run.h5", "--set", "rounds=1"]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, cwd=lab.folder, env=environment(), stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr.decode()) == (1, "the disk is full: not all of the output could be written\n")
    assert RunReader(lab.folder / "run.h5").attributes["finished"]
