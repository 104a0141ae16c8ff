"""Mirrors: each tracker holds the rows of the run file, also after a stop; what fails is one line, and harms nothing."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import tracked
from cases import ROUNDS, run
from run_files import assert_same
from small_disk import small_disk

from fedsim.config.job import check, identity, resolved
from fedsim.config.sections import Record
from fedsim.errors import BadInput
from fedsim.simulation.mirrors import names
from fedsim.simulation.mirrors.rows import described, rows
from fedsim.simulation.mirrors.sender import Mirror
from fedsim.storage.reader import RunReader

ALL = [pytest.param(name, marks=() if name == "csv" else pytest.mark.full) for name in names.PLACES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirrors")
    assert run("static-mask", "serial", folder, folder / "run.h5") == 0
    return folder / "run.h5"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(finished, tmp_path / "run.h5"))


def mirrored(name: str, out: Path, done: int, *last: int) -> list[str]:
    """What is said by a mirror that is told of some rows of a run file."""
    said: list[str] = []
    with Mirror(name, out, said.append) as mirror:
        mirror.begin(done)
        for r in last:
            mirror.row(r)
    return said


def expected(out: Path) -> tracked.Held:
    reader = RunReader(out)
    columns = {name: reader.column(name) for name in reader.names()}
    columns |= {f"timing/{name}": reader.timing(name) for name in reader.names("timing")}
    return {
        name: {r: float(value) for r, value in enumerate(column) if not np.isnan(value)}
        for name, column in columns.items()
        if not np.isnan(column).all()
    }


def check_held(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tracker holds what the run file holds; TensorBoard as float32."""
    found, sha = tracked.held(name, out, monkeypatch)
    hoped = expected(out)
    assert found.keys() == hoped.keys()
    for column, values in hoped.items():
        assert found[column] == pytest.approx(values, rel=1e-6 if name == "tensorboard" else 0, abs=0)
    assert sha == ("" if name == "csv" else RunReader(out).attributes["weights_sha256"])


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", ["csv", "tensorboard", *(pytest.param(name, marks=pytest.mark.full) for name in ("mlflow", "wandb-offline"))]
)
def test_each_round_is_there_once_after_a_stop(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after row 2, whose checkpoint was of round 1: row 2 is done again."""
    assert mirrored(name, copy, -1, 0, 2) == []
    assert mirrored(name, copy, 1, 2, ROUNDS) == []
    check_held(name, copy, monkeypatch)


@pytest.mark.processes
@pytest.mark.parametrize("name", ALL)
def test_a_mirror_that_begins_late_gets_the_rounds_before(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirrored(name, copy, ROUNDS - 1, ROUNDS) == []
    check_held(name, copy, monkeypatch)


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in names.PLACES if name not in ("mlflow", "wandb-offline")])
def test_a_run_that_begins_afresh_leaves_nothing_of_the_one_before(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert mirrored(name, copy, -1, ROUNDS) == []
    check_held(name, copy, monkeypatch)


def test_what_trackers_are_told_about_a_run(finished: Path) -> None:
    run = described(finished)
    assert run.fields["train.lr"] == 0.05
    assert run.fields["data.augment"] == "['crop', 'flip', 'cutout']"
    assert run.columns["bytes_up"] == ("B", "sent by all clients of the cohort")
    assert run.columns["timing/compute"][0] == "s"
    assert (run.job_sha256, run.facts["method"]) == tuple(RunReader(finished).attributes[name] for name in ("job_sha256", "method"))
    assert [r for r, _ in rows(finished, 1, 99)] == list(range(1, ROUNDS + 1))


def test_a_csv_gains_columns_and_loses_rows(copy: Path) -> None:
    from fedsim.simulation.mirrors.csv_table import CSVTable

    table = CSVTable(copy.with_name("t.csv"), described(copy), 1, copy)
    table.write(2, {"accuracy": 0.1, 'a, "new"\none': 3.0})
    table.close(described(copy))
    lines = copy.with_name("t.csv").read_text()
    assert lines.splitlines()[0].startswith("round,accuracy,")
    assert lines.count('"a, ""new""\none"') == 1
    assert lines.splitlines()[-1].startswith("2,0.1,")
    assert lines.splitlines()[-1].endswith(",3")


# ---- whole runs


@pytest.mark.processes
def test_a_mirror_changes_no_result_and_no_identity(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped under one mirror, continued under another."""
    out, asked = tmp_path / "run.h5", iter(range(1000))
    assert run("static-mask", "serial", finished.parent, out, lambda: next(asked) >= 17, {"record": {"mirror": "tensorboard"}}) == 3
    done = RunReader(out).rounds
    assert 0 <= done < ROUNDS
    assert run("static-mask", "serial", finished.parent, out, change={"record": {"mirror": "csv"}}) == 0
    assert_same(out, finished)
    check_held("csv", out, monkeypatch)
    found, sha = tracked.held("tensorboard", out, monkeypatch)
    assert (set(found["density"]), sha) == (set(range(done + 1)), "")


def test_the_job_says_where_and_not_what() -> None:
    plain, other = (check({"method": {"name": "fedavg"}} | more) for more in ({}, {"record": {"mirror": "csv"}}))
    assert identity(plain) == identity(other)
    assert 'mirror = "csv"' in resolved(other)
    assert set(get_args(get_type_hints(Record)["mirror"])) == {"", *names.PLACES}
    with pytest.raises(
        BadInput, match=r'\[record\] mirror = "excel": should be "" or "csv" or "tensorboard" or "mlflow" or "wandb-offline"'
    ):
        check({"method": {"name": "fedavg"}, "record": {"mirror": "excel"}})


# ---- faults


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a library in front of the real one."""

    def put(library: str, text: str) -> None:
        (tmp_path / "front" / library).mkdir(parents=True)
        (tmp_path / "front" / library / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "front"))

    return put


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("tensorboard", "tensorboard"),
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in (("mlflow", "mlflow"), ("wandb-offline", "wandb"))),
    ],
)
def test_a_missing_library_is_named_before_anything_is_written(
    name: str, library: str, broken: Any, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken(library, f"raise ModuleNotFoundError(\"No module named '{library}'\")")
    capfd.readouterr()
    assert run("static-mask", "serial", finished.parent, tmp_path / "run.h5", change={"record": {"mirror": name}}) == 2
    missing = f"(ModuleNotFoundError: No module named '{library}'); pip install 'fedsim[trackers]'"
    assert capfd.readouterr() == ("", f'[record] mirror = "{name}" needs the extra `trackers` {missing}\n')
    assert [path.name for path in tmp_path.iterdir()] == ["front"]


@pytest.mark.processes
@pytest.mark.parametrize("name", ALL)
def test_a_place_that_is_taken_is_said_once(name: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run ends as one without a mirror."""
    place = names.PLACES[name].path(tmp_path / "run.h5")
    place.mkdir() if name == "csv" else place.write_text("mine")
    capfd.readouterr()
    assert run("static-mask", "serial", finished.parent, tmp_path / "run.h5", change={"record": {"mirror": name}}) == 0
    said = capfd.readouterr()
    assert said.out.count("note: the mirror ") == 1
    assert f"run.h5.{names.PLACES[name].ending} has failed (" in said.out
    assert said.err == ""
    assert_same(tmp_path / "run.h5", finished)


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", ["csv", pytest.param("tensorboard", marks=pytest.mark.full), pytest.param("mlflow", marks=pytest.mark.full)]
)
def test_a_full_disk_ends_the_mirror_alone(name: str, copy: Path) -> None:
    """The run file is on another disk than the mirror, through a link."""
    with small_disk("4k") as disk:
        place = names.PLACES[name].path(copy)
        (disk / "filled").write_bytes(b"x" * 4096)
        if name == "csv":
            place.with_name(f"{place.name}.new").symlink_to(disk / "aside")
        else:
            place.symlink_to(disk)
        said = mirrored(name, copy, -1, 1, 2, ROUNDS)
        assert len(said) == 1
        assert said[0].startswith(f"note: the mirror {place} has failed (")
        assert "No space left on device" in said[0]


@pytest.mark.processes
def test_a_tracker_that_dies_is_said_once(broken: Any, copy: Path) -> None:
    broken("wandb", "import os\nclass Settings:\n    def __init__(self, **_): pass\ndef init(**_): os._exit(7)\n")
    said: list[str] = []
    with Mirror("wandb-offline", copy, said.append) as mirror:
        mirror.begin(-1)
        for r in range(ROUNDS + 1):
            mirror.row(r)
    assert said == [f"note: the mirror {copy}.wandb has failed (its process ended with code 7); the run goes on without it"]


@pytest.mark.processes
def test_a_tracker_that_hangs_costs_the_run_nothing_but_the_wait_at_the_end(
    broken: Any, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is told than a pipe holds."""
    broken("wandb", "import time\nclass Settings:\n    def __init__(self, **_): pass\ndef init(**_): time.sleep(100)\n")
    monkeypatch.setattr("fedsim.simulation.mirrors.sender.ENDS", 0.1)
    said: list[str] = []
    mirror = Mirror("wandb-offline", copy, said.append)
    process = mirror._process
    assert process is not None
    mirror.begin(-1)
    for r in range(20_000):
        mirror.row(r)
    mirror.close()
    assert said == [f"note: {copy}.wandb is still being written, by process {process.pid}"]
    process.kill()
    process.wait()


@pytest.mark.processes
@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_run_that_was_killed_are_copied_and_nothing_stays(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process outlives the run for the moments that it needs; signals to the run do not reach it."""
    said: list[str] = []
    mirror = Mirror(name, copy, said.append)
    process = mirror._process
    assert process is not None
    assert process.stdin is not None
    assert os.getsid(process.pid) == process.pid
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(each)
    mirror.begin(-1)
    mirror.row(ROUNDS)
    process.stdin.close()  # as the kernel does
    assert process.wait(60) == 0
    assert not of_session(process.pid)
    mirror.close()
    assert said == []
    check_held(name, copy, monkeypatch)


def of_session(leader: int) -> list[int]:
    """Processes that a mirror has left behind, after a moment to end."""
    give_up = time.monotonic() + 20
    while found := [
        pid
        for pid in map(int, filter(str.isdecimal, (entry.name for entry in Path("/proc").iterdir())))
        if pid != leader and _session(pid) == leader
    ]:
        if time.monotonic() > give_up:
            return found
        time.sleep(0.05)
    return []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def test_the_processes_environment_leads_to_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "PATH"):
        monkeypatch.setenv(name, "mine")
    before = dict(os.environ)
    for name in names.PLACES:
        found = names.environment(name, Path("run.h5"))
        assert found["PATH"] == "mine"
        assert not {"WANDB_API_KEY", "MLFLOW_TRACKING_URI"} & found.keys()
        assert found.get("WANDB_MODE") in (None, "offline")
    assert dict(os.environ) == before
