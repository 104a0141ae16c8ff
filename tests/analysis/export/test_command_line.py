"""fedsim export --to csv, parquet, netcdf: what it prints, and one line with exit code 2 for a file that it cannot read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hand_made_run import hand_made_run

from fedsim.cli import commands
from fedsim.storage.writer import RunWriter


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The exit code of `fedsim export`, and what it writes on both streams."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsim", "export", *map(str, arguments)])
        capsys.readouterr()
        code = commands._outcome()
        return code, *capsys.readouterr()

    return called


def test_it_names_what_it_wrote(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    path = hand_made_run(tmp_path / "a [bold] run.h5")
    code, out, err = call(path, "--to", "csv")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        str(tmp_path / "a [bold] run-csv"),
        "  rounds.csv           4 rows",
        "  timing.csv           4 rows",
        "  speed.csv            4 rows",
        "  layers.csv           8 rows",
        "  clients.csv          5 rows",
        "  partition.csv        6 rows",
        "  columns.csv          22 rows",
        "  attributes.json, job.toml",
    ]
    code, out, _ = call(path, "--to", "netcdf", "--out", tmp_path / "x.nc")
    assert code == 0
    assert out.splitlines()[:3] == [str(tmp_path / "x.nc"), "  rounds     4 round", "  clients    4 round, 3 client"]


def test_a_run_that_goes_on_gives_its_complete_rounds(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    """Its writer has the file open, and a part of the next row is in it."""
    path = hand_made_run(tmp_path / "run.h5", rows=2, finished=False)
    with RunWriter(path) as record:
        record._extend(3)
        record._file["rounds/accuracy"][2] = 9.0
        record._file.flush()
        code, out, _ = call(path, "--to", "parquet")
    assert code == 0
    assert out.splitlines()[-1] == "The run has not finished: these are its rounds 0 to 1 of 3."
    np.testing.assert_array_equal(pd.read_parquet(tmp_path / "run-parquet" / "rounds.parquet")["accuracy"], [0.25, np.nan])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["temperature"] = np.arange(5)


def newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99


@pytest.mark.parametrize("form", ["csv", "parquet", "netcdf", "mat"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (foreign, "is it a run file of fedsim?"),
        (newer, "was written by fedsim 0.3.0 in a newer format"),
        (Path.unlink, "there is no run file"),
    ],
    ids=["truncated", "empty", "foreign", "newer", "missing"],
)
def test_one_line_and_exit_code_2(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], damage: Callable[[Path], None], message: str, form: str
) -> None:
    path = hand_made_run(tmp_path / "run.h5")
    damage(path)
    if path.exists():
        os.utime(path, (0, 0))  # so that nobody waits for its writer
    code, out, err = call(path, "--to", form)
    assert (code, out) == (2, "")
    assert message in err
    assert str(path) in err
    assert len(err.splitlines()) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["run.h5"] * path.exists()
