"""A run that writes on its node's own disk: what stands at --out at every end of it, and where the next one begins."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Console, Lab, assert_readable, assert_same, await_writer, rows, wait_for
from small_disk import small_disk

import fedsim
from fedsim.errors import CannotWrite
from fedsim.storage import disk_room
from fedsim.storage.checkpoint import folder_of, latest
from fedsim.storage.places.scratch import Scratch

ON_SCRATCH = ("--set", "execution.scratch=$NODE_DISK/fast")


@pytest.fixture
def disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NODE_DISK", str(lab.folder / "node"))
    return lab.folder / "node" / "fast"


def test_a_variable_that_is_not_set_is_named(console: Console) -> None:
    ended = console("--set", "execution.scratch=${SLURM_TMPDIR}/x")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the environment variable SLURM_TMPDIR is not set on this node" in ended.err


def test_a_run_is_copied_home_and_leaves_nothing_on_the_scratch_disk(disk: Path, lab: Lab, console: Console, reference: Path) -> None:
    """It is stopped first, by its time limit; a copy that is killed half-way does not harm."""
    (lab.folder / "run.h5.new").write_bytes(b"half a copy")
    assert console(*ON_SCRATCH, "--set", "execution.checkpoint_every=3").code == 0
    assert_same(lab.folder / "run.h5", reference)
    assert latest(folder_of(lab.folder / "run.h5")).round == 8  # type: ignore[union-attr]
    assert not list(disk.iterdir())
    assert not [path for path in lab.folder.iterdir() if path.name.endswith((".new", ".lock"))]


def test_what_a_killed_run_left_on_the_same_node_is_gone_on_from(disk: Path, lab: Lab, console: Console, reference: Path) -> None:
    """Here home is older, as after a kill before the copy. Folders that are another's are left alone."""
    first = lab.start(*ON_SCRATCH, hold=3)
    first.until(2)
    old = lab.folder / "old"
    old.mkdir()
    first.kill()
    for path in (first.run, folder_of(first.run)):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, old / path.name)  # type: ignore[operator]
    before = rows(first.run)
    second = lab.start(*ON_SCRATCH, hold=6)
    second.until(5)
    second.kill()
    assert_readable(second.run, at_least=5)
    (left,) = disk.glob("fedsim-*")
    assert left.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder_of(first.run))
    for path in (first.run, folder_of(first.run)):
        (shutil.copytree if (old / path.name).is_dir() else shutil.copy)(old / path.name, path)  # type: ignore[operator]
    assert rows(first.run) == before < 5
    foreign = disk / "fedsim-foreign"
    shutil.copytree(left, foreign)
    foreign.chmod(0o777)
    ended = console(*ON_SCRATCH)
    assert ended.code == 0, ended.err
    assert "going on after round 5" in ended.out
    assert_same(first.run, reference)
    assert list(disk.iterdir()) == [foreign]


@pytest.mark.full
@pytest.mark.processes
def test_a_signal_brings_the_last_state_home(disk: Path, lab: Lab, console: Console, reference: Path) -> None:
    """Also the rows after the last checkpoint."""
    running = lab.start(*ON_SCRATCH, "--set", "execution.checkpoint_every=4", hold=6)
    wait_for(lambda: any(rows(path) == 5 for path in disk.glob("*/run.h5")))
    running.process.send_signal(signal.SIGTERM)
    ended = running.ended()
    assert (ended.code, ended.err.count("\n")) == (3, 1)
    assert rows(running.run) == 5
    assert not list(disk.iterdir())
    assert console().code == 0, "the scratch folder is no part of the job"
    assert_same(running.run, reference)


def lost(lab: Lab, lose: Any, scratch: Path, **more: Any) -> str:
    """What a run says that loses something after round 3."""

    def watch(finished: Any) -> None:
        if finished.round == 3:
            await_writer()
            lose()

    with pytest.raises(CannotWrite) as error:
        fedsim.run("tiny.toml", out="run.h5", set={"execution.scratch": str(scratch), **more}, callback=watch, progress=False)
    return str(error.value)


def test_a_scratch_disk_that_vanishes_or_is_full_costs_nothing_that_was_copied(disk: Path, lab: Lab, console: Console) -> None:
    run = lab.folder / "run.h5"
    monkey = pytest.MonkeyPatch()
    monkey.chdir(lab.folder)
    try:
        said = lost(lab, lambda: [shutil.rmtree(path) for path in disk.iterdir()], disk)
        assert "it was removed" in said or "which holds what clients keep" in said  # whichever was missed first
        assert said.endswith("; run.h5 holds what was copied back")
        assert_readable(run, at_least=2)
        with small_disk("8m") as small:

            def fill() -> None:
                with (small / "filler").open("wb", buffering=0) as filler:
                    while filler.write(b"x" * 4096) == 4096:
                        pass

            def full() -> None:
                with pytest.raises(OSError, match="No space left"):
                    fill()

            shutil.rmtree(folder_of(run))
            run.unlink()
            said = lost(lab, full, small)
        assert said.startswith(f"no room for {small}")
        assert said.endswith("and the same command goes on from there; run.h5 holds what was copied back")
        assert_readable(run, at_least=2)
    finally:
        monkey.undo()
    assert console().code == 0


def test_a_checkpoint_that_is_saved_again_is_copied_again(tmp_path: Path) -> None:
    """As after one that was damaged at home, and passed over."""
    home = tmp_path / "run.h5"
    folder_of(home).mkdir()
    home.touch()
    (folder_of(home) / "000002.json").write_text("damaged")
    with Scratch.made(tmp_path / "node", home) as place:
        again = folder_of(place.path) / "000002.json"
        place.copy_back()
        assert (folder_of(home) / again.name).read_text() == "damaged"
        disk_room.put(again, b"written again")
        place.copy_back()
        assert (folder_of(home) / again.name).read_text() == "written again"
        assert not place.behind


@pytest.mark.full
def test_what_cannot_be_copied_home_is_copied_by_the_next_run(disk: Path, lab: Lab, console: Console, reference: Path) -> None:
    """Here a folder stands in the way at home, as if home could not be written."""
    run, monkey = lab.folder / "run.h5", pytest.MonkeyPatch()
    monkey.chdir(lab.folder)
    try:
        said = lost(lab, lambda: (lab.folder / "run.h5.new").mkdir(), disk)
    finally:
        monkey.undo()
    (left,) = disk.iterdir()
    assert said.endswith(f"run.h5 holds what was copied back, and {left} what is newer: the next run on this node copies it")
    before = rows(left / run.name)
    assert before > rows(run)
    (lab.folder / "run.h5.new").rmdir()
    ended = console(*ON_SCRATCH)
    assert (ended.code, f"going on after round {before}" in ended.out) == (0, True), ended.err
    assert_same(run, reference)
    assert not list(disk.iterdir())
