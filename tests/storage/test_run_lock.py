"""run_lock: one holder at a time, among processes and within one, and none after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import other_machine
import pytest

from fedsim.errors import BadInput
from fedsim.storage.run_lock import holding, lock_of

SINCE = "2026-01-02 03:04:05 UTC"


def in_a_fork(call: Callable[[], object]) -> tuple[int, int]:
    """(process, wait status) of a forked process that ends with exit code 0, or 2 after a BadInput."""
    if process := os.fork():
        return process, os.waitpid(process, 0)[1]
    try:
        call()
    except BadInput:
        os._exit(2)
    os._exit(0)


def take(run: Path) -> None:
    with holding(run, SINCE, time.sleep):
        pass


def take_and_die(run: Path) -> None:
    with holding(run, SINCE, time.sleep):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_second_is_refused_and_reported_who_holds_the_file(tmp_path: Path) -> None:
    run, link = tmp_path / "run.h5", tmp_path / "link.h5"
    link.symlink_to(run)
    for name in (run, link):
        with holding(run, SINCE, time.sleep):
            assert os.waitstatus_to_exitcode(in_a_fork(lambda name=name: take(name))[1]) == 2
            with pytest.raises(BadInput, match=rf"{name.name} is being .* \(process {os.getpid()} on {socket.gethostname()}\)"):
                take(name)
            assert os.waitstatus_to_exitcode(in_a_fork(lambda: take(tmp_path / "other.h5"))[1]) == 0
        assert not lock_of(run).exists()
        take(name)


def test_a_killed_holder_holds_nothing_and_its_note_is_replaced(tmp_path: Path) -> None:
    process, status = in_a_fork(lambda: take_and_die(tmp_path / "run.h5"))
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    left = lock_of(tmp_path / "run.h5")
    assert f'"process": {process}' in left.read_text()
    with holding(tmp_path / "run.h5", SINCE, time.sleep):
        assert f'"process": {os.getpid()}' in left.read_text()
    assert not left.exists()


def test_folders_are_made_for_the_lock_and_stay_only_with_what_was_written(tmp_path: Path) -> None:
    take(tmp_path / "a" / "b" / "run.h5")
    assert not list(tmp_path.iterdir())
    with holding(tmp_path / "a" / "b" / "run.h5", SINCE, time.sleep):
        (tmp_path / "a" / "b" / "run.h5").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.h5"]


def test_where_no_lock_can_be_made_the_writer_speaks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    take(tmp_path / "file" / "run.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_lock_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """Somebody removes the file of a lock that is held, and another run makes its own."""
    run = tmp_path / "run.h5"
    with holding(run, SINCE, time.sleep):
        lock_of(run).unlink()
        lock_of(run).touch()
    assert lock_of(run).exists()


def test_a_former_process_of_our_number_holds_nothing(tmp_path: Path) -> None:
    """On a file system without locks only the note tells; a container that is started again numbers its processes as before."""

    other_machine.needs_filters()
    run = tmp_path / "run.h5"
    for process, expected in ((None, 0), (os.getpid(), 2)):

        def taken(process: int | None = process) -> None:
            other_machine.refuse(other_machine.NONE)
            lock_of(run).write_text(json.dumps({"host": socket.gethostname(), "process": process or os.getpid(), "since": SINCE}))
            take(run)

        assert os.waitstatus_to_exitcode(in_a_fork(taken)[1]) == expected


@pytest.mark.parametrize("name", ["x" * 300, "x" * 243])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, name: str) -> None:
    """The second is not too long itself, but for the folder of its checkpoints."""
    with pytest.raises(BadInput, match=r"x\.h5 cannot be reached: File name too long; choose another --out"):
        take(tmp_path / f"{name}.h5")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    lock_of(tmp_path / "run.h5").mkdir()
    with pytest.raises(BadInput, match=r"run\.h5\.lock is a folder, and the lock of .* needs a file of this name; remove it"):
        take(tmp_path / "run.h5")
    assert lock_of(tmp_path / "run.h5").is_dir()


CLOSED = """
import os, sys, time
from pathlib import Path
from fedsim.storage.run_lock import holding
with holding(Path("run.h5"), "today", time.sleep):
    os.chmod(".", 0o555)
"""


@pytest.mark.processes
def test_a_folder_that_cannot_be_written_any_more_keeps_the_lock_of_a_run_that_has_ended(tmp_path: Path) -> None:
    """Root obeys permissions without the right to override them."""
    obeying = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    ended = subprocess.run([*obeying, sys.executable, "-c", CLOSED], cwd=tmp_path, capture_output=True, text=True, check=False)
    tmp_path.chmod(0o755)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lock_of(tmp_path / "run.h5").exists()
    with holding(tmp_path / "run.h5", "today", time.sleep):
        pass
    assert not lock_of(tmp_path / "run.h5").exists()
