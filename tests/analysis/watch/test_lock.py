"""Who writes a run file, asked without taking its lock."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fedsim_analysis.watch.lock import PATIENCE, Holder, Pulse, began, holder_of
from watched_runs import SINCE, elsewhere, held, killed

from fedsim.storage.run_lock import holding, lock_of

HERE = socket.gethostname()


def test_nobody_where_there_is_no_lock(tmp_path: Path) -> None:
    assert holder_of(tmp_path / "run.h5") is None
    assert holder_of(tmp_path / "no folder" / "run.h5") is None
    with held(tmp_path / "other.h5"):
        assert holder_of(tmp_path / "run.h5") is None


def test_the_process_that_holds_it_is_named_by_whichever_name_the_file_has(tmp_path: Path) -> None:
    run, link = tmp_path / "run.h5", tmp_path / "link.h5"
    link.symlink_to(run)
    with held(run) as process:
        for name in (run, link):
            found = holder_of(name)
            assert found is not None
            assert (found.writes, found.process, found.host, found.since) == (True, process, HERE, SINCE)
            assert str(found) == f"process {process} on {HERE}"


def test_asking_does_not_take_the_lock_nor_break_it(tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    process = killed(run)
    before = lock_of(run).read_bytes()
    for _ in range(3):
        found = holder_of(run)
        assert found is not None
        assert (found.writes, found.process) == (False, process)
    assert lock_of(run).read_bytes() == before
    with held(run):
        assert holder_of(run).writes  # type: ignore[union-attr]
        if not os.fork():
            os._exit(bool(holder_of(run).writes))  # type: ignore[union-attr]
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    with holding(run, SINCE, time.sleep):
        pass
    assert not lock_of(run).exists()


def test_asking_in_the_process_that_holds_it_does_not_let_go(tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    with holding(run, SINCE, time.sleep):
        found = holder_of(run)
        assert found is not None
        assert (found.writes, found.process) == (True, os.getpid())
        if not os.fork():
            os.close(next(int(entry.name) for entry in Path("/dev/fd").iterdir() if is_lock(int(entry.name), run)))
            os._exit(bool(holder_of(run).writes))  # type: ignore[union-attr]
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 1


def is_lock(handle: int, run: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), lock_of(run).stat())
    except OSError:
        return False


def test_a_process_of_another_machine_cannot_be_asked(tmp_path: Path) -> None:
    elsewhere(tmp_path / "run.h5")
    found = holder_of(tmp_path / "run.h5")
    assert found is not None
    assert (found.writes, str(found)) == (None, "process 12 on node7")


@pytest.mark.parametrize("note", [b"", b"\xff\x00", b"[1, 2]", b'{"process": "x", "host": 3}', b"{" * 100_000, b"[" * 5000])
def test_a_note_of_anything_is_borne(tmp_path: Path, note: bytes) -> None:
    lock_of(tmp_path / "run.h5").write_bytes(note)
    found = holder_of(tmp_path / "run.h5")
    assert found is not None
    assert (found.writes, found.process, found.host) == (None, None, "")


def test_a_lock_that_is_a_pipe_or_a_folder_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(lock_of(tmp_path / "run.h5"))
    lock_of(tmp_path / "other.h5").mkdir()
    for name in ("run.h5", "other.h5"):
        assert holder_of(tmp_path / name) is not None


def test_a_process_is_known_by_when_it_began() -> None:
    assert began(os.getpid()) == began(os.getpid()) != ""
    if not (process := os.fork()):
        os._exit(0)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert began(process) == ""  # its remains
    os.waitpid(process, 0)
    assert began(process) == ""


def test_whether_a_process_elsewhere_lives_is_told_by_whether_it_touches_its_lock() -> None:
    now, here = [0.0], Holder(None, 12, "node7", noted=1.0, token="a")
    pulse = Pulse(lambda: now[0])

    def after(seconds: float, holder: Holder | None) -> bool | None:
        now[0] += seconds
        found = pulse.judged(holder)
        return found.writes if found else False

    assert after(1, here) is None
    assert after(PATIENCE - 1, here) is None
    assert after(0.1, replace(here, noted=0.5)) is True, "clocks may go back"
    assert after(PATIENCE - 1, replace(here, noted=0.5)) is True
    assert after(2, replace(here, noted=0.5)) is False
    assert after(1, replace(here, token="b")) is None, "another holder"
    assert after(1, None) is False
    assert after(PATIENCE * 2, replace(here, token="")) is None, "a fedsim that touches nothing"
    assert after(1, Holder(True)) is True
