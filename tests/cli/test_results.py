"""watch, compare, report and export on the command line: what they print, and one message for files that are no run files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from captured_console import Fedsim

from fedsim.storage.writer import RunWriter

ESCAPE = "\x1b[31mred"
FINALS = {"fedavg": (0.8, 0.9), "fedtiny": (0.6, 0.9)}  # accuracies by seed


def write(path: Path, method: str = "fedavg", seed: int = 0, final: float = 0.8, finished: bool = True, name: str = "a") -> Path:
    """A run of two rounds; round r sends 1000 (r + 1) bytes."""
    job = f'name = "{name}"\nseed = {seed}\nrounds = 2\n[data]\nname = "digits"\n[method]\nname = "{method}"\n'
    attributes = {"job": job, "seed": seed, "method": method, "rounds_planned": 2, "partition_sha256": "0" * 64}
    with RunWriter.create(path, attributes=attributes, layers=["conv"], clients=2) as record:
        for r in range(3):
            values = {"accuracy": final * r / 2, "bytes_up": 1000.0 * (r + 1), "bytes_down": 0.0, "seconds": 1.0, "density": 1.0}
            record.row(r, values, {"accuracy": (np.array([0, 1]), np.array([0.5, 0.7]))}, timing={"compute": 1.0})
        if finished:
            record.finish({}, "0" * 64)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of four runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for method, finals in FINALS.items():
        for seed, final in enumerate(finals):
            write(folder / f"{method}-{seed}.h5", method, seed, final)
    return folder


def test_compare_prints_the_overview(fedsim: Fedsim, runs: Path) -> None:
    ended = fedsim("compare", "runs")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].split()[:3] == ["method", "seeds", "accuracy"]
    assert [line.split()[:5] for line in lines[1:3]] == [["fedavg", "2", "85.0", "±", "63.5"], ["fedtiny", "2", "75.0", "±", "190.6"]]
    assert "Wilcoxon" not in ended.out


def test_an_option_brings_its_table(fedsim: Fedsim, runs: Path) -> None:
    paired = fedsim("compare", "runs", "--metric", "accuracy").out
    assert "fedtiny" in paired
    assert "-10.00" in paired  # the mean of 60 % - 80 % and 90 % - 90 %
    assert "Wilcoxon" in paired
    target = fedsim("compare", "runs", "--target", "0.85").out
    assert [line.split()[:4] for line in target.splitlines()[2:4]] == [["fedavg", "1", "of", "2"], ["fedtiny", "1", "of", "2"]]
    equal = fedsim("compare", "runs", "--at-bytes", "3kB").out
    assert [line.split()[:5] for line in equal.splitlines()[2:4]] == [
        ["fedavg", "2", "1", "3", "42.50"],
        ["fedtiny", "2", "1", "3", "37.50"],
    ]
    everything = fedsim("compare", "runs", "--table", "all").out
    assert all(part in everything for part in ("seeds", "Wilcoxon", "Accuracy at equal bytes", "Rounds, bytes and FLOPs until"))


def test_compare_in_other_forms(fedsim: Fedsim, runs: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(fedsim("compare", "runs", "--csv").out)))
    assert [(row["method.name"], round(float(row["accuracy"]), 9), float(row["bytes"])) for row in rows] == [
        ("fedavg", 0.85, 6000),
        ("fedtiny", 0.75, 6000),
    ]
    assert r"\toprule" in fedsim("compare", "runs", "--form", "latex").out
    assert "| fedavg |" in fedsim("compare", "runs", "--form", "markdown").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--form", "word"], "--form word: fedsim compare prints terminal, markdown, latex, csv"),
        (["--table", "al"], "--table al: there is no such table; there are: overview, metrics, equal, target"),
        (["--metric", "acuracy"], "--metric acuracy: no run has a column acuracy"),
        (["--baseline", "fedmef"], "--baseline fedmef: no row is this"),
        (["--sort", "lr"], "--sort lr: no such field tells these runs apart"),
        (["--target", "90"], "--target 90: an accuracy is a share above 0 and at most 1"),
        (["--at-clock", "soon"], "--at-clock soon: should be a number, such as 600 or 600s"),
        (["--at-bytes", "many"], "--at-bytes many: should be a number, such as 5e6, 5MB or 2GFLOP"),
    ],
)
def test_wrong_options_of_compare(refuses: Callable[..., str], runs: Path, words: list[str], said: str) -> None:
    assert said in refuses("compare", "runs", *words)


def test_report_and_export_say_what_they_wrote(fedsim: Fedsim, runs: Path, tmp_path: Path) -> None:
    ended = fedsim("export", "runs/fedavg-0.h5", "--to", "csv", "--out", "tables")
    assert ended.code == 0, ended.err
    assert (tmp_path / "tables" / "rounds.csv").is_file()
    ended = fedsim("report", "runs", "--out", "page.html")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].startswith("page.html: 2 jobs, 4 runs")
    assert (tmp_path / "page_figures").is_dir()


def test_watch_of_runs_that_have_ended(fedsim: Fedsim, runs: Path) -> None:
    ended = fedsim("watch", "runs")
    assert ended.code == 0, ended.err
    assert ended.out.count("done") >= 4
    assert "\x1b" not in ended.out


def damaged(path: Path, kind: str) -> None:
    """A file of this kind at `path`."""
    write(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif kind == "newer":
        with h5py.File(path, "r+") as file:
            file.attrs["format_version"] = 99


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "newer", "missing"])
@pytest.mark.parametrize("command", ["show", "watch", "compare", "report", "export --to csv", "export --to netcdf", "export --to onnx"])
def test_what_is_no_run_file_gets_one_line(
    refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    from fedsim_analysis import run_file

    monkeypatch.setattr(run_file, "SETTLED", -1)  # nobody is writing to it
    if kind != "missing":
        damaged(tmp_path / "bad.h5", kind)
    first, *rest = command.split()
    message = refuses(first, "bad.h5", *rest)
    assert message.count("\n") == 1, message
    assert "bad.h5" in message
    assert {"newer": "newer format", "missing": "no run file"}.get(kind, "bad.h5") in message


def test_growing_files_are_read(fedsim: Fedsim, tmp_path: Path) -> None:
    write(tmp_path / "a.h5", finished=False)
    assert "unfinished" in fedsim("compare", "a.h5").out
    assert "The run has not ended" in fedsim("report", "a.h5").out
    assert "has not finished" in fedsim("export", "a.h5", "--to", "netcdf").out


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "words", [["compare", "a.h5", "b.h5"], pytest.param(["watch", "."], marks=FULL), ["export", "a.h5", "--to", "csv"]]
)
def test_escapes_in_a_file_reach_no_terminal(fedsim: Fedsim, tmp_path: Path, words: list[str]) -> None:
    for name in ("a.h5", "b.h5"):
        write(tmp_path / name, name="$(x) <b> [red] :smile:")
        with h5py.File(tmp_path / name, "r+") as file:
            file.attrs["hosts"] = ESCAPE
            file["rounds"].move("lr", ESCAPE)
        os.utime(tmp_path / name, (0, 0))  # nobody is writing to it
    ended = fedsim(*words)
    assert "\x1b" not in ended.out + ended.err
    assert "Traceback" not in ended.err


def test_text_of_a_file_becomes_no_picture(fedsim: Fedsim, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"{i}.h5", method=f":smile:{i}", seed=i)
    assert ":smile:0" in fedsim("compare", "0.h5", "1.h5").out
    assert ":smile:0" in fedsim("show", "0.h5").out
