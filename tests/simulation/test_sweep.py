"""fedsim sweep: every run once, the same as by `fedsim run`, whatever befalls the others; and no process is left behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import pytest
from rich.console import Console
from small_job import FAKE, SMALL

from fedsim.config import job
from fedsim.config.job import Job
from fedsim.errors import BadInput
from fedsim.simulation import launch
from fedsim.simulation.launchers.first_signals import SIGNALS
from fedsim.simulation.launchers.ranks import LAUNCHED
from fedsim.simulation.sweep import Outcome, Run, SweepProgress, plan, sweep
from fedsim.simulation.sweeping.worker import SERVER, Nest, Worker
from fedsim.storage.reader import RunReader

HANG = 150.0  # seconds after which a process is taken for lost
TABLE = {"rounds": 2, **SMALL, "data": FAKE | {"train_images": 120}}
GATED = """
import os
from dataclasses import dataclass
from pathlib import Path

from fedsim.methods.fedavg import FedAvg
from fedsim.federated.client_work import Train


@dataclass(frozen=True)
class Gated(FedAvg):
    def round(self, setting, state, fleet, r):
        if r == 2:
            Path(f"at-work-{setting.seed}").write_text(str(os.getpid()))
        while r == 2 and not Path("open").exists():
            fleet.run(Train.at(setting, r), [0], setting.aggregate.shared(state.memory, state.shared))
        return super().round(setting, state, fleet, r)
"""


def made(name: str, **more: object) -> Job:
    return job.check({**TABLE, "name": name, **more})


@contextmanager
def signals_kept() -> Iterator[None]:
    """A sweep listens to signals of its own."""
    before = {name: signal.getsignal(name) for name in SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def swept(folder: Path, *jobs: Job, processes: int) -> tuple[int, list[Path], str]:
    """The exit code, the files and what was printed. Each process takes seconds to start: tests have two where it matters."""
    console = Console(file=io.StringIO(), width=200)
    with signals_kept():
        code, files = sweep(jobs, folder, processes, console)
    return code, files, console.file.getvalue()  # type: ignore[attr-defined]


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What the sweep says of its runs to others."""
    return json.loads((folder / "sweep.json").read_text())["runs"]


# What is to be done


def test_runs_are_those_of_all_jobs_each_in_its_file(tmp_path: Path) -> None:
    jobs = [made("a", sweep={"seed": [0, 1], "train.lr": [0.1, 0.2]}), made("b")]
    names = ["a-seed0-lr0.1", "a-seed0-lr0.2", "a-seed1-lr0.1", "a-seed1-lr0.2", "b"]
    assert [run.out for run in plan(jobs, tmp_path)] == [tmp_path / f"{name}.h5" for name in names]


def test_what_cannot_be_is_reported_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"two runs would write .*/a\.h5"):
        plan([made("a"), made("a", seed=1)], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--out .*file"):
        plan([made("a")], tmp_path / "file")
    (tmp_path / "a.h5").touch()
    with pytest.raises(BadInput, match=r"a\.h5 cannot be read"):
        plan([made("a")], tmp_path)


@pytest.mark.parametrize("name", LAUNCHED)
def test_it_is_not_for_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match="without mpirun"):
        sweep([made("a")], tmp_path / "runs", 1, Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


# What is told


@pytest.mark.parametrize(
    ("codes", "signalled", "code"),
    [
        ((0, 0, 0), False, 0),
        ((0, 0, 0), True, 0),  # the signal came when all was done
        ((0, 2, 0), False, 2),
        ((0, 2, 1), False, 1),
        ((0, 3, 0), False, 3),  # by its time limit
        ((1, 3, 0), False, 1),
        ((1, 3, 0), True, 3),
        ((0,), True, 3),  # the others never began
    ],
)
def test_the_exit_code_is_the_worst_of_the_runs(tmp_path: Path, codes: tuple[int, ...], signalled: bool, code: int) -> None:
    tally = SweepProgress(runs := [Run(made(name), tmp_path / f"{name}.h5") for name in "abc"], Console(file=io.StringIO()))
    tally.outcomes = {run.out: Outcome(each) for run, each in zip(runs, codes, strict=False)}
    assert tally.close(signalled) == code


def test_a_terminal_sees_how_far_it_is(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    run = Run(made("a"), tmp_path / "a.h5")
    with SweepProgress([run, Run(made("b"), tmp_path / "b.h5")], console) as tally:
        tally.add(run, Outcome(2, "what is wrong\nand more"))
        tally.look([])
        tally.bar.refresh()
        assert tally.bar.tasks[0].percentage == 50
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/2 runs" in told
    assert "a  failed: what is wrong" in told


# Runs


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job], tuple[int, list[Path], str]]:
    folder = tmp_path_factory.mktemp("sweep")
    jobs = [made("a", sweep={"seed": [0, 1]}), made("b", seed=2)]
    return folder, jobs, swept(folder, *jobs, processes=2)


@pytest.mark.processes
def test_a_run_of_a_sweep_is_the_run_alone(done, tmp_path: Path) -> None:
    folder, jobs, (code, files, _) = done
    assert code == 0
    assert files == [folder / "a-seed0.h5", folder / "a-seed1.h5", folder / "b.h5"]
    for alone, file in zip([*job.runs(jobs[0]), jobs[1]], files, strict=True):
        with signals_kept():
            assert launch.main(alone, tmp_path / file.name, "auto") == 0
        mine, its = (RunReader(path).attributes for path in (tmp_path / file.name, file))
        assert its["finished"]
        assert [mine[name] for name in ("weights_sha256", "job_sha256", "seed")] == [
            its[name] for name in ("weights_sha256", "job_sha256", "seed")
        ]


@pytest.mark.processes
def test_it_says_a_line_for_each_run_and_nothing_of_what_they_say(done) -> None:
    first, *lines = done[2][2].splitlines()
    assert first == f"3 runs in 2 processes; writing {done[0]}"
    expected = [f"{path.stem:<7}  accuracy {RunReader(path).column('accuracy')[-1]:>6.1%}" for path in done[2][1]]
    assert sorted(line.rpartition("  ")[0] for line in lines) == sorted(expected)


@pytest.mark.processes
def test_it_lists_its_runs_for_those_who_watch(done) -> None:
    found = listed(done[0])
    assert {name: entry["state"] for name, entry in found.items()} == dict.fromkeys(("a-seed0.h5", "a-seed1.h5", "b.h5"), "done")
    assert {entry["rounds"] for entry in found.values()} == {2}


@pytest.mark.processes
def test_what_is_finished_is_left_as_it_is(done) -> None:
    folder, jobs, (_, files, _) = done
    before = [path.read_bytes() for path in files]
    code, again, said = swept(folder, *jobs, processes=1)
    assert (code, again, said.count("finished already")) == (0, files, 3)
    assert [path.read_bytes() for path in files] == before


@pytest.mark.full
@pytest.mark.processes
def test_a_finished_run_whose_accuracy_is_damaged_stops_no_other(done, tmp_path: Path) -> None:
    folder, jobs, (_, files, _) = done
    shutil.copytree(folder, tmp_path / "runs")
    with h5py.File(tmp_path / "runs" / "a-seed0.h5", "r+") as file:
        file["rounds/accuracy"][1] = 0.5
    code, again, said = swept(tmp_path / "runs", *jobs, processes=1)
    assert (code, len(again), said.count("finished already")) == (0, len(files), 3)
    assert re.search(r"a-seed0 +finished already; .*rounds/accuracy is damaged in round 1", said)


@pytest.mark.processes
def test_a_file_of_another_job_is_refused_before_anything_begins(done) -> None:
    folder, jobs, _ = done
    with pytest.raises(BadInput, match=r"b\.h5 already holds another job \(there seed = 2, here 3\): choose another --out"):
        plan([jobs[0], made("b", seed=3)], folder)


@pytest.mark.processes
def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = made("bad", model={"factory": "nowhere:make"})
    wild = made("wild", model={"width": 4, "norm": "none"}, train={"batch": 10, "lr": 1e30}, rounds=50)
    code, files, said = swept(tmp_path, bad, wild, made("good"), processes=1)
    out, err = capfd.readouterr()
    assert code == 1
    assert files == [tmp_path / "wild.h5", tmp_path / "good.h5"]
    assert "good  accuracy" in said
    assert "bad   failed: " in said
    assert "wild  failed: [rank 0, client " in said
    assert out == ""
    assert err.startswith("2 of 3 runs failed:\nbad: ")
    assert "nowhere" in err
    assert "wild: [rank 0, client " in err
    states = {name: (entry["state"], entry["message"].partition("client")[0]) for name, entry in listed(tmp_path).items()}
    assert states["good.h5"] == ("done", "")
    assert states["wild.h5"] == ("failed", "[rank 0, ")
    assert states["bad.h5"][0] == "failed"
    assert "Traceback" not in err


# Signals and deaths, met by runs that wait in their second round until they are let go


class Gate:
    """A sweep of three runs, as a command in a folder and a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "gated.py").write_text(GATED)
        table = {key: value for key, value in TABLE.items() if key != "method"}
        (folder / "job.toml").write_text(toml(table) + '[method]\nname = "gated:Gated"\n[sweep]\nseed = [0, 1, 2]\n')
        self.begin(processes=2)

    def begin(self, processes: int) -> None:
        command = [sys.executable, "-m", "fedsim", "sweep", "job.toml", "--processes", str(processes), "--out", "."]
        plain = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=plain | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def worker(self, seed: int) -> int:
        """The process at work on a run, once it is."""
        mark, give_up = self.folder / f"at-work-{seed}", time.monotonic() + HANG
        while not (mark.exists() and mark.read_text()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < give_up, f"seed {seed} has not begun in {HANG} s"
            time.sleep(0.01)
        return int(mark.read_text())

    def open(self) -> None:
        (self.folder / "open").touch()

    def ended(self) -> tuple[int, str, str]:
        """The exit code and both streams, once all processes of the session have gone."""
        out, err = self.process.communicate(timeout=HANG)
        self.gone()
        return self.process.returncode, out, err

    def gone(self) -> None:
        give_up = time.monotonic() + HANG
        while left := living(self.process.pid):
            assert time.monotonic() < give_up, f"left behind: {left}"
            time.sleep(0.01)


def toml(table: dict[str, object]) -> str:
    import tomli_w

    return tomli_w.dumps(table)


def living(session: int) -> list[int]:
    """The processes of a session, those left out that only wait to be forgotten."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended since
        found += [int(entry.name)] * (int(its) == session and state != "Z")
    return found


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    for process in living(gate.process.pid):
        os.kill(process, signal.SIGKILL)
    gate.process.communicate()


@pytest.mark.parametrize("everybody", [pytest.param(False, id="SIGTERM", marks=pytest.mark.full), pytest.param(True, id="Ctrl-C")])
@pytest.mark.processes
def test_a_signal_stops_all_gently_and_the_same_command_goes_on(gate: Gate, everybody: bool) -> None:
    gate.worker(0), gate.worker(1)
    if everybody:
        os.killpg(gate.process.pid, signal.SIGINT)
    else:
        os.kill(gate.process.pid, signal.SIGTERM)
    assert {name: entry["state"] for name, entry in listed(gate.folder).items()} in (
        {"job-seed0.h5": "running", "job-seed1.h5": "running", "job-seed2.h5": "waiting"},
        dict.fromkeys(("job-seed0.h5", "job-seed1.h5", "job-seed2.h5"), "stopped"),
    )
    code, out, err = gate.ended()
    assert {entry["state"] for entry in listed(gate.folder).values()} == {"stopped"}
    assert (code, err) == (3, "stopped; 0 of 3 runs are done, and the same command goes on from there\n")
    assert out.count("stopped after round 1") == 2
    assert [RunReader(gate.folder / f"job-seed{seed}.h5").rounds for seed in (0, 1)] == [1, 1]
    assert not (gate.folder / "job-seed2.h5").exists()
    if everybody:
        return
    gate.open()
    gate.begin(processes=1)
    assert gate.ended()[0] == 0
    assert all(RunReader(gate.folder / f"job-seed{seed}.h5").attributes["finished"] for seed in range(3))


@pytest.mark.processes
def test_workers_are_forked_from_one_process_that_has_imported_all(gate: Gate) -> None:
    """They share its memory: what is their own is less than what importing torch makes (280 MB)."""
    workers = [gate.worker(0), gate.worker(1)]
    assert len({_parent(worker) for worker in workers}) == 1
    assert _parent(_parent(workers[0])) == gate.process.pid
    for worker in workers:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:])
        assert int(lines["Private_Dirty"].split()[0]) < 150_000, lines  # kB
    gate.open()
    assert gate.ended()[0] == 0


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.processes
def test_another_fork_server_is_used_as_it_is(tmp_path: Path) -> None:
    """One of the caller's goes on, with what it was told to import."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["json"])
    before = context.Process(target=time.sleep, args=(0,))
    before.start()
    server = SERVER._forkserver_pid
    nest = Nest()
    worker = Worker(nest, False)
    worker.end()
    nest.close()
    before.join()
    try:
        assert SERVER._forkserver_pid == server
        assert SERVER._preload_modules == ["json"]
    finally:
        SERVER._stop()
        context.set_forkserver_preload(["__main__"])
    nest = Nest()
    Worker(nest, False).end()
    nest.close()
    assert SERVER._forkserver_pid is None


@pytest.mark.full
@pytest.mark.processes
def test_a_worker_that_dies_loses_its_run_alone(gate: Gate) -> None:
    lost = gate.worker(0)
    gate.worker(1)
    os.kill(lost, signal.SIGKILL)
    gate.worker(2)  # by a process that takes its place
    gate.open()
    code, out, err = gate.ended()
    assert code == 1
    assert "1 of 3 runs failed:\njob-seed0: lost: its process was killed by SIGKILL; its checkpoint stands" in err
    assert [RunReader(gate.folder / f"job-seed{seed}.h5").attributes["finished"] for seed in range(3)] == [False, True, True]
    assert "job-seed0  failed: lost" in out
    assert "unfinished" in out.partition("\n\n")[2]  # the table


@pytest.mark.full
@pytest.mark.processes
def test_no_worker_outlives_a_sweep_that_was_killed(gate: Gate) -> None:
    gate.worker(0), gate.worker(1)
    gate.process.kill()
    gate.gone()
    assert [RunReader(gate.folder / f"job-seed{seed}.h5").rounds for seed in (0, 1)] == [1, 1]
