"""`report.command.write`: what it writes, its numbers against numbers by hand, and what it says of files that it cannot read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import pytest
from fedsim_analysis.report import assembly, command, page
from reported_runs import three_jobs, write
from scipy import stats

T = float(stats.t.ppf(0.975, 1))  # of two seeds: 12.7062


class Read(HTMLParser):
    """Tables by their id, as rows of texts; the texts of some elements; and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables[str(found["id"])] = []
        if tag == "tr":
            self.tables[list(self.tables)[-1]].append([])
        if tag in ("td", "th"):
            self.tables[list(self.tables)[-1]][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data
        if "tr" in self._open and self._open[-1] in ("td", "th"):
            self.tables[list(self.tables)[-1]][-1][-1] += data

    def table(self, name: str) -> list[dict[str, str]]:
        head, *rows = self.tables[name]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def charts(self) -> dict[str, Any]:
        scripts = [found for tag, found in self.tags if tag == "script"]
        texts = zip(scripts, self.texts["script"], strict=True)
        return {
            str(found["id"]).removesuffix("-data"): json.loads(text) for found, text in texts if found.get("type") == "application/json"
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("report")
    three_jobs(folder)
    return folder / "out" / "monday.html", command.write([folder], folder / "out" / "monday.html")


@pytest.fixture(scope="module")
def text(written: tuple[Path, list[str]]) -> str:
    return written[0].read_text()


def test_the_page_and_its_figures_are_written(written: tuple[Path, list[str]], text: str) -> None:
    out, lines = written
    figures = out.with_name("monday_figures")
    names = list(Read(text).charts())
    assert len(names) >= 20
    assert {path.name for path in figures.iterdir()} == {"README.md", *(f"{name}.{kind}" for name in names for kind in ("svg", "pdf"))}
    assert all((figures / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in names)
    assert all("<svg" in (figures / f"{name}.svg").read_text() for name in names)
    assert lines[0].startswith(f"{out}: 3 jobs, 6 runs")
    assert lines[1] == f"{figures}: {len(names)} figures as SVG and PDF"
    assert len(lines) == 2
    index = (figures / "README.md").read_text()
    assert "plots.accuracy(runs, over='bytes')" in index
    assert all(f"## {name}\n" in index for name in names)


def test_the_commands_draw_the_figures_again(written: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Of the index, as a reader would paste them."""
    index = written[0].with_name("monday_figures") / "README.md"
    blocks = re.findall(r"```python\n(.*?)\n```", index.read_text(), re.DOTALL)
    place: dict[str, Any] = {}
    exec(blocks[0], place)
    axes = eval(blocks[1], place)
    axes.figure.savefig(tmp_path / "again.svg")
    name = re.findall(r"^## (\w+)$", index.read_text(), re.MULTILINE)[0]
    assert (tmp_path / "again.svg").read_bytes() == (index.parent / f"{name}.svg").read_bytes()


def test_numbers_of_the_summary_are_those_by_hand(text: str) -> None:
    rows = {row["method"]: row for row in Read(text).table("overview")}
    half = T * 1.0  # seeds 0 and 1 differ by 2 points: their standard deviation is sqrt(2), over sqrt(2) it is 1
    assert {name: row["accuracy"] for name, row in rows.items()} == {
        "fedtiny": f"79.0 ± {half:.1f} %",
        "fedmef": f"69.0 ± {half:.1f} %",
        "fedavg": f"89.0 ± {half:.1f} %",
    }
    assert {name: row["sent"] for name, row in rows.items()} == {"fedtiny": "9.00 kB", "fedmef": "18.0 kB", "fedavg": "90.0 kB"}
    assert {name: row["memory"] for name, row in rows.items()} == {"fedtiny": "2.50 MB", "fedmef": "2.50 MB", "fedavg": "5.00 MB"}
    assert {row["seeds"] for row in rows.values()} == {"2"}
    cards = "".join(Read(text).texts["ul"])
    assert re.search(r"Highest accuracy\s+89.0 ±\s12.7\s%\s+fedavg; mean and 95 % interval of 2 seeds", cards)
    assert re.search(r"Fewest bytes\s+9 kB\s+fedtiny: 10 % of fedavg, for 10.0 points less accuracy", cards)
    assert re.search(r"Finished\s+6 of 6 runs", cards)


def test_tables_of_the_comparison(text: str) -> None:
    rows = {row["job"]: row for row in Read(text).table("compared-1")}
    assert rows["fedtiny"] == {
        "job": "fedtiny",
        "seeds": "2",
        "accuracy (%)": f"79.00 ± {T:.2f}",
        "difference (points)": "-10.00 ± 0.00",
        "pairs": "2",
        "p": "0.500",  # of two pairs of one sign: 2 of 4
        "p by Holm": "1.000",
    }
    assert rows["fedavg"]["difference (points)"] == "baseline"
    at_bytes = {row["job"]: row["accuracy (%)"].partition(" ")[0] for row in Read(text).table("compared-2")}
    assert at_bytes == {"fedtiny": "79.00", "fedmef": "23.00", "fedavg": "-"}  # with 9 kB, which no round of fedavg is content with


def test_curves_hold_the_numbers_of_the_runs(text: str) -> None:
    charts = Read(text).charts()

    def curve(name: str, group: str) -> dict[str, Any]:
        return next(trace for trace in charts[name]["data"] if trace.get("legendgroup") == group and trace.get("fill") is None)

    accuracy = curve("accuracy_over_round", "fedtiny")
    assert accuracy["x"] == [0, 1, 2, 3]
    assert accuracy["y"] == pytest.approx([0, 79 / 3, 2 * 79 / 3, 79], rel=1e-5)  # six digits
    assert accuracy["customdata"][3] == pytest.approx([79 - T, 79 + T], rel=1e-5)
    over_bytes = curve("accuracy_over_bytes", "fedavg")
    assert over_bytes["x"] == [30, 60, 90]  # kB, up and down; round 0 has sent nothing, and the axis is logarithmic
    assert curve("flops_over_round", "fedtiny")["y"] == [0, 1, 2, 3]  # MFLOP
    assert curve("churn", "fedtiny")["x"] == [2]
    assert curve("churn", "fedtiny")["y"] == [40]  # one of five left, and one came
    assert curve("overlap", "fedtiny")["y"] == pytest.approx([100, 100, 200 / 3, 200 / 3], rel=1e-5)  # four of six weights
    assert curve("pareto_bytes", "fedmef")["x"] == [18]
    assert curve("worst_client_over_round", "fedavg")["y"][3] == pytest.approx(87)
    partition = charts["partition"]["data"][0]
    assert partition["z"] == [[4, 0], [1, 3], [0, 4]]
    differences = [trace for trace in charts["differences"]["data"] if trace["legendgroup"] == "fedtiny"]
    assert differences[0]["x"] == pytest.approx([-10, -10])
    assert differences[1]["x"] == pytest.approx([-10])
    phases = {trace["name"]: trace["x"] for trace in charts["phases"]["data"]}
    assert phases == {"compute": [6, 6, 6], "server": [1, 1, 1], "evaluate": [1, 1, 1]}  # of four rows


def test_tables_of_clients_and_of_runs(text: str) -> None:
    read = Read(text)
    clients = {row["job"]: row for row in read.table("clients-at-the-end")}
    assert clients["fedavg"] == {
        "job": "fedavg",
        "seeds": "2",
        "round": "3",
        "clients": "3",
        "worst": "87.0 %",  # 88 and 86
        "10th percentile": "87.2 %",
        "median": "88.0 %",
        "90th percentile": "88.8 %",
        "best": "89.0 %",
        "worst client": "2 of fedavg-0",
    }
    runs = {row["run"]: row for row in read.table("each-run")}
    assert {name: runs["fedmef-1"][name] for name in ("method", "seed", "rounds", "state")} == {
        "method": "fedmef",
        "seed": "1",
        "rounds": "3",
        "state": "finished",
    }
    shared = {row["what"]: row["value"] for row in read.table("shared")}
    assert shared["hosts"] == "node7"
    assert shared["MPI ranks"] == "4"
    assert shared["started"] == "2026-11-28 08:30 UTC"
    assert shared["partition (SHA-256)"] == "ab" * 32
    assert 'name = "fedtiny"' in "".join(read.texts["pre"])
    assert f"{'11' * 32}  fedavg-1" in "".join(read.texts["pre"])


def test_the_page_is_one_file_that_reads_well(text: str) -> None:
    read = Read(text)
    named = [found.get(key) for _, found in read.tags for key in ("src", "href") if found.get(key)]
    assert all(str(link).startswith(("#", "data:image/svg+xml;base64,")) for link in named)
    assert not re.search(r"@import|url\(", "".join(read.texts["style"]))
    assert ("html", {"lang": "en"}) in read.tags
    assert read.texts["title"] == ["fedavg · fedmef · fedtiny"]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [found["id"] for _, found in read.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert all(found.get("alt") for tag, found in read.tags if tag == "img")
    assert all(found.get("scope") in ("col", "row") for tag, found in read.tags if tag == "th")
    assert all(found.get("aria-label") for tag, found in read.tags if found.get("class") == "chart")


def test_a_single_dense_run_that_goes_on(tmp_path: Path) -> None:
    run = write(tmp_path / "late.h5", "fedavg", done=1, finished=False, masked=False)
    report = assembly.report([run], "figures").report
    assert report.warning == "The run has not ended: late (stopped, round 1 of 3). What follows is of the rounds that were done."
    read = Read(page.render(report, {figure.name: b"<svg/>" for figure in report.figures()}))
    left_out = "".join(read.texts["main"]).partition("Not on this page")[2]
    for what in ("Accuracy against bytes: ", "Paired differences: ", "Density of layers: ", "Churn of masks: ", "Overlap of masks: "):
        assert what in left_out
    assert read.charts()["accuracy_over_round"]["data"][0]["x"] == [0, 1]
    assert not [found for tag, found in read.tags if tag == "fieldset"]  # there is nothing to switch


def test_a_run_without_a_row_has_a_page_too(tmp_path: Path) -> None:
    run = write(tmp_path / "begun.h5", done=-1, finished=False)
    assert "begun (stopped, round 0 of 3)" in command.write([run], tmp_path / "report.html")[2]


def damaged(path: Path, how: str) -> Path:
    if how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.write_text("\x1b[31mnot a run")
    elif how == "other":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif how != "missing":
        write(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    if how == "newer":
        with h5py.File(path, "r+") as file:
            file.attrs["format_version"] = 99
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "it is empty"),
        ("foreign", "it is no HDF5 file"),
        ("other", "it has no format_version"),
        ("truncated", "cannot be read: it was cut short or is damaged"),
        ("newer", "in a newer format than this fedsim reads"),
        ("missing", "there is no run file"),
    ],
)
def test_what_is_no_run_file_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path, how: str, message: str) -> None:
    sound, run = write(tmp_path / "sound.h5"), damaged(tmp_path / "run.h5", how)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        command.write([sound, run], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(run) in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob("report*")) == []


def test_only_a_page_of_ours_is_replaced(tmp_path: Path) -> None:
    run, out = write(tmp_path / "run.h5", done=-1, finished=False), tmp_path / "report.html"
    out.write_text("<p>mine</p>")
    with pytest.raises(FileExistsError, match="is no report of fedsim"):
        command.write([run], out)
    assert out.read_text() == "<p>mine</p>"
    with pytest.raises(ValueError, match=r"does not end in \.html"):
        command.write([run], run)
    with pytest.raises(IsADirectoryError, match="give --out a file"):
        command.write([run], tmp_path)
    (tmp_path / "report_figures").mkdir()
    (tmp_path / "report_figures" / "mine.txt").write_text("mine")
    out.unlink()
    with pytest.raises(FileExistsError, match="did not write"):
        command.write([run], out)
    (tmp_path / "report_figures" / "mine.txt").unlink()
    command.write([run], out)
    first = out.read_text()
    command.write([run], out)
    assert "fedsim report" in first
    assert "fedsim report" in out.read_text()


def test_a_place_that_cannot_be_written_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^{re.escape(str(tmp_path))}/file cannot be written: File exists; choose another --out$"):
        command.write([write(tmp_path / "run.h5")], tmp_path / "file" / "report.html")
