"""The first rank of a node forks the others: they are its children, other processes stand for them, and all end together as ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import MPIRUN, Lab, Running, assert_same, environment, wait_for

from fedsim.simulation.launchers.forking import message, place, stand_in


def field(process: int, number: int) -> int:
    """A field of /proc/PROCESS/stat after the name."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[number])


def parent(process: int) -> int:
    return field(process, 1)


def forked(running: Running) -> list[int]:
    """The ranks that another one forked: not the process that watches beside each, and not Python below a shell."""
    members = running.members()
    programs = {pid: (Path(f"/proc/{pid}/comm").read_text().strip(), Path(f"/proc/{pid}/exe").readlink()) for pid in members}
    return [pid for pid in members if programs[pid][0] != "fedsim-watch" and programs[pid] == programs.get(parent(pid))]


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def held(lab: Lab) -> Running:
    """Three ranks in a round that does not end."""
    running = lab.start(ranks=3, hold=3)
    running.until(1)
    return running


def test_ranks_that_were_forked_give_the_run_of_one_process(lab: Lab, reference: Path) -> None:
    running = lab.start(ranks=3)
    wait_for(lambda: len(running.ranks()) >= 3 and len(forked(running)) == 2)
    ended = running.ended()
    assert (ended.code, ended.err) == (0, "")
    assert_same(lab.folder / "run.h5", reference)


def test_a_forked_rank_has_the_process_group_of_its_stand_in_and_little_memory_of_its_own(held: Running) -> None:
    ranks = forked(held)
    assert {os.getpgid(pid) for pid in ranks} == {os.getpgid(held.rank(number)) for number in (1, 2)}
    private = [line for line in Path(f"/proc/{ranks[0]}/smaps_rollup").read_text().splitlines() if line.startswith("Private_Dirty")]
    alone = [line for line in Path(f"/proc/{held.rank(1)}/smaps_rollup").read_text().splitlines() if line.startswith("Rss")]
    assert int(private[0].split()[1]) < 200_000  # kB; importing torch alone makes 280 MB
    assert int(alone[0].split()[1]) < 60_000


@pytest.mark.parametrize("who", ["stand-in", "rank"])
def test_all_end_with_a_stand_in_or_a_forked_rank_that_is_killed(held: Running, who: str) -> None:
    os.kill(held.rank(2) if who == "stand-in" else forked(held)[0], signal.SIGKILL)
    ended = held.ended(within=30)
    assert ended.code != 0
    assert "signal 9" in ended.out + ended.err


def test_a_forked_rank_stops_and_goes_on_with_its_stand_in(held: Running) -> None:
    stopped = held.rank(1)
    (rank,) = [pid for pid in forked(held) if os.getpgid(pid) == os.getpgid(stopped)]
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: state(rank) == "T")
    os.kill(stopped, signal.SIGCONT)
    wait_for(lambda: state(rank) != "T")


@pytest.mark.parametrize("through", [("sh", "-c", '"$@"; exit $?', "sh"), ("env", "-u", "FEDSIM_NOTHING")])
def test_a_process_between_the_launcher_and_the_rank_means_that_ranks_start_by_themselves(
    lab: Lab, reference: Path, through: tuple[str, ...]
) -> None:
    """A shell stays between them; `env` becomes the rank."""
    running = lab.start(ranks=2, through=through)
    running.until(0)
    assert len(forked(running)) == (through[0] == "env")
    assert running.ended().code == 0
    assert_same(lab.folder / "run.h5", reference)


def test_ranks_of_other_variables_start_by_themselves(lab: Lab, reference: Path) -> None:
    if not MPIRUN.exists():
        pytest.skip("needs the extra [mpi]")
    rank = [sys.executable, "-m", "fedsim", "run", "tiny.toml", "--out", "run.h5"]
    words = [str(MPIRUN), "-n", "1", "env", "FEDSIM_TEST=1", *rank, ":", "-n", "1", *rank]
    running = Running(lab.folder, words, lab.folder / "run.h5")
    lab.started.append(running)
    running.until(0)
    assert not forked(running)
    assert running.ended().code == 0
    assert_same(lab.folder / "run.h5", reference)


def test_a_wrong_job_is_refused_once(lab: Lab) -> None:
    """Before the first rank forks the others, and after it."""
    for fault in ("train.lrr=1", "train.lr=-1", "cohort.size=11"):
        ended = lab.run("--set", fault, ranks=3)
        assert ended.code == 2, ended.err
        assert ended.err.count("tiny.toml") == 1, ended.err


def test_the_place_of_a_process_is_its_own_and_another_folder_is_another_place(tmp_path: Path) -> None:
    wait = [sys.executable, "-c", "import time; time.sleep(100)"]
    one, same, elsewhere, other = (
        subprocess.Popen(wait, cwd=folder, env=environment() | variables)
        for folder, variables in (
            (None, {"OMPI_COMM_WORLD_RANK": "0"}),
            (None, {"OMPI_COMM_WORLD_RANK": "1"}),
            (tmp_path, {"OMPI_COMM_WORLD_RANK": "1"}),
            (None, {"OMP_NUM_THREADS": "7"}),
        )
    )
    try:
        wait_for(lambda: all(Path(f"/proc/{each.pid}/exe").readlink() for each in (one, same, elsewhere, other)))
        assert place.of(one.pid) == place.of(same.pid)
        assert place.of(one.pid) != place.of(elsewhere.pid)
        assert place.of(one.pid) != place.of(other.pid)
        os.sched_setaffinity(same.pid, list(os.sched_getaffinity(0))[:1])
        assert len(os.sched_getaffinity(0)) == 1 or place.of(one.pid) != place.of(same.pid)
    finally:
        for each in (one, same, elsewhere, other):
            each.kill()
            each.wait()


def test_a_message_brings_its_files(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "file").open("w") as file:
        message.send(ours, {"name": "é\udcff", "long": "x" * 100_000}, [file.fileno()])
        found, (number,) = message.receive(theirs)
        assert found == {"name": "é\udcff", "long": "x" * 100_000}
        os.write(number, b"written")
        os.close(number)
        assert message.peer(theirs) == (os.getpid(), os.getuid())
        ours.close()
        with pytest.raises(EOFError):
            message.receive(theirs)
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.parametrize(("code", "name"), [(3, None), (0, None), (0, signal.SIGTERM), (0, signal.SIGKILL)])
def test_a_stand_in_ends_as_its_rank_has_ended(code: int, name: signal.Signals | None) -> None:
    """As `wait` tells, where the first rank still holds the ended one; the rank is a child that nobody has waited for yet."""
    rank = os.fork()
    if not rank:
        if name:
            os.kill(os.getpid(), name)
        os._exit(code)
    wait_for(lambda: state(rank) == "Z")
    status = stand_in._status(rank)
    assert status == os.waitpid(rank, 0)[1]
    assert stand_in._status(rank) is None
    stands = os.fork()
    if not stands:
        stand_in._end(status, socket.socket())
    assert os.waitpid(stands, 0)[1] == status
