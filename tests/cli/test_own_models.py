"""Models as strangers bring them in real runs: the same weights on every fleet and on ranks; which plans are refused, and how."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from captured_console import Fedsim
from processes import MPIRUN, Running
from small_job import FAKE, small_job

import fedsim as package
from fedsim.storage.reader import RunReader, read_model

FIXTURES = str(Path(__file__).parents[1] / "fixtures")
IMAGES = FAKE | {"channels": 3, "train_images": 24, "test_images": 8}
OURS = {"partition": {"name": "iid", "clients": 2}, "train": {"batch": 5}}
JOB = small_job(1, data=IMAGES, model={"factory": "guest:make"}, **OURS)
MAKE = """
import model_kinds


def make(shape, classes):
    made = model_kinds.EVERYWHERE.get({0!r}) or model_kinds.SERIAL[{0!r}][0]
    return made()
"""
BOTH = [
    "attention",
    "a layer used twice",
    "tied weights",
    "BatchNorm",
    "a norm used twice",
    "frozen parameters",
    "channels as rows",
    "norm and pool by keyword",
    "a plain tensor attribute",
    "transposed convolution",
]
STACKED = ["--set", "execution.fleet=packed", "--set", "execution.packs=1"]


@pytest.fixture
def bring(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """The job's model becomes one of a kind."""
    (tmp_path / "job.toml").write_text(JOB)

    def call(kind: str) -> None:
        sys.modules.pop("guest", None)
        (tmp_path / "guest.py").write_text(MAKE.format(kind))

    yield call
    sys.modules.pop("guest", None)


def ran(fedsim: Fedsim, out: str, *options: str) -> dict[str, torch.Tensor]:
    """The model after a run."""
    ended = fedsim("run", "job.toml", "--out", out, *options)
    assert ended.code == 0, ended.err
    return read_model(out)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if place % 3 == 0 else pytest.mark.full) for place, kind in enumerate(BOTH)])
def test_a_run_gives_the_same_weights_on_both_fleets(fedsim: Fedsim, bring: Callable[[str], None], kind: str) -> None:
    bring(kind)
    alone, together = ran(fedsim, "serial.h5"), ran(fedsim, "packed.h5", *STACKED)
    assert RunReader("packed.h5").attributes["plan"] != RunReader("serial.h5").attributes["plan"]
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("kind", ["checkpointed norm", "LSTM", "channels as rows by view"])
def test_a_model_that_cannot_be_stacked_runs_on_the_serial_fleet(fedsim: Fedsim, bring: Callable[[str], None], kind: str) -> None:
    bring(kind)
    assert ran(fedsim, "serial.h5")
    assert "Traceback" not in fedsim("show", "serial.h5").err


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the extra [mpi]")
def test_ranks_give_the_bits_of_one_process(
    fedsim: Fedsim, bring: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring("a norm used twice")
    ran(fedsim, "alone.h5")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([FIXTURES, os.environ.get("PYTHONPATH", "")]))
    command = [str(MPIRUN), "-n", "3", sys.executable, "-m", "fedsim", "run", "job.toml", "--out", "ranks.h5"]
    running = Running(tmp_path, command, tmp_path / "ranks.h5")
    try:
        ended = running.ended()
    finally:
        running.kill()
    assert ended.code == 0, ended.err
    assert RunReader("ranks.h5").attributes["weights_sha256"] == RunReader("alone.h5").attributes["weights_sha256"] != ""


BRANCH = "takes a branch, a count or a Python number from a tensor's value"


def test_the_plan_stays_serial_and_says_so(fedsim: Fedsim, bring: Callable[[str], None]) -> None:
    bring("a branch on a value")
    free = ["--set", "execution.plan=auto", "--set", "execution.memory_format=contiguous"]
    ended = fedsim("run", "job.toml", "--out", "auto.h5", *free)
    assert ended.code == 0, ended.err
    note = "note: clients are trained one after the other, since this model cannot be stacked: its forward " + BRANCH
    assert note in ended.out.replace("\n", " ") + ended.err
    assert '"fleet": "serial"' in RunReader("auto.h5").attributes["plan"]


def test_a_stacked_fleet_that_cannot_be_is_refused(fedsim: Fedsim, refuses: Callable[..., str], bring: Callable[[str], None]) -> None:
    """By its name, also where a plan is that of another run."""
    bring("a branch on a value")
    for resume in ("auto", "never"):
        told = refuses("run", "job.toml", "--resume", resume, *STACKED)
        assert 'job.toml: [execution] fleet = "packed": model.factory = "guest:make" cannot be computed so: ' in told
        assert BRANCH in told
        assert told.count("\n") == 1
    bring("residual")
    ran(fedsim, "residual.h5", *STACKED)
    bring("a branch on a value")
    told = refuses("run", "job.toml", "--set", "execution.plan=residual.h5")
    assert 'job.toml: [execution] plan = "residual.h5", which has fleet = "packed": model.factory' in told
    assert BRANCH in told


def test_a_stopped_run_goes_on_serially_whatever_fleet_is_asked_for(fedsim: Fedsim, bring: Callable[[str], None]) -> None:
    bring("a branch on a value")
    stopped = package.run("job.toml", out="run.h5", set={"rounds": 2}, callback=lambda done: done.stop(), progress=False)
    assert not stopped.attributes["finished"]
    ended = fedsim("run", "job.toml", "--set", "rounds=2", "--out", "run.h5", "--resume", "must", *STACKED)
    assert ended.code == 0, ended.err
    assert "note: the run goes on under the plan it began with" in ended.out + ended.err
    assert RunReader("run.h5").attributes["finished"]


def test_sparse_kernels_that_cannot_be_are_refused(refuses: Callable[..., str], bring: Callable[[str], None]) -> None:
    bring("transformer block")
    told = refuses("run", "job.toml", "--set", "execution.kernels=sparse")
    assert 'job.toml: [execution] kernels = "sparse": model.factory = "guest:make" cannot be computed so: a layer\'s weight is read' in told
    assert told.count("\n") == 1
