"""A folder with a small job, in which tests of the public interface stand as a user's script or notebook does."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import MPIRUN, Ended, Running, signals_kept
from small_job import FAKE, small_job

from fedsim.cli import commands
from fedsim.simulation.launchers import ranks

SMALL = small_job(3, data=FAKE | {"train_images": 120})

FAULTY = """
from dataclasses import dataclass

import torch

from fedsim import Train
from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Boom(Train):
    def step(self, net, sent, state, batch):
        if batch.t == 1:
            raise ValueError("this is not what I wanted")
        return super().step(net, sent, state, batch)


@dataclass(frozen=True)
class Faulty(FedAvg):
    def round(self, setting, state, fleet, r):
        if r == 2:
            fleet.run(Boom.at(setting, r), fleet.pick(setting.cohort, r), state.shared)
        return super().round(setting, state, fleet, r)
"""


@dataclass
class Folder:
    """The working folder of a user, with small.toml."""

    path: Path
    started: list[Running] = field(default_factory=list)

    @property
    def table(self) -> dict[str, Any]:
        """What small.toml holds."""
        return tomllib.loads(SMALL)

    def faulty(self) -> str:
        """The name of a method whose clients fail in round 2; it stands in a module here."""
        (self.path / "mine_faulty.py").write_text(FAULTY)
        return "mine_faulty:Faulty"

    def script(self, text: str, ranks: int = 0) -> Ended:
        """`python script.py` with this text; on so many ranks by `mpirun`."""
        if ranks and not MPIRUN.exists():
            pytest.skip("needs the extra [mpi]")
        (self.path / "script.py").write_text(text)
        launcher = [str(MPIRUN), "-n", str(ranks)] if ranks else []
        return self.command(*launcher, sys.executable, "script.py")

    def command(self, *command: str) -> Ended:
        """How the command ended, once all its processes have."""
        self.started.append(Running(self.path, list(command), self.path / "run.h5"))
        return self.started[-1].ended()


@pytest.fixture(scope="session")
def small() -> str:
    """The text of small.toml."""
    return SMALL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """The test stands in this folder, whose modules can be imported; what still runs there at the end is ended."""
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ranks.RANK:
        monkeypatch.delenv(name, raising=False)
    made, threads = Folder(tmp_path), torch.get_num_threads()
    with signals_kept():
        yield made
    torch.set_num_threads(threads)
    for running in made.started:
        running.kill()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)


@pytest.fixture
def usage_error(folder: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """What `fedsim COMMAND JOB --set …` prints on the error stream before it ends with exit code 2."""

    def call(command: str, job: str, settings: Mapping[str, str]) -> str:
        words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        monkeypatch.setattr(sys, "argv", ["fedsim", command, job, *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        with pytest.raises(SystemExit, match="2"):
            commands.main()
        return capfd.readouterr().err.removesuffix("\n")

    return call
