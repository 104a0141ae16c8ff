"""The leaderboard: its numbers are those of the overview, and its figure shows every method once, of one data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedsim_analysis
import numpy as np
import pytest
from compared_runs import NAN, write
from fedsim_analysis import comparison, plots
from fedsim_analysis.comparison.leaderboard import Leaderboard, leaderboard
from fedsim_analysis.measures import colours
from fedsim_analysis.plots import leaderboards
from matplotlib.figure import Figure

from fedsim.cli import commands

FINALS = {"random": (0.5, 0.6), "synflow": (0.7, 0.8)}  # of densities 0.1 and 0.2


def each(density: float, flops: float, up: float, clients: float = 0.4) -> dict[str, Any]:
    """Columns of a run of three rounds, of which round 0 trains nothing."""
    costs = {"density": density, "max_client_flops": (0.0, flops, flops), "max_client_flops_share": (0.0, flops / 100, flops / 100)}
    return costs | {"bytes_up": up, "bytes_down": up, "max_client_model_memory": 10 * up, "client_accuracy_macro": clients}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of each job, whose accuracies are 0.02 apart: dense, two small dense networks, two methods at two densities, finetune."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        more = 0.02 * seed

        def add(name: str, method: Any, value: float, costs: dict[str, Any], seed: int = seed, **job: Any) -> None:
            found.append(write(folder / f"{name}_{seed}.h5", method, seed, (0.1, NAN, value), each=costs, **job))

        add("dense", "fedavg", 0.9 + more, each(1.0, 100.0, 1e6))
        add("finetune", "finetune", 0.88 + more, each(1.0, 100.0, 1e6, 0.95 + more))
        for density in (0.2, 0.1):
            model = {"model": {"match": "params", "match_density": density}}
            add(f"small{density}", "fedavg", 0.59 + density + more, each(1.0, 30.0 * 10 * density, 1e6 * density), job=model)
            for name, finals in FINALS.items():
                value = finals[int(density == 0.2)] + more
                add(f"{name}{density}", {"name": name, "density": density}, value, each(density, 200 * density, 1e6 * density))
    return found


@pytest.fixture(scope="module")
def found(runs: list[Path]) -> Leaderboard:
    return leaderboard(runs)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    def cli(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fedsim", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            commands.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), " ".join((captured.out + captured.err).split())

    return cli


def test_a_line_for_each_method_by_its_best_accuracy(found: Leaderboard) -> None:
    shown = [(line.label, [round(point.score, 6) for point in line.points]) for line in found.lines]
    assert shown == [
        ("fedavg", [0.91]),
        ("finetune", [0.89]),
        ("synflow", [0.71, 0.81]),  # by rising density
        ("small dense", [0.7, 0.8]),
        ("random", [0.51, 0.61]),
    ]
    assert [line.label for line in found.lines if line.is_reference] == ["fedavg"]
    assert found.lines[0].points[0].half == pytest.approx(12.7062 * 0.01, rel=1e-4)  # Student's t of one degree of freedom
    assert (found.personal, found.points[0].seeds, found.data) == (["finetune"], 2, "digits")


def test_numbers_are_those_of_the_overview(runs: list[Path], found: Leaderboard) -> None:
    table = comparison.compare(runs)
    rows = table[table["method.name"] == "random"].sort_values("density")
    line = next(line for line in found.lines if line.label == "random")
    names = ["density", "max_client_flops_share", "bytes", "max_client_model_memory"]
    assert [point.costs for point in line.points] == [tuple(row) for row in rows[names].to_numpy().tolist()]
    assert [cost.name for cost in found.costs] == names
    assert line.points[0].costs == pytest.approx((0.1, 0.2, 6e5, 1e6))  # three rounds of 1e5 up and down


def test_a_small_dense_network_is_a_share_of_the_large_one(found: Leaderboard, runs: list[Path]) -> None:
    small = next(line for line in found.lines if line.method == "small dense")
    assert [point.costs[:2] for point in small.points] == [pytest.approx((0.1, 0.3)), pytest.approx((0.2, 0.6))]
    alone = leaderboard([run for run in runs if "dense" not in run.name])
    shares = [point.costs[1] for line in alone.lines if line.method == "small dense" for point in line.points]
    assert len(shares) == 2
    assert np.isnan(shares).all()  # of what, nobody knows


def test_fields_of_words_make_lines_of_their_own(tmp_path: Path) -> None:
    runs = []
    for k, (choice, share) in enumerate([("uniform", 0.5), ("uniform", 0.25), ("random", 0.5), ("random", 0.25)]):
        method = {"name": "structured", "choice": choice, "flops_share": share}
        runs.append(write(tmp_path / f"{k}.h5", method, 0, (0.1, NAN, 0.5 + 0.1 * k), each=each(share, 100 * share, 1e6)))
    lines = leaderboard(runs).lines
    assert [(line.label, len(line.points)) for line in lines] == [("structured, choice random", 2), ("structured, choice uniform", 2)]
    figure = plots.leaderboard(runs)
    assert {line.get_color() for line in figure.axes[0].lines} == {colours.of_method("structured")}
    assert len({line.get_markerfacecolor() for line in figure.axes[0].lines}) == 2


@pytest.mark.parametrize("metric", ["clients", "client_accuracy_macro"])
def test_accuracy_of_clients(runs: list[Path], metric: str) -> None:
    best = leaderboard(runs, metric).lines[0]
    assert (best.label, best.score) == ("finetune", pytest.approx(0.96))
    figure = plots.leaderboard(runs, metric)
    assert [ax.get_ylabel() for ax in figure.axes] == ["Clients' accuracy (%)", "", "Clients' accuracy (%)", ""]
    assert "in the other methods all have the server's" in " ".join(figure.get_supxlabel().split())


def test_the_caption_says_what_the_numbers_are(runs: list[Path]) -> None:
    note = " ".join(plots.leaderboard(runs).get_supxlabel().split())
    assert note.startswith("Accuracy of the last model on the global test set; mean and 95 % interval of 2 seeds; † clients have")
    assert "this is the accuracy of the server's model; small dense: density and FLOPs as shares of the large network's" in note
    assert "round 0" not in note  # in which no run of these took more
    shown = plots.leaderboard(runs, costs=["bytes"])
    assert (len(shown.axes), "small dense" in shown.get_supxlabel()) == (1, False)


def test_lines_of_one_density_stand_side_by_side(runs: list[Path], found: Leaderboard) -> None:
    figure = plots.leaderboard(runs)
    figure.draw_without_rendering()
    first, second = figure.axes[:2]
    places = {}
    for ax in (first, second):
        drawn = [line for line in ax.lines if line.get_linestyle() != "None" and line.get_marker() not in ("None", "")]
        ends = [
            line.get_transform().transform(line.get_xydata()[-1])[0] - ax.transData.transform(line.get_xydata()[-1])[0] for line in drawn
        ]
        places[ax] = np.array(ends) * 72 / figure.dpi
    assert sorted(places[first]) == pytest.approx([-3, 0, 0, 3])  # three of density 0.2, and finetune
    assert places[second] == pytest.approx(np.zeros(4))
    assert "points of one density stand side by side" in " ".join(figure.get_supxlabel().split())


def test_dense_averaging_is_a_line_with_its_interval(runs: list[Path]) -> None:
    for ax in plots.leaderboard(runs).axes:
        (level,) = (line for line in ax.lines if list(line.get_xdata()) == [0, 1])
        assert list(level.get_ydata()) == pytest.approx([91, 91])
        (band,) = ax.patches
        assert (band.get_y(), band.get_height()) == pytest.approx((91 - 12.7062, 2 * 12.7062), rel=1e-4)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_figure_shows_every_line_once_in_each_panel(runs: list[Path], found: Leaderboard) -> None:
    figure = plots.leaderboard(runs)
    assert len(figure.axes) == 4
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    names = [f"{line.label}{' (dense)' if line.is_reference else ''}{' †' if line.method == 'finetune' else ''}" for line in found.lines]
    assert texts(figure) == [*names, "", "mask chosen at the start", "networks of clients' own", "dense"]
    assert figure.get_figwidth() == 6.9
    for at, ax in enumerate(figure.axes):
        drawn = [line for line in ax.lines if line.get_marker() not in ("None", "")]
        assert len(drawn) == len(found.lines)
        random = next(line for line in drawn if line.get_color() == colours.AT_INIT and line.get_marker() == "o")
        factor = (1, 100, 1e-6, 1e-6)[at]
        expected = [point.costs[at] * factor for line in found.lines if line.label == "random" for point in line.points]
        assert random.get_xdata() == pytest.approx(expected)
        assert random.get_ydata() == pytest.approx([51, 61])
    assert figure.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in figure.axes[0].texts] == []


def test_no_text_lies_over_another(runs: list[Path]) -> None:
    figure = leaderboards.draw(leaderboard(runs))
    figure.draw_without_rendering()
    named = [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label) if label.get_text()]
    shown = [*named, *figure.legends, *(text for text in figure.texts if text.get_text())]
    boxes = [one.get_window_extent() for one in shown]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_twenty_four_methods_are_told_apart(tmp_path: Path) -> None:
    names = [name for name in colours.METHODS if name != colours.SMALL_DENSE][:24]
    runs = [
        write(tmp_path / f"{name}.h5", name, 0, (0.1, NAN, 0.3 + 0.02 * k), each=each(0.1 + 0.03 * k, 20.0 + k, 1e5 * (k + 1)))
        for k, name in enumerate(names)
    ]
    figure = plots.leaderboard(runs)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    drawn = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "")]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 24


def test_a_very_wide_interval_does_not_flatten_the_others(tmp_path: Path) -> None:
    finals = {"fedavg": (0.9, 0.9), "random": (0.2, 0.6), "snip": (0.7, 0.71)}
    runs = [
        write(tmp_path / f"{name}{seed}.h5", name, seed, (0.1, NAN, final), each=each(0.1, 10.0, 1e5))
        for name, pair in finals.items()
        for seed, final in enumerate(pair)
    ]
    low, high = plots.leaderboard(runs).axes[0].get_ylim()
    assert (low > 20, high < 105) == (True, True)


def test_runs_that_were_opened(runs: list[Path], found: Leaderboard) -> None:
    opened = plots.leaderboard(fedsim_analysis.open(runs[0].parent))
    assert sorted(texts(opened)) == sorted(texts(leaderboards.draw(found)))


@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_the_command_writes_the_figure(runs: list[Path], tmp_path: Path, cli: Any, ending: str) -> None:
    out = tmp_path / f"leaderboard.{ending}"
    code, text = cli(*runs, "--figure", out)
    assert (code, out.stat().st_size > 10_000) == (0, True)
    assert "5 lines of 8 jobs on digits" in text
    assert "networks of their own in finetune" in text
    assert "seeds" not in text  # no table
    first = out.read_bytes()
    cli(*runs, "--figure", out)
    assert out.read_bytes() == first


def test_what_the_command_refuses(runs: list[Path], tmp_path: Path, cli: Any) -> None:
    other = write(tmp_path / "other.h5", "fedavg", 0, (0.1, NAN, 0.5), each=each(1.0, 1.0, 1.0), job={"data": {"name": "cifar10"}})
    unmeasured = [write(tmp_path / f"{name}.h5", name, 0, (NAN, NAN, NAN)) for name in ("fedavg", "random")]
    good = tmp_path / "x.pdf"
    for words, said in [
        ([*runs, "--figure", tmp_path / "x.jpeg"], "a figure ends with .pdf, .svg or .png"),
        ([*runs, "--figure", tmp_path / "no" / "x.pdf"], f"there is no folder {tmp_path / 'no'}"),
        ([*runs, other, "--figure", good], "the runs have different data: cifar10; digits; a leaderboard"),
        ([*runs[:1], "--figure", good], "there are no two"),
        ([*unmeasured, "--figure", good], "no run has measured the accuracy"),
        ([*runs, "--figure", good, "--metric", "loss"], "--metric loss: a leaderboard shows accuracy,"),
        ([*runs, "--figure", good, "--metric", "clients", "--metric", "accuracy"], "a figure has one accuracy"),
        ([*runs, "--figure", good, "--table", "all"], "--table is for tables"),
        ([*runs, "--figure", good, "--csv"], "--csv is for tables"),
    ]:
        code, text = cli(*words)
        assert (code, said in text) == (2, True), (words, text)
        assert not good.exists()


def test_a_cost_that_is_not_measured_or_not_known(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"{name}.h5", name, 0, (0.1, NAN, 0.5)) for name in ("fedavg", "random")]
    figure = plots.leaderboard(runs)
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [["not measured"], ["not measured"], [], ["not measured"]]
    with pytest.raises(ValueError, match="a leaderboard has no cost joules"):
        leaderboard(runs, costs=["joules"])
