"""The lines of a screen: what they say, that they fit, and that text of others is shown and never obeyed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fedsim_analysis.watch import many_runs, one_run
from fedsim_analysis.watch.curves import Curve, bars, plot
from fedsim_analysis.watch.lock import began
from fedsim_analysis.watch.plain import Lines
from fedsim_analysis.watch.printed import ago, duration, left, quantity, shown
from fedsim_analysis.watch.runs import Watched
from rich.text import Text
from watched_runs import SHOWN, add, begun, held, killed, listed, nothing, run_file

SIZES = [(80, 24), (120, 40), (60, 24), (60, 10), (40, 15), (200, 60), (20, 5), (100, 12), (250, 8)]
EVIL = "\x1b[31mred[bold]\x9b2J\u202e\ud800"


@pytest.fixture(scope="module")
def going(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run that goes on: 12 of 20 rounds."""
    path = run_file(tmp_path_factory.mktemp("going") / "run.h5", 12)
    with held(path):
        watched = Watched(path)
        watched.look()
        yield watched


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Runs of each kind, of one sweep that goes on."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(3):
        run_file(folder / f"done-seed{seed}.h5", 5, planned=5, finished=True)
    killed(run_file(folder / "killed.h5", 3))
    run_file(folder / "failed.h5", 4)
    (folder / "foreign.h5").write_bytes(b"no HDF5")
    me = {"process": os.getpid(), "began": began(os.getpid())}
    failed = {"failed.h5": {"state": "failed", "message": f"ValueError: {EVIL[:-1]}", **me}}
    listed(folder, failed | {f"todo-{seed}.h5": {"state": "waiting", **me} for seed in range(30)})
    run_file(folder / "going.h5", 12)
    with held(folder / "going.h5"):
        watched = Watched(folder)
        for _ in range(3):
            watched.look()
        yield watched


def texts(lines: list[Text]) -> list[str]:
    return [line.plain.rstrip() for line in lines]


def line_of(lines: list[Text], begin: str) -> str:
    found = [text for text in texts(lines) if text.startswith(begin)]
    assert len(found) == 1, texts(lines)
    return " ".join(found[0].split())


# One run


def test_numbers_of_a_run(going: Watched) -> None:
    lines = one_run.frame(going.runs[0], 80, 12, plain=False)
    assert texts(lines)[:2] == ["run.h5  running", "fedtiny, seed 3, 5 clients, 1 rank on node1, since 2026-01-02 03:04:05"]
    assert line_of(lines, "round 12 of 20").startswith("round 12 of 20 ━")
    assert " 60.0% 2.5 s a round about 0:00:" in line_of(lines, "round 12 of 20")
    assert line_of(lines, "accuracy").startswith("accuracy 10.0% • clients 5.0% (round 10)")
    assert line_of(lines, "loss").startswith("loss 2 • training 0.154 ")
    assert line_of(lines, "density").startswith("density 0.0769 ")
    assert line_of(lines, "sent, MB").startswith("sent, MB 36.0 MB, 234 MB in all ")  # 3 MB times 0 + 1 + … + 12
    assert line_of(lines, "seconds").startswith("seconds 2.5 s the last round ")
    assert line_of(lines, "phases") == "phases compute 60.0%, record 20.0%, server 20.0%"
    assert line_of(lines, "Ctrl-C") == "Ctrl-C ends this view and leaves the run alone"
    assert "writes it since" in texts(lines)[-2]
    assert not [text for text in texts(one_run.frame(going.runs[0], 80, 12, plain=False, live=False)) if "Ctrl-C" in text]


def test_plots_come_where_there_is_room(going: Watched) -> None:
    def plots(width: int, height: int) -> int:
        return sum(text.count("┌") for text in texts(one_run.frame(going.runs[0], width, height, plain=False)))

    assert [plots(*size) for size in ((80, 12), (80, 24), (60, 24), (120, 24), (120, 40))] == [0, 4, 2, 5, 5]
    large = texts(one_run.frame(going.runs[0], 120, 40, plain=False))
    assert any(text.endswith("compute    ━━━━━━────  60.0%  1.5 s") for text in large)


@pytest.mark.parametrize("plain", [False, True], ids=["signs", "ascii"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_frames_fit(going: Watched, many: Watched, width: int, height: int, plain: bool) -> None:
    for lines in (one_run.frame(going.runs[0], width, height, plain), many_runs.frame(many, width, height, plain)):
        assert 0 < len(lines) <= height
        assert max(line.cell_len for line in lines) <= width
        assert not plain or all(line.plain.isascii() for line in lines)


def test_a_run_without_rows_and_one_without_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with begun(path, ranks=4, hosts="node1,node2") as record, held(path):
        watched = Watched(path)
        watched.look()
        assert texts(one_run.frame(watched.runs[0], 80, 24, plain=False))[1].startswith(
            "fedtiny, seed 3, 5 clients, 4 ranks on node1,node2,"
        )
        record.row(0, {"density": 1.0})
        watched.look()
        lines = one_run.frame(watched.runs[0], 80, 24, plain=False)
        assert texts(lines)[2].startswith("round 0 of 20 ")
        assert texts(lines)[3].startswith("accuracy  - ")
        assert texts(lines)[4].split("  ")[1] == "not measured so far"


def test_recording_on_several_ranks_is_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    with begun(path, ranks=3) as record:
        for r in range(3):
            add(record, r, {"compute": 3.0, "server": 1.0, "record": 2.0})
    watched = Watched(path)
    watched.look()
    expected = "phases compute 75.0%, record 50.0% beside the others, server 25.0%"
    assert line_of(one_run.frame(watched.runs[0], 80, 12, plain=False), "phases") == expected
    large = texts(one_run.frame(watched.runs[0], 120, 40, plain=True))
    assert any(text.endswith("record     beside      50.0%  2 s") for text in large)


@pytest.mark.parametrize("value", [1e308, -1e308, np.inf, -np.inf, np.nan, -1.0, 0.0, 1e-320, 1e18])
def test_any_values_can_be_shown(tmp_path: Path, value: float) -> None:
    path = tmp_path / "run.h5"
    with begun(path, rounds_planned=2**62) as record, held(path):
        for r in range(4):
            record.row(r, dict.fromkeys(SHOWN, value), timing={"compute": value, "record": value})
        one, folder = Watched(path), Watched(tmp_path)
        news = [Lines(one), Lines(folder)]
        one.look(), folder.look()
        with np.errstate(all="ignore"):
            for width, height in ((80, 24), (40, 15)):
                for lines in (one_run.frame(one.runs[0], width, height, False), many_runs.frame(folder, width, height, False)):
                    assert max(line.cell_len for line in lines) <= width
            assert all(len(line) < 300 for each in news for line in each.news())


def test_text_of_a_run_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2J[red]run.h5"
    run_file(path, 5, method="[bold]x[/bold] {y}", hosts="[link=file:///]h[/]")
    watched = Watched(path)
    watched.look()
    found = texts(one_run.frame(watched.runs[0], 120, 12, plain=False))
    assert found[0] == r"\x1b[2J[red]run.h5  stopped"
    assert found[1].startswith("[bold]x[/bold] {y}, seed 3, 5 clients, 1 rank on [link=file:///]h[/]")


def test_signs_that_steer_a_terminal_are_written_out() -> None:
    assert shown(EVIL) == r"\x1b[31mred[bold]\x9b2J\u202e\ud800"
    assert shown("a\nb\tc") == "a b c"
    assert shown("x" * 1000, 10) == "xxxxxxxxx…"
    assert shown("größe ✓ 日本") == "größe ✓ 日本"


# A folder


def test_lines_of_a_folder(many: Watched) -> None:
    lines = many_runs.frame(many, 120, 60, plain=False)
    head = texts(lines)
    assert head[0].endswith(": 1 running, 30 waiting, 3 done, 1 failed, 1 stopped, 1 unreadable")
    assert head[1].startswith("34 of 675 rounds ")  # 3 * 5 + 3 + 4 + 12; 3 * 5 + 33 * 20
    assert head[2].split() == ["run", "state", "round", "accuracy", "loss", "density", "sent", "s/round", "left,", "about"]
    assert line_of(lines, "done-seed1 ") == "done-seed1 done 5/5 5.0% 2.5 0.167 45.0 MB 2.5"
    assert line_of(lines, "going ").startswith("going running 12/20 10.0% 2 0.0769 234 MB 2.5 0:00:")
    assert line_of(lines, "killed ") == "killed stopped 3/20 0.0% 3 0.25 18.0 MB 2.5"
    assert line_of(lines, "todo-29 ") == "todo-29 waiting 0/20"
    assert line_of(lines, "failed.h5") == r"failed.h5 failed: ValueError: \x1b[31mred[bold]\x9b2J\u202e"
    assert line_of(lines, "foreign.h5").startswith("foreign.h5 unreadable: cannot be read: it is no HDF5 file")
    assert "has ended and did not say why" in line_of(lines, "killed.h5 ")


def test_where_there_is_no_room_those_stay_that_need_a_look(many: Watched) -> None:
    found = texts(many_runs.frame(many, 80, 13, plain=False))
    assert [text.split()[0] for text in found[3:7]] == ["done-seed0", "failed", "foreign", "going"]
    assert found[7].split()[0] == "killed"
    assert found[8] == "… and 30 waiting, 2 done without a line here: there is no room"


def test_narrow_folders_leave_columns_out(many: Watched) -> None:
    titles = [texts(many_runs.frame(many, width, 60, plain=False))[2].split() for width in (120, 70, 50, 30)]
    assert titles[0][-3:] == ["s/round", "left,", "about"]
    assert "sent" not in titles[1]
    assert {"run", "state", "round", "accuracy"} <= set(titles[2])
    assert {"run", "state"} <= set(titles[3])


# Curves


def rows(values: np.ndarray, plain: bool = False) -> list[str]:
    return [line.plain for line in plot([Curve("x", values)], 40, 8, plain)]


def test_a_curve_has_its_lowest_and_highest_value_and_its_rounds_on_the_axes() -> None:
    found = rows(np.linspace(0.25, 0.75, 31))
    assert len(found) == 8
    assert {len(row) for row in found} == {40}
    assert [row.split("┤")[0].strip() for row in found if "┤" in row] == ["0.75", "0.5", "0.25"]
    assert found[-1].split() == ["0", "15", "30"]
    assert [found[1].rstrip("│ ")[-1] != "┤", found[1].split("┤")[1][:20].isspace()] == [True, True]  # it rises to the right


@pytest.mark.parametrize(
    "values", [[np.nan, 1.0], [5.0], [2.0, 2.0, 2.0], [-1e300, 1e300], [1e-300, 3e-300], [np.inf, 1.0, -np.inf], [0.0], [1.0] * 100_000]
)
@pytest.mark.parametrize("plain", [False, True])
def test_any_values_have_a_curve(values: list[float], plain: bool) -> None:
    found = rows(np.array(values), plain)
    assert len(found) == 8
    assert {len(row) for row in found} == {40}
    assert not plain or all(row.isascii() for row in found)


def test_bars_go_from_the_lowest_value_to_the_highest() -> None:
    assert bars(np.arange(8.0), 20, plain=False) == "▁▂▃▄▅▆▇█"
    assert bars(np.array([3.0, np.nan, 1.0, np.inf, 2.0]), 20, plain=False) == "█▁▅"
    assert bars(np.repeat([0.0, 7.0], 500), 4, plain=True) == "__@@"
    assert bars(np.array([4.0, 4.0]), 9, plain=False) == "▁▁"
    assert bars(nothing(3), 9, plain=False) == ""


def test_numbers_as_people_read_them() -> None:
    assert [quantity(value, "B") for value in (0, 999, 44_734_248, 1.5e16, float("nan"))] == ["0 B", "999 B", "44.7 MB", "15.0 PB", "-"]
    assert [duration(value) for value in (0.1234, 12.34, 200, float("nan"))] == ["0.123 s", "12.3 s", "0:03:20", "-"]
    assert [left(value) for value in (200.4, float("nan"), -1, 1e300)] == ["about 0:03:20 left", "", "", ""]
    assert [ago(value) for value in (0.4, 59, 300, 9000, 200_000)] == ["just now", "59 s ago", "5 min ago", "2 h ago", "2 days ago"]
