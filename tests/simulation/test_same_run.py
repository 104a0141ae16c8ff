"""A run goes on only with the images, the code and the first weights that it began with, and all ranks have the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from launchers import launcher
from processes import environment
from small_job import small_job

import fedsim
from fedsim.errors import BadInput

NETWORK = """
import numpy as np
import torch
from torch import nn

import the_blocks


class Net(nn.Module):
    def __init__(self, size, classes):
        super().__init__()
        self.one, self.two = nn.Linear(size, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.two(the_blocks.activation(self.one(x.flatten(1))))


def make(shape, classes):
    return Net(shape[0] * shape[1] * shape[2], classes)


def loaded(shape, classes):
    module = make(shape, classes)
    with torch.no_grad():
        module.two.bias += float(open("bias.txt").read())
    return module


def unseeded(shape, classes):
    module = make(shape, classes)
    with torch.no_grad():
        module.two.bias += torch.from_numpy(np.random.default_rng().random(classes)).float()
    return module
"""


def images(path: Path, shuffled: bool = False) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (80, 1, 6, 6), dtype=np.uint8), np.arange(80) % 4
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = x, y[::-1] if shuffled else y


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    images(tmp_path / "mine.h5")
    path = tmp_path / "job.toml"
    path.write_text(small_job(3, data={"name": "file", "path": "mine.h5"}, partition={"name": "iid", "clients": 4}))
    return path


def test_a_run_on_other_images_does_not_go_on(job: Path) -> None:
    """Of the same sizes and classes, so that who holds which is the same."""
    begun = fedsim.run(job, progress=False, callback=lambda finished: finished.stop())
    assert len(begun.attributes["data_sha256"]) == 64
    with h5py.File("mine.h5", "r+") as file:
        file["x"][:] = 255 - file["x"][:]
    with pytest.raises(BadInput, match=r"made on other images or labels than this job finds here; put these back, or choose another --out"):
        fedsim.run(job, progress=False)
    images(Path("mine.h5"))
    assert fedsim.run(job, progress=False).attributes["finished"]


def test_a_run_under_other_code_that_its_model_imports_does_not_go_on(job: Path, tmp_path: Path) -> None:
    (tmp_path / "the_network.py").write_text(NETWORK)
    (tmp_path / "the_blocks.py").write_text("from torch.nn.functional import relu as activation\n")
    model = {"model": {"factory": "the_network:make"}}
    fedsim.run(job, set=model, progress=False, callback=lambda finished: finished.stop())
    (tmp_path / "the_blocks.py").write_text("from torch.nn.functional import softplus as activation\n")
    with pytest.raises(BadInput, match=r"was made by other code of the_network:make"):
        fedsim.run(job, set=model, progress=False)
    for name in ("the_network", "the_blocks"):
        sys.modules.pop(name, None)


def test_a_factory_whose_weights_nobody_can_make_again_is_refused(job: Path, tmp_path: Path) -> None:
    (tmp_path / "the_network.py").write_text(NETWORK)
    (tmp_path / "the_blocks.py").write_text("from torch.nn.functional import relu as activation\n")
    with pytest.raises(BadInput, match=r'"the_network:unseeded" gives another two.bias each time it is called; draw it by torch.randn'):
        fedsim.run(job, set={"model": {"factory": "the_network:unseeded"}}, progress=False)
    for name in ("the_network", "the_blocks"):
        sys.modules.pop(name, None)


def on_two_nodes(job: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """The run on two ranks, of which the second stands in the folder `other`, as on a node with files of its own."""
    mpirun, *_ = launcher("openmpi").command(2)
    (job.parent / "other" / "job.toml").write_text(job.read_text())
    words: list[Any] = [sys.executable, "-m", "fedsim", "run", "job.toml", "--out", job.parent / "run.h5", *settings]
    command = [mpirun, "-n", "1", *words, ":", "-n", "1", "--wdir", job.parent / "other", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.processes
def test_ranks_with_other_labels_are_refused_before_anything_is_written(job: Path, tmp_path: Path) -> None:
    """The labels of one node stand in another order."""
    (tmp_path / "other").mkdir()
    images(tmp_path / "other" / "mine.h5", shuffled=True)
    ended = on_two_nodes(job)
    assert ended.returncode == 2
    assert "the ranks of a run must be alike, but the hash of images and labels is" in ended.stderr
    assert not (tmp_path / "run.h5").exists()


@pytest.mark.processes
def test_ranks_whose_factory_reads_another_file_are_refused(job: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder, bias in ((tmp_path, 0), (tmp_path / "other", 1)):
        images(folder / "mine.h5")
        (folder / "the_network.py").write_text(NETWORK)
        (folder / "the_blocks.py").write_text("from torch.nn.functional import relu as activation\n")
        (folder / "bias.txt").write_text(str(bias))
    ended = on_two_nodes(job, "--set", "model={factory='the_network:loaded'}")
    assert ended.returncode == 2
    assert "the ranks of a run must be alike, but the hash of the first weights is" in ended.stderr
    assert not (tmp_path / "run.h5").exists()
