from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import HERE, TINY, Console, Ended, Lab, images, rows, signals_kept

from fedsim.cli import commands
from fedsim.simulation.launchers import ranks


def laid_out(folder: Path) -> Lab:
    (folder / "tiny.toml").write_text(TINY)
    images(folder / "images.h5")
    shutil.copy(HERE / "own.py", folder)
    return Lab(folder)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """An empty folder with the tiny job; whatever still runs there at the end is ended."""
    made = laid_out(tmp_path)
    yield made
    made.close()


@pytest.fixture
def console(lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Console]:
    """`fedsim run tiny.toml --out run.h5 …` in this process, which saves the seconds that a new one takes to start."""
    monkeypatch.chdir(lab.folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ranks.RANK:
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["fedsim", "run", "tiny.toml", "--out", "run.h5", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    threads = torch.get_num_threads()
    with signals_kept():
        yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of the tiny job, never stopped, with its checkpoints beside it."""
    made = laid_out(tmp_path_factory.mktemp("reference"))
    ended = made.run()
    assert ended.code == 0, ended.err
    return made.folder / "run.h5"


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of the tiny job, killed after row 3 and before the last, with its checkpoints beside it."""
    made = laid_out(tmp_path_factory.mktemp("killed"))
    running = made.start(hold=5)
    running.until(3)
    running.kill()
    assert rows(running.run) in (3, 4)
    return running.run
