"""FedMef as a user meets it: what a job may not ask for, what a run leaves on record, and what can be made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captured_console import console
from small_job import small_job

from fedsim.config import job
from fedsim.simulation.exported.network import module_of
from fedsim.storage.reader import RunReader

JOBS = Path(__file__).parents[2] / "jobs"
SMOKE = small_job(
    4,
    model={"width": 4, "norm": "nsconv"},
    train={"activation_keep": 0.3},
    method={"name": "fedmef", "density": 0.2, "adjust_every": 2, "stop_round": 8, "penalty": 0.01},
)


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    return console(SMOKE, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("path", sorted(JOBS.rglob("fedmef*.toml")), ids=lambda path: path.stem)
def test_every_job_is_valid(path) -> None:
    for one in job.runs(job.load(path)):
        assert one.method.name == "fedmef"


@pytest.mark.parametrize("command", ["run", "estimate"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.activation_keep=0"], "activation_keep"),
        (["train.activation_keep=1.5"], "activation_keep"),
        (["train.activation_layers='first'"], "activation_layers"),
        (["train.activation_cache='float'"], "activation_cache"),
        (["method.budget=0"], "budget = 0: should be at least 1"),
        (["method.extrusion_rounds=2"], "extrusion_rounds = 2: should be below adjust_every = 2"),
        (["method.density=0.001"], "conv1 stays dense with 36"),
        (["method.blocks='stages'"], "no stages in a model of conv2, fc1, fc2"),
        (["model.nsconv_over='most'"], "nsconv_over = 'most' is not known. There are: all, kept"),
    ],
)
def test_what_cannot_be_is_reported_and_nothing_is_written(fedsim, tmp_path, command, settings, said) -> None:
    code, text = fedsim(command, *settings)
    assert code == 2
    assert said in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


def test_a_run_tells_its_extrusions_and_becomes_a_plain_module(fedsim, tmp_path) -> None:
    code, text = fedsim("run")
    assert code == 0, text
    (path,) = tmp_path.rglob("*.h5")
    reader = RunReader(path)
    before, after = reader.column("marked_norm_before"), reader.column("marked_norm_after")
    assert np.isfinite(before).tolist() == [False, False, True, False, True]
    assert (np.isfinite(after) == np.isfinite(before)).all()
    assert reader.column("density").max() <= 0.2
    module = module_of(path)
    assert {type(layer) for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)} == {torch.nn.Conv2d}
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
