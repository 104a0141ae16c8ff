"""A full disk ends a run with exit code 3 and one line; with room, the same command gives a run that was never stopped."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Console, Lab, assert_same, environment, rows

from fedsim.storage.checkpoint import folder_of
from fedsim.storage.reader import RunReader


@contextmanager
def limited(size: int) -> Iterator[None]:
    """As `ulimit -f`, in bytes; processes that are started inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stopped_half_way(lab: Lab, ranks: int) -> Path:
    """A run that is killed in round 5."""
    running = lab.start(ranks=ranks, hold=5)
    running.until(3)
    running.kill()
    return running.run


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [0, 3])
def test_a_run_without_room_stops_with_one_line_and_goes_on(lab: Lab, console: Console, reference: Path, ranks: int) -> None:
    """First from the start, then half-way: there is room for the copy that a resumed run makes, and none for more."""
    with limited(80_000):
        ended = lab.run(ranks=ranks)
    assert ended.code == 3, ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("no room for run.h5: it needs ")]
    assert len(said) == 1
    assert said[0].endswith("a file may have 80,000 at most (ulimit -f); raise the limit, and the same command goes on from there")
    assert "Traceback" not in ended.err
    assert rows(lab.folder / "run.h5") == -1
    run = stopped_half_way(lab, 0)
    before, size = rows(run), run.stat().st_size
    with limited(size + 100_000):
        ended = console()
    assert ended.code == 3, ended.err
    assert ended.err.count("\n") == 1
    assert rows(run) in (before - 1, before)
    assert console().code == 0
    assert_same(run, reference)
    assert not list(lab.folder.glob("*.new")) + list(folder_of(run).glob("*.new"))


@pytest.mark.processes
def test_output_on_a_full_disk_is_left_out(lab: Lab) -> None:
    """The run is done, and the exit code tells that something is missing."""
    command = [sys.executable, "-m", "fedsim", "run", "tiny.toml", "--out", "run.h5", "--set", "rounds=1"]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, cwd=lab.folder, env=environment(), stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr.decode()) == (1, "the disk is full: not all of the output could be written\n")
    assert RunReader(lab.folder / "run.h5").attributes["finished"]
