"""What `fedsim compare` prints of run files, in each form, and what it refuses."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fedsim_analysis
import pytest
from compared_runs import NAN, write
from fedsim_analysis import comparison
from fedsim_analysis.comparison import command

TINY = {"name": "fedtiny", "density": 0.1}
CHEAP = {"bytes_up": 1e6, "bytes_down": 1e6, "train_flops": 4e9, "max_client_memory": 2e4}
DEAR = {"bytes_up": 3e6, "bytes_down": 7e6, "train_flops": 1e10, "max_client_memory": 5e4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dense, at 0.8 and 0.9, and tiny, at 0.7 and 0.6, of two seeds; each three rounds with round 0."""
    folder = tmp_path_factory.mktemp("runs")
    finals: dict[str, tuple[Any, dict[str, float], tuple[float, float]]] = {
        "tiny": (TINY, CHEAP, (0.7, 0.6)),
        "dense": ("fedavg", DEAR, (0.8, 0.9)),
    }
    return [
        write(folder / f"{name}{seed}.h5", method, seed, (0.1, NAN, final), each=each)
        for name, (method, each, values) in finals.items()
        for seed, final in enumerate(values)
    ]


def _settle(path: Path, data: bytes | None = None) -> Path:
    """A file that nobody writes to: one that may be half-written is tried again for two seconds."""
    if data is not None:
        path.write_bytes(data)
    os.utime(path, (0, 0))
    return path


def section(text: str, title: str) -> list[list[str]]:
    """The rows of the table of this title, as words."""
    lines = next(part for part in text.split("\n\n") if part.startswith(title)).splitlines()
    return [line.split("  ") for line in lines[1:]]


def words(row: list[str]) -> list[str]:
    return [cell.strip() for cell in row if cell.strip()]


def test_the_whole_text(runs: list[Path]) -> None:
    text = command.text(runs)
    table = text.split("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()] == ["method", "fedavg", "fedtiny"]  # the overview comes first, and is sorted
    head, dense, tiny = section(text, "Accuracy of the last model")
    assert words(head) == ["method", "seeds", "accuracy (%)", "difference (points)", "pairs", "p"]
    assert words(dense) == ["fedavg", "2", "85.00 ± 63.53", "baseline", "-", "-"]  # 12.7062 * 5
    assert words(tiny) == ["fedtiny", "2", "65.00 ± 63.53", "-20.00 ± 127.06", "2", "0.500"]  # of -10 and -30
    _, dense, tiny = section(text, "Bytes sent")
    assert (words(dense)[2], words(tiny)[2:4]) == ("30 ± 0", ["6 ± 0", "-24 ± 0"])
    _, dense, tiny = section(text, "Accuracy at equal bytes")
    assert words(dense)[:3] == ["fedavg", "0 of 2", "-"]
    assert words(tiny)[:5] == ["fedtiny", "2", "2", "6", "65.00 ± 63.53"]
    assert "received 6 MB at most" in text
    _, dense, tiny = section(text, "Rounds, bytes and FLOPs until the accuracy was 80.75 %")
    assert words(dense) == ["fedavg", "1 of 2", "2", "30", "30"]
    assert words(tiny) == ["fedtiny", "0 of 2", "not reached", "-", "-"]
    assert "2 pairs cannot give a p below 0.5; with fewer than 6 pairs no p is below 0.05" in text
    assert "Holm" not in text  # of one comparison


def test_holm_where_several_are_held_against_one(runs: list[Path], tmp_path: Path) -> None:
    sparse = [write(tmp_path / f"{seed}.h5", TINY | {"density": 0.01}, seed, (0.1, 0.3)) for seed in (0, 1)]
    text = command.text([*runs, *sparse], tables=["metrics"], metrics=["accuracy"])
    head, _, sparsest, sparser = section(text, "Accuracy of the last model")
    assert words(head)[-1] == "p by Holm"
    assert [words(sparsest)[-2:], words(sparser)[-2:]] == [["0.500", "1.000"]] * 2
    assert "held against the same baseline" in text


def test_the_order_of_rows(runs: list[Path], tmp_path: Path) -> None:
    sweep = [write(tmp_path / f"{d}.h5", TINY | {"density": d}, 0, (0.1, 0.3)) for d in (0.2, 0.02, 10)]
    rows = [group.label for group in comparison.collect(sweep).groups]
    assert rows == [f"fedtiny, density {d}" for d in (0.02, 0.2, 10)]  # as numbers
    assert [group.label for group in comparison.collect(sweep, sort="-density").groups] == rows[::-1]
    assert [group.label for group in comparison.collect(sweep, sort="given").groups] == [f"fedtiny, density {d}" for d in (0.2, 0.02, 10)]
    with pytest.raises(ValueError, match=r"^--sort lr: no such field tells these runs apart; there are: method.name, method.density$"):
        command.text(sweep, sort="lr")


def test_markdown_and_latex_have_the_same_numbers(runs: list[Path]) -> None:
    text = command.text(runs, "markdown")
    assert "| fedtiny | 2 | 65.00 ± 63.53 | -20.00 ± 127.06 | 2 | 0.500 |" in text
    assert text.startswith(
        "**Overview**\n\n| method | seeds | accuracy (%) | density | share of dense FLOPs (%) | sent (MB) | memory (kB) |"
    )
    text = command.text(runs, "latex", tables=["metrics"], metrics=["accuracy"])
    assert r"fedtiny & $2$ & $65.00 \pm 63.53$ & $-20.00 \pm 127.06$ & $2$ & $0.500$ \\" in text
    assert text.count(r"\begin{table}") == 1


def test_csv_is_unrounded_and_in_one_table(runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(command.text(runs, "csv"))))
    assert {row["table"] for row in rows} == {"metrics", "equal", "target"}
    tiny = next(row for row in rows if row["metric"] == "accuracy" and row["method.name"] == "fedtiny")
    assert float(tiny["difference"]) == (0.7 - 0.8 + 0.6 - 0.9) / 2
    assert tiny["pairs"] == "2"
    overview = list(csv.DictReader(io.StringIO(command.text(runs, "csv", tables=["overview"]))))
    assert [row["method.name"] for row in overview] == ["fedavg", "fedtiny"]
    assert float(overview[0]["bytes"]) == 3e7


def test_a_column_of_the_run_file_is_a_metric(runs: list[Path]) -> None:
    text = command.text(runs, tables=["metrics"], metrics=["max_client_memory:sum"])
    head, dense, tiny = section(text, "max_client_memory, sum of all rounds")
    assert words(head)[2] == "max_client_memory (kB)"
    assert (words(dense)[2], words(tiny)[2]) == ("150 ± 0", "60 ± 0")


def test_other_data_stand_in_tables_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    shapes = [write(tmp_path / "a.h5", TINY, 0, (0.1, 0.3), job={"data": {"name": "shapes"}})]
    text = command.text([*runs, *shapes], tables=["metrics"], metrics=["accuracy"])
    assert [len(section(text, f"Accuracy of the last model on the global test set, on {name}")) for name in ("digits", "shapes")] == [3, 2]
    assert "Runs on digits and on shapes are not held against each other: their accuracies are of other images." in text


def test_what_is_no_pair_is_said_why(runs: list[Path], tmp_path: Path) -> None:
    small = write(tmp_path / "small.h5", "fedavg", 0, (0.1, 0.5), job={"model": {"match": "params"}})
    text = command.text([*runs[2:], small], metrics=["accuracy"])
    assert "fedavg, match params and fedavg have no pairs: other first weights (model.match)." in text


def test_runs_that_go_on_are_marked(runs: list[Path], tmp_path: Path) -> None:
    late = write(tmp_path / "late.h5", TINY | {"density": 0.5}, 0, (NAN,), finished=False)
    text = command.text([*runs, late])
    assert "unfinished: runs that go on" in text
    row = section(text, "Accuracy of the last model")[-1]
    assert words(row)[:5] == ["fedtiny", "0.5", "0 of 1", "1", "-"]


def test_texts_of_run_files_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    """A control sign makes a file unreadable; what steers the direction of a line, a table or a spreadsheet is shown."""
    with pytest.raises(ValueError, match="no text that can be printed"):
        command.text([_settle(write(tmp_path / "a.h5", "\u001b[31mred"))])
    name = "=1+1|\u202e<b>\n[x](y)"
    runs = [write(tmp_path / "b.h5", name), write(tmp_path / "c.h5", "fedavg")]
    assert r"=1+1|\u202e<b>\n[x](y)" in command.text(runs)
    assert r"=1+1\|\\u202e\<b\>\\n\[x\](y)" in command.text(runs, "markdown")
    assert r"=1+1\textbar{}\textbackslash{}u202e\textless{}b\textgreater{}\textbackslash{}n[x](y)" in command.text(runs, "latex")
    rows = list(csv.DictReader(io.StringIO(command.text(runs, "csv", tables=["overview"]))))
    assert [row["method.name"] for row in rows] == [r"'=1+1|\u202e<b>\n[x](y)", "fedavg"]


def test_names_of_fields_are_shown_too(tmp_path: Path) -> None:
    name = "x\n\u202e|"
    runs = [write(tmp_path / f"{value}.h5", "fedavg", job={"model": {name: value}}) for value in (1, 2)]
    text = command.text(runs)
    shown = r"x\n\u202e|"
    assert words(section(text, "Accuracy of the last model")[0])[1] == shown
    assert text.splitlines()[0].split()[1] == shown
    assert f"fedavg, {shown} 2 and fedavg, {shown} 1 have no pairs: other first weights (model.{shown})." in " ".join(text.split())
    assert not {"\u202e"} & set(text)
    assert command.text(runs, "csv").splitlines()[0].startswith(rf"table,method.name,model.{shown},")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"form": "html"}, "--form html: fedsim compare prints terminal, markdown, latex, csv"),
    "table": ({"tables": ["every"]}, "--table every: there is no such table; there are: overview, metrics, equal, target, all"),
    "target": ({"target": 93.0}, "--target 93: an accuracy is a share above 0 and at most 1, such as 0.9"),
    "budget": ({"budgets": {"bytes": 0.0}}, "--at-bytes 0: should be a number above 0"),
    "metric": ({"metrics": ["acuracy"]}, "--metric acuracy: no run has a column acuracy; there are: accuracy, accuracy_last_10, loss"),
    "how": ({"metrics": ["loss:first"]}, "--metric loss:first: a column is taken as loss:last, loss:max, loss:min, loss:mean, loss:sum"),
    "score": ({"score": "loss"}, "--score loss: no run has such an accuracy; there are: accuracy"),
    "baseline": ({"baseline": "fedmef"}, "--baseline fedmef: no row is this; give a method or FIELD=VALUE"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_wrong_options_are_answered_with_the_right_ones(option: str, runs: list[Path]) -> None:
    given, message = REFUSED[option]
    with pytest.raises(ValueError, match=r"^--") as error:
        command.text(runs, **given)
    assert str(error.value).startswith(message)


def test_files_that_are_refused_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    whole = runs[0].read_bytes()
    broken = {"empty": b"", "cut": whole[:3000], "foreign": b"text"}
    for name, data in broken.items():
        _settle(tmp_path / f"{name}.h5", data)
        with pytest.raises(ValueError, match=f"{name}.h5 (cannot be read|is damaged)") as error:
            command.text([*runs, tmp_path / f"{name}.h5"])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="newer format"):
        command.text([write(tmp_path / "newer.h5", format_version=99)])
    with pytest.raises(FileNotFoundError, match="there is no run file"):
        command.text([tmp_path / "none.h5"])


def test_a_damaged_number_is_refused(runs: list[Path], tmp_path: Path) -> None:
    data = runs[0].read_bytes()
    value = bytes(bytearray.fromhex("666666666666e63f"))  # 0.7
    assert data.count(value) == 1
    _settle(tmp_path / "a.h5", data.replace(value, bytes.fromhex("666666666666e73f")))
    with pytest.raises(ValueError, match=r"a.h5 is damaged: rounds/accuracy is damaged in round 2: its checksum is another"):
        command.text([tmp_path / "a.h5"])


def test_one_file_is_counted_once(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny0.h5 is given twice: leave one out"):
        command.text([runs[0], runs[0]])
    (tmp_path / "link.h5").symlink_to(runs[0])
    with pytest.raises(ValueError, match=r"link.h5 is given twice \(as .*tiny0.h5\): leave one out"):
        command.text([runs[0], tmp_path / "link.h5"])


@pytest.mark.parametrize(
    ("given", "number"), [("5e6", 5e6), ("9.75MB", 9.75e6), ("3 GFLOP", 3e9), ("2kB", 2e3), ("7", 7), ("1.5 T", 1.5e12), ("12 FLOPs", 12)]
)
def test_amounts_as_people_write_them(given: str, number: float) -> None:
    assert command.amount(given, "--at-bytes") == pytest.approx(number)


@pytest.mark.parametrize("given", ["", "many", "1..2", "-5", "5 XB", "nan", "1e"])
def test_amounts_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match=r"^--at-bytes .*: should be a number, such as 5e6, 5MB or 2GFLOP"):
        command.amount(given, "--at-bytes")


@pytest.mark.processes
def test_neither_torch_nor_scipy_s_statistics_are_imported(runs: list[Path]) -> None:
    code = "import sys; from fedsim_analysis.comparison import command; command.text(sys.argv[1:]); print(*sys.modules)"
    folder = Path(fedsim_analysis.__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code, *runs], cwd=folder, check=True, capture_output=True, text=True)
    assert not {"torch", "fedsim", "matplotlib", "xarray", "scipy.stats"} & set(ended.stdout.split())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in many fields, the number of rounds among them, and a dense one like the first."""
    folder = tmp_path_factory.mktemp("many")
    sections = {"train": {"lr": 0.2, "momentum": 0.9}, "model": {"width": 8}, "partition": {"name": "shards"}}
    return [
        write(folder / "a.h5", TINY, 0, (0.1, 0.3), planned=1),
        write(folder / "b.h5", TINY | {"density": 0.2}, 0, (0.1, NAN, 0.4), job=sections, planned=2, partition_sha256="x"),
        write(folder / "c.h5", "fedavg", 0, (0.1, 0.5), planned=1),
    ]


def test_rows_of_many_fields_are_numbered_in_the_overview(many: list[Path]) -> None:
    text = command.text(many)
    assert [line.split()[:2] for line in text.split("\n\n")[0].splitlines()][:2] == [["row", "method"], ["1", "fedavg"]]
    head, *rows = section(text, "Accuracy of the last model")
    assert words(head)[:2] == ["row", "method"]
    assert [words(row)[:2] for row in rows] == [["1", "fedavg"], ["2", "fedtiny"], ["3", "fedtiny"]]
    assert "row 3 and row 1 have no pairs: other partition (partition.name)." in text
    assert words(section(command.text(many, tables=["metrics"]), "Accuracy of the last model")[0])[1] == "rounds_planned"
    assert "\nrow " in command.text(many, width=40)


def test_the_field_rounds_is_not_the_rounds_of_a_target(many: list[Path]) -> None:
    table = comparison.to_target(comparison.collect(many), 0.3)
    assert table["rounds_planned"].tolist() == [1, 1, 2]
    assert table["rounds"].tolist() == [1, 1, 2]
    assert "rounds_planned" not in comparison.overview(comparison.collect(many))


def test_what_no_file_has_makes_no_table(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("bytes_up", "bytes_down", "train_flops", "max_client_memory"), NAN)
    runs = [write(tmp_path / f"{method}.h5", method, accuracies=(NAN, NAN), each=nothing) for method in SCORES]
    text = command.text([*runs, write(tmp_path / "begun.h5", accuracies=(), seed=1, finished=False)])  # before its first round
    assert text.split()[:2] == ["method", "seeds"]
    assert not any(title in text for title in ("Accuracy of", "Bytes sent", "at equal bytes", "Rounds, bytes and FLOPs until the"))
    with pytest.raises(ValueError, match="--table metrics: nothing was measured in these runs yet"):
        command.text(runs, tables=["metrics"])


SCORES = {"fedavg": 0.4, "mine:Method": 0.3}


def test_another_column_counts_as_accuracy(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"{method}.h5", method, each={"client_accuracy": [0.1, 0.2, value]}) for method, value in SCORES.items()]
    text = command.text(runs, tables=["equal", "target"], score="client_accuracy")
    head, dense, tiny = section(text, "client_accuracy at equal memory")
    assert words(head)[3] == "client_accuracy (%)"
    assert [words(row)[3] for row in (dense, tiny)] == ["40.00", "30.00"]
    assert "until client_accuracy was 38.00 % or more" in text
