"""The run file, its folder or its checkpoints vanish, or their disk fails, while a run goes on: one message, exit code 3, no traceback."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Console, Ended, Lab, assert_readable, assert_same, await_writer, environment, rows

import fedsim
from fedsim.errors import CannotWrite
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.run_lock import lock_of

KEPT_GONE = r"kept\.safetensors is gone, which holds what clients keep"  # where they are read before anything is written


def replaced(run: Path) -> None:
    run.rename(run.with_name("kept.h5"))
    run.write_bytes(b"of somebody else")


LOST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "its folder": (lambda run: shutil.rmtree(run.parent), r"the folder of out/run\.h5 is gone, and the run has stopped"),
    "the folder, moved": (lambda run: run.parent.rename("moved"), r"the folder of out/run\.h5 is gone, and the run has stopped"),
    "the file": (lambda run: run.unlink(), r"out/run\.h5 is gone \(it was removed\); the run has stopped"),
    "another file": (replaced, r"out/run\.h5 was replaced by another file while a run wrote it; the run has stopped, and leaves that file"),
    "the checkpoints": (
        lambda run: shutil.rmtree(folder_of(run)),
        r"out/run\.h5\.checkpoint is gone while a run wrote its checkpoints there",
    ),
    "the manifests": (
        lambda run: [path.unlink() for path in folder_of(run).glob("*.json")],
        r"out/run\.h5\.checkpoint was emptied while a run wrote its checkpoints there",
    ),
    "the lock": (lambda run: lock_of(run).unlink(), r"run\.h5\.lock was removed, so that another run may write out/run\.h5"),
}


@pytest.mark.parametrize("what", LOST)
def test_a_run_that_loses_something_stops_with_one_message(lab: Lab, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(lab.folder)
    lose, said = LOST[what]
    run = Path("out") / "run.h5"

    def watch(finished: Any) -> None:
        if finished.round == 3:
            await_writer()
            lose(run)

    with pytest.raises(CannotWrite, match=f"{said}|{KEPT_GONE}"):
        fedsim.run("tiny.toml", out=run, callback=watch, progress=False)
    if what == "another file":
        assert run.read_bytes() == b"of somebody else"
        assert rows(Path("out/kept.h5")) >= 2
    if what in ("its folder", "the folder, moved"):
        assert not run.parent.exists(), "it must not be made anew"
    if what == "the lock":
        assert_readable(run, at_least=2)


@pytest.mark.processes
def test_ranks_end_too(lab: Lab) -> None:
    running = lab.start("--set", "rounds=100000", ranks=2)
    running.until(1)
    running.run.unlink()
    ended = running.ended()
    assert ended.code == 3
    assert ended.err.count("run.h5 is gone (it was removed); the run has stopped\n") == 1
    assert "Traceback" not in ended.err


@pytest.mark.processes
@pytest.mark.parametrize("error", ["EIO", pytest.param("ESTALE", marks=pytest.mark.full), pytest.param("EROFS", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("call", "file"),
    [("write", "run.h5"), pytest.param("fsync", "run.h5.checkpoint/000004.json.new", marks=pytest.mark.full)],
)
def test_a_disk_that_fails_ends_a_run_with_one_line(
    lab: Lab, console: Console, reference: Path, killed: Path, call: str, file: str, error: str
) -> None:
    """HDF5 would end in a segmentation fault when it closes a file of which a write failed."""
    if not shutil.which("strace"):
        pytest.skip("needs strace, which makes the system calls of a program fail")
    run = lab.folder / "run.h5"
    shutil.copy(killed, run)
    shutil.copytree(folder_of(killed), folder_of(run))
    ended = injected(lab, f"{call}:error={error}:when=8+", lab.folder / file)
    assert ended.code == 3, ended.err
    assert ended.err.count("\n") == 1
    assert "cannot be written any more: " in ended.err
    assert_readable(run, at_least=2)
    assert console().code == 0
    assert_same(run, reference)


def injected(lab: Lab, fault: str, path: Path) -> Ended:
    """`fedsim run` of the tiny job whose calls on one path fail."""
    call = fault.partition(":")[0]
    fault = fault.replace(":when=8+", "") if call == "fsync" else fault
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={fault}", "-P", str(path)]
    words += [sys.executable, "-m", "fedsim", "run", "tiny.toml", "--out", "run.h5"]
    done = subprocess.run(words, cwd=lab.folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != -signal.SIGSEGV
    return Ended(done.returncode, done.stdout, done.stderr)
