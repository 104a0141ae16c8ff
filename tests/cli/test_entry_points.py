"""An installed package offers a method, a model and a data set by plain names; all through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_job import small_job

from fedsim.cli import commands

JOB = small_job(2, data={"name": "dots"}, model={"name": "tiny"}, method={"name": "mine", "share": 0.5})
METHOD = '''
"""Mine: a method of an installed package.

More about it.
"""
from dataclasses import dataclass

from fedsim.methods.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    share: float = 0.8  # kept share
'''
MODEL = """
from torch import nn

def make(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""
DATA = """
import torch

from fedsim.data.image_sets import Stored

def dots(settings, seed):
    n = settings.train_images or 80
    images, labels = torch.arange(n * 16).remainder(251).view(n, 1, 4, 4).to(torch.uint8), torch.arange(n) % 4
    return [Stored("dots", images[:size], labels[:size], 4, (0.5,), (0.25,)) for size in (n, 20)]
"""
OFFERS = {
    "fedsim.methods": {"mine": "tiny_fl.methods:Mine", "broken": "tiny_fl.nowhere:Mine", "fedavg": "tiny_fl.methods:Mine"},
    "fedsim.models": {"tiny": "tiny_fl.models:make", "cnn": "tiny_fl.nowhere:make", "text": "tiny_fl.methods:Mine"},
    "fedsim.datasets": {"dots": "tiny_fl.data:dots", "holes": "builtins:divmod"},
}

Fedsim = Callable[..., subprocess.CompletedProcess[str]]


def install(folder: Path, package: str, offers: dict[str, dict[str, str]]) -> None:
    """What pip leaves of a package's metadata in a folder on sys.path."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    groups = ("\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]) for group, names in offers.items())
    (info / "entry_points.txt").write_text("\n".join(groups) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the installed package tiny_fl."""
    folder = tmp_path / "site"
    install(folder, "tiny_fl", OFFERS)
    (folder / "tiny_fl").mkdir()
    for name, text in {"__init__": "", "methods": METHOD, "models": MODEL, "data": DATA}.items():
        (folder / f"tiny_fl/{name}.py").write_text(text)
    return folder


@pytest.fixture
def fedsim(site: Path, tmp_path: Path) -> Fedsim:
    (tmp_path / "job.toml").write_text(JOB)
    paths = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedsim", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return call


@pytest.fixture
def refuses(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The command line in this process: one line, and exit code 2."""
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)

    def call(*settings: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsim", "run", "job.toml", *(part for setting in settings for part in ("--set", setting))])
        capfd.readouterr()
        with pytest.raises(SystemExit, match="2"):
            commands.main()
        message = capfd.readouterr().err
        assert message.count("\n") == 1, message
        return message

    yield call
    for name in [name for name in sys.modules if name.startswith("tiny_fl")]:
        del sys.modules[name]


@pytest.mark.full
@pytest.mark.processes
def test_a_run_of_them_does_not_continue_under_other_code(fedsim: Fedsim, site: Path) -> None:
    first = fedsim("run", "job.toml")
    assert first.returncode == 0, first.stderr
    again = fedsim("run", "job.toml")
    assert again.returncode == 0
    assert "finished" in again.stdout + again.stderr
    (site / "tiny_fl/data.py").write_text(DATA + "# another thought\n")
    changed = fedsim("run", "job.toml")
    assert changed.returncode == 2
    assert "made by other code of 'mine' (tiny_fl.methods:Mine of tiny_fl 1.0) or 'tiny' (tiny_fl.models:make" in changed.stderr
    assert "or 'dots' (tiny_fl.data:dots of tiny_fl 1.0); choose another --out" in changed.stderr


@pytest.mark.processes
def test_the_list_of_methods_has_them(fedsim: Fedsim) -> None:
    listed = fedsim("methods").stdout
    assert "Mine: a method of an installed package. [tiny_fl.methods:Mine of tiny_fl 1.0]" in listed
    assert "fedavg      FedAvg: McMahan" in listed
    assert "'fedavg' is fedsim's own; tiny_fl.methods:Mine of tiny_fl 1.0 is not used" in listed
    assert "broken      [tiny_fl.nowhere:Mine of tiny_fl 1.0]" in listed
    one = fedsim("methods", "mine").stdout
    assert "More about it." in one
    assert "kept share" in one


def test_a_name_that_nothing_has_is_answered_with_theirs_too(refuses: Callable[..., str]) -> None:
    assert "[method] name = 'mien' is not known (did you mean 'mine'?). There are: adp, at_init, broken" in refuses("method.name=mien")
    assert "[model] name = 'tinny' is not known (did you mean 'tiny'?). There are: cnn" in refuses("model.name=tinny")
    assert "[data] name = 'dot' is not known (did you mean 'dots'?). There are: digits" in refuses("data.name=dot")


@pytest.mark.processes
def test_names_of_fedsim_win(fedsim: Fedsim) -> None:
    ended = fedsim("estimate", "job.toml", "--set", "model.name=cnn", "--set", "data.name=digits")
    assert ended.returncode == 0, ended.stderr


def test_what_a_package_offers_and_does_not_give_is_one_message(refuses: Callable[..., str]) -> None:
    broken = refuses("method.name=broken")
    assert "[method] name = 'broken': tiny_fl.nowhere:Mine of tiny_fl 1.0 cannot be imported: ModuleNotFoundError" in broken
    assert 'model.name = "text": tiny_fl.methods:Mine of tiny_fl 1.0 failed: TypeError' in refuses("model.name=text")
    assert "builtins:divmod of tiny_fl 1.0 failed: TypeError" in refuses("data.name=holes")
    assert "model.norm_weight is for the models of fedsim; tiny is tiny_fl.models:make of tiny_fl 1.0" in refuses("model.norm_weight=0.5")


def test_two_packages_with_one_name(refuses: Callable[..., str], site: Path) -> None:
    install(site, "other_fl", {"fedsim.methods": {"mine": "other_fl:Mine"}})
    expected = "'mine' is offered by several installed packages: other_fl:Mine of other_fl 1.0, tiny_fl.methods:Mine of tiny_fl 1.0;"
    assert expected in refuses()
