"""Images of a function of one's own: the same as from a file, seeded, and refused where it gives others each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_module import put_module
from processes import HANG, MPIRUN, environment
from small_job import SMALL, small_job

import fedsim
from fedsim import BadInput
from fedsim.config import own_code
from fedsim.config.job import check
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import populate
from fedsim.data.settings import DataSettings
from fedsim.data.sources import open_data
from fedsim.simulation.experiment import build_experiment

CODE = """
import random

import numpy as np
import torch

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 1, 6, 6), dtype=np.uint8)
LABELS = np.arange(90) % 3


def plain():
    return {"x": PIXELS, "y": LABELS, "client": np.arange(90) % 4}


def tensors():
    test = {"x_test": torch.zeros(4, 1, 6, 6, dtype=torch.uint8), "y_test": [0, 1, 2, 0]}
    return {"x": torch.from_numpy(PIXELS), "y": torch.from_numpy(LABELS)} | test


def drawn():
    x = torch.rand(40, 1, 6, 6).numpy() + np.random.rand(40, 1, 6, 6)
    return {"x": (100 * x).astype(np.uint8), "y": [random.randrange(3) for _ in range(40)]}


def restless():
    return {"x": np.random.default_rng().integers(0, 256, (90, 1, 6, 6), dtype=np.uint8), "y": LABELS}


def restless_users():
    return {"x": PIXELS, "y": LABELS, "client": np.random.default_rng().permutation(90) % 4}


def read():
    return {"x": PIXELS, "y": np.roll(LABELS, int(open("shift.txt").read()))}


def listed():
    return [PIXELS, LABELS]


def other_names():
    return {"images": PIXELS, "labels": LABELS}


def failing():
    raise ZeroDivisionError("no images today")


def with_argument(root):
    return plain()


def short():
    return {"x": PIXELS, "y": LABELS[:9]}
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_module(tmp_path, "my_images", CODE, monkeypatch)


def job(function: str, **more: Any) -> dict[str, Any]:
    return {"rounds": 2, "method": {"name": "fedavg"}, "partition": {"clients": 4}, "data": {"factory": f"my_images:{function}", **more}}


def test_it_gives_what_a_file_with_the_same_arrays_gives(room: Path) -> None:
    import my_images

    np.savez(room / "mine.npz", **my_images.plain())
    made = open_data(DataSettings(factory="my_images:plain"), 0)
    stored = open_data(DataSettings(name="file", path="mine.npz"), 0)
    for one, other in zip(made, stored, strict=True):
        assert torch.equal(one.x, other.x)  # type: ignore[attr-defined]
        assert torch.equal(one.y, other.y)  # type: ignore[attr-defined]
        assert torch.equal(one.users, other.users)  # type: ignore[attr-defined]
        assert (one.mean, one.std, one.name) == (other.mean, other.std, "my_images:plain")
    fewer, _ = open_data(DataSettings(factory="my_images:plain", train_images=30), 0)
    assert len(fewer) == 30


def test_tensors_and_a_test_set_of_its_own() -> None:
    train, test = open_data(DataSettings(factory="my_images:tensors"), 0)
    assert (len(train), len(test), test.labels(torch.arange(4)).tolist()) == (90, 4, [0, 1, 2, 0])


def test_its_draws_follow_the_seed_and_leave_the_callers_generators_alone() -> None:
    before = torch.get_rng_state()
    two = PartitionSettings(clients=2, min_images=1)
    first, again, other = (populate(DataSettings(factory="my_images:drawn"), two, seed) for seed in (3, 3, 4))
    assert first.data_sha256 == again.data_sha256 != other.data_sha256
    assert torch.equal(before, torch.get_rng_state())
    assert build_experiment(check(job("drawn") | {"partition": {"clients": 2, "min_images": 1}})).population.clients == 2


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("listed", 'data.factory = "my_images:listed" gave a list; it should return a dict of arrays'),
        ("other_names", "gave an array 'images', which is not known. Known are: x, y, client"),
        ("failing", 'data.factory = "my_images:failing" failed: ZeroDivisionError: no images today'),
        ("with_argument", "missing 1 required positional argument: 'root'; it is called without arguments"),
        ("short", "90 images and 9 labels; each image needs one label"),
        ("nothing", "[data] factory = 'my_images:nothing': my_images has no 'nothing'; it has plain, tensors"),
        ("restless", "gives other images, labels or users each time it is called"),
        ("restless_users", "gives other images, labels or users each time it is called"),
    ],
)
def test_what_is_wrong_is_said(function: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        build_experiment(check(job(function)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "a.h5"}, "[data] path does not apply to data.factory"),
        ({"classes": 3}, "[data] classes does not apply to data.factory"),
        ({"name": "cifar10"}, '[data] name = "cifar10" is not used: data.factory gives the images'),
        ({"factory": "my_images"}, 'data.factory = "my_images" should be "package.module:function"'),
    ],
)
def test_fields_that_do_not_apply(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        check(job("plain", **fields))
    assert said in str(caught.value)


def test_a_missing_module_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        BadInput, match=r"\[data\] factory = 'nowhere:images': module 'nowhere' cannot be imported: .* looked for in the work"
    ):
        build_experiment(check(job("plain", factory="nowhere:images")))


def test_a_run_under_other_code_of_it_does_not_go_on(room: Path) -> None:
    table = job("plain") | {"execution": SMALL["execution"]}
    assert own_code.names(check(table)) == ["my_images:plain"]
    whole = fedsim.run(table, out=room / "whole.h5", progress=False)
    fedsim.run(table, out=room / "run.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    assert fedsim.run(table, out=room / "run.h5", progress=False).attributes["weights_sha256"] == whole.attributes["weights_sha256"]
    fedsim.run(table, out=room / "two.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    (room / "my_images.py").write_text(CODE + "\n# another thought\n")
    with pytest.raises(BadInput, match="was made by other code of my_images:plain"):
        fedsim.run(table, out=room / "two.h5", progress=False)


@pytest.mark.processes
def test_ranks_that_get_other_images_are_refused(room: Path) -> None:
    sections: dict[str, Any] = {"data": {"factory": "my_images:read"}, "partition": {"name": "iid", "clients": 4}}
    (room / "job.toml").write_text(small_job(1, **sections))
    for folder, shift in {room: 0, room / "other": 1}.items():
        folder.mkdir(exist_ok=True)
        (folder / "shift.txt").write_text(str(shift))
        (folder / "my_images.py").write_text(CODE)
    rank = [sys.executable, "-m", "fedsim", "run", str(room / "job.toml"), "--out", str(room / "run.h5")]
    command = [str(MPIRUN), "-n", "1", "-wdir", str(room), *rank, ":", "-n", "1", "-wdir", str(room / "other"), *rank]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG, check=False)
    assert ended.returncode == 2
    assert "the ranks of a run must be alike, but the hash of images and labels is" in ended.stderr
