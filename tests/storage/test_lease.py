"""run_lock on file systems that have no locks, or show them to nobody: a lease that is touched, watched, taken over and lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import other_machine
import pytest
from fedsim_analysis.watch import lock
from lease_holder import Holder
from small_disk import small_disk
from small_job import small_job

from fedsim.errors import BadInput, CannotWrite
from fedsim.storage import run_lock
from fedsim.storage.run_lock import holding, lock_of

Hold = Callable[..., Holder]
ROUNDS, RACERS = 25, 6
DEAD = {"host": "node3", "process": 4, "since": "then", "began": "7", "token": "of node3", "boot": "b", "processes": "p", "locks": False}
WAITS = "waiting up to 2 s for a sign of life"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE", 1.5)
    monkeypatch.setattr(run_lock, "GLANCE", 0.1)


@pytest.fixture
def hold() -> Iterator[Hold]:
    other_machine.needs_filters()
    held: list[Holder] = []

    def made(*arguments: object, **named: object) -> Holder:
        held.append(Holder(*arguments, **named))  # type: ignore[arg-type]
        return held[-1]

    yield made
    for holder in held:
        holder.kill()


def left(run: Path, **others: object) -> None:
    """What a dead holder on another machine leaves."""
    lock_of(run).write_text(json.dumps(DEAD | others))


def lines(run: Path, job: str = "", restarts: int = 0) -> list[str]:
    """Takes the lease, and lets go; what was said meanwhile."""
    said: list[str] = []
    with holding(run, "today", time.sleep, said.append, job, restarts):
        pass
    return said


@pytest.mark.processes
@pytest.mark.parametrize("locks", [other_machine.NONE, pytest.param(other_machine.UNSEEN, marks=pytest.mark.full)])
@pytest.mark.usefixtures("quick")
def test_a_run_on_another_machine_is_seen_and_taken_over_only_when_it_stands_still(tmp_path: Path, hold: Hold, locks: str) -> None:
    run = tmp_path / "run.h5"
    first = hold(run, locks, before=other_machine.command(tmp_path, []))
    assert first.line() == "held"
    with pytest.raises(BadInput, match=r"is being written by another run \(process \d+ on node7, since today\); wait until"):
        lines(run)
    assert first.ask("check") == "ours"
    os.kill(first.number, signal.SIGSTOP)
    second = hold(run, locks)
    assert WAITS in second.line()
    assert second.line() == "held"
    os.kill(first.number, signal.SIGCONT)
    taken = f"being written by another run (process {second.process.pid} on {socket.gethostname()}), which took over while this one stood"
    assert taken in first.ask("check")
    assert second.ask("check") == "ours"
    first.process.communicate("")  # it ends, and leaves the lease of the other alone
    assert second.ask("check") == "ours"
    second.kill()
    assert lines(run) == []
    assert [path for path in tmp_path.iterdir() if path.name[:4] != "boot"] == []


@pytest.mark.usefixtures("quick")
def test_the_same_job_of_slurm_does_not_wait_for_its_former_node(tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    left(run, job="cluster 12", restarts=0)
    assert lines(run, "cluster 12", restarts=1) == []
    left(run, job="cluster 12", restarts=1)
    assert len(lines(run, "cluster 12", restarts=1)) == 1, "two steps of one job may live both"
    left(run, job="cluster 12")
    assert len(lines(run, "cluster 13", restarts=1)) == 1


@pytest.mark.usefixtures("quick")
def test_what_a_lock_says_steers_no_terminal(tmp_path: Path) -> None:
    left(tmp_path / "run.h5", host="\x1b[2Jnode", since="\x1b]0;title\x07")
    (said,) = lines(tmp_path / "run.h5")
    assert r"process 4 on \x1b[2Jnode" in said
    assert "\x1b" not in said


def race(run: Path, results: int, locks: str) -> None:
    """One racer: takes the lease if it can, and keeps it until it is killed."""
    if locks:
        other_machine.refuse(locks)
    try:
        with holding(run, "today", time.sleep, job="1", restarts=1):
            os.write(results, b"w")
            time.sleep(60)
    except BadInput:
        os.write(results, b"r")
    os._exit(0)


def raced(run: Path, locks: str) -> str:
    """What became of those who take over from a dead holder at once: `w` won, `r` refused."""
    there, results = os.pipe()
    racers = []
    for _ in range(RACERS):
        if not (process := os.fork()):
            race(run, results, locks)
        racers.append(process)
    found = b"".join(os.read(there, 1) for _ in racers)
    for process in racers:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    os.close(there)
    os.close(results)
    return "".join(sorted(found.decode()))


@pytest.mark.processes
@pytest.mark.parametrize("locks", [other_machine.NONE, pytest.param("", marks=pytest.mark.full)])
def test_of_many_who_take_over_at_once_one_wins(tmp_path: Path, locks: str) -> None:
    """Half of the times one had died between the two steps of taking over."""
    other_machine.needs_filters()
    run = tmp_path / "run.h5"
    for i in range(ROUNDS):
        lock_of(run).unlink(missing_ok=True)
        left(run, job="1", token=f"{i}")
        if i % 2:
            seen = lock.look(lock_of(run))
            assert seen
            (tmp_path / f".fedsim-{seen.mark}.next").write_text(json.dumps(DEAD | {"job": "1", "token": f"{i} next"}))
        assert raced(run, locks) == "r" * (RACERS - 1) + "w", f"time {i}"
        assert [path.name for path in tmp_path.iterdir()] == ["run.h5.lock"]


@pytest.mark.processes
def test_without_hard_links_one_wins_too(tmp_path: Path) -> None:
    other_machine.needs_filters()
    if not (process := os.fork()):
        other_machine.refuse(other_machine.NONE, links=True)
        left(tmp_path / "run.h5", job="1")
        said = lines(tmp_path / "run.h5", "1", 1) + lines(tmp_path / "run.h5")
        os._exit(bool(said) or lock_of(tmp_path / "run.h5").exists())
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.usefixtures("quick")
def test_a_lock_is_touched_while_the_main_thread_waits_and_the_disk_is_full() -> None:
    with small_disk("64k") as disk:
        (disk / "filler").touch()
        with (disk / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(b"x" * 512):
                    pass
            except OSError:
                pass
        with holding(disk / "run.h5", "today", time.sleep) as lease:
            before, give_up = lock_of(disk / "run.h5").stat().st_mtime_ns, time.monotonic() + 60
            while lock_of(disk / "run.h5").stat().st_mtime_ns == before:
                assert time.monotonic() < give_up
                time.sleep(0.2)
            lease.check()


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_folder_that_takes_no_files_is_not_tried_for_ever(tmp_path: Path) -> None:
    """There open says that there is no such folder, though there is: the run itself says why it cannot write."""
    (tmp_path / "job.toml").write_text(small_job(1))
    command = [sys.executable, "-m", "fedsim", "run", str(tmp_path / "job.toml"), "--out", "/proc/run.h5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines() == [
        f"{tmp_path / 'job.toml'}: /proc/run.h5 cannot be written: No such file or directory; choose another --out"
    ]


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (lambda run: lock_of(run).unlink(), r"run\.h5\.lock was removed, so that another run may write .*run\.h5; this one has stopped"),
        (lambda run: lock_of(run).rename(run.with_name("other")), r"run\.h5\.lock was removed"),
        (lambda run: run.parent.rename(run.parent.with_name("moved")), r"the folder of .*run\.h5 is gone, and the run has stopped"),
    ],
)
def test_a_lost_lease_is_seen_before_the_next_write(tmp_path: Path, lose: Callable[[Path], object], said: str) -> None:
    run = tmp_path / "folder" / "run.h5"
    with holding(run, "today", time.sleep) as lease:
        lease.check()
        lose(run)
        with pytest.raises(CannotWrite, match=said):
            lease.check()


@pytest.mark.processes
@pytest.mark.usefixtures("quick")
def test_a_holder_that_has_read_its_own_lock_is_alive(tmp_path: Path) -> None:
    """As a callback does that copies the folder of the run: when a process closes a file, the kernel ends its locks on it."""
    run, (reads, writes) = tmp_path / "run.h5", os.pipe()
    child = os.fork()
    if not child:
        with holding(run, "today", time.sleep) as lease:
            lock_of(run).read_text()
            os.write(writes, b"x")
            while True:
                lease.check()
                time.sleep(0.05)
    try:
        os.read(reads, 1)
        with pytest.raises(BadInput, match=rf"process {child} on .* wait until that has ended"):
            lines(run)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reads)
        os.close(writes)
    assert lines(run) == []
