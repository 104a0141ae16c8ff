"""Which run of a sweep an element of a hand-written array does."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_job import small_job

from fedsim.config.job import identity, load, runs
from fedsim.slurm.batch.element import main


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(small_job(2, sweep={"train.lr": [0.1, 0.05], "seed": [0, 1]}))
    return path


def test_each_index_is_a_run_in_the_order_of_the_sweep(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = runs(load(job))
    for index, run in enumerate(expected):
        assert main([str(job), str(tmp_path / "runs"), str(index)]) == 0
        assert capsys.readouterr().out == f"{run.name}\n"
        written = load(tmp_path / "runs" / "slurm" / "jobs" / f"{run.name}.toml")
        assert identity(written) == identity(run)
        assert written.file == run.file
    assert len({run.file for run in expected}) == 4


@pytest.mark.parametrize("index", ["4", "-1", "", "١", "1.0"])
def test_an_index_without_a_run_is_refused(job: Path, tmp_path: Path, index: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(job), str(tmp_path / "runs"), index]) == 2
    assert f"has 4 runs, and there is none with index {index!r}: submit it with --array=0-3" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_is_one_message(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.toml"), str(tmp_path / "runs"), "0"]) == 2
    assert "absent.toml" in capsys.readouterr().err
    assert main([str(job), "0"]) == 2
    assert "usage: " in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(job), str(tmp_path / "file"), "0"]) == 2
    assert "file" in capsys.readouterr().err
