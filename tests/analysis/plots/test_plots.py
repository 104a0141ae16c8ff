"""plots: figures show the numbers of measures, in one style, and foreign text to the letter."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import fedsim_analysis
import matplotlib as mpl
import nbclient
import nbformat
import numpy as np
import pytest
from drawn_runs import write
from fedsim_analysis import measures, plots
from fedsim_analysis.plots import text
from matplotlib import cbook, pyplot
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

ALL = {
    "accuracy": ("Round", "Test accuracy (%)"),
    "loss": ("Round", "Test loss (nat)"),
    "train_loss": ("Round", "Training loss (nat)"),
    "density": ("Round", "Density (%)"),
    "bytes": ("Round", "Sent, up and down (MB)"),
    "flops": ("Round", "Training of all clients (kFLOP)"),
    "memory": ("Round", "Memory of the largest client (B)"),
    "seconds": ("Round", "Wall time (s)"),
    "worst_client": ("Round", "Worst client's accuracy (%)"),
    "layer_density": ("Round", "Layer"),
    "mask_churn": ("Round", "Mask churn (%)"),
    "mask_overlap": ("Round", "Overlap with first mask (%)"),
    "clients": ("Round", "Accuracy of clients (%)"),
    "partition": ("Class", "Client"),
    "phases": ("Time of all rounds (s)", ""),
    "pareto": ("Sent, up and down (MB)", "Test accuracy (%)"),
    "differences": ("Test accuracy minus that of fedavg (percentage points)", ""),
}
FOREIGN = "$x_1$ \\alpha_{2}\n^a研 <b>" + "long" * 30


def named(ax: Axes) -> tuple[str, str]:
    return " ".join(ax.get_xlabel().split()), " ".join(ax.get_ylabel().split())


def png(ax: Axes) -> bytes:
    stream = io.BytesIO()
    ax.figure.savefig(stream, format="png", dpi=60)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of fedtiny, two of fedavg, which sends ten times as much."""
    found = tmp_path_factory.mktemp("runs")
    write(found / "a.h5", (0.2, np.nan, 0.4, 0.5), scale=1e5)
    write(found / "b.h5", (0.4, np.nan, 0.6, 0.8), seed=1, scale=1e5)
    write(found / "c.h5", (0.2, np.nan, 0.5, 0.9), "fedavg", fields="", masks=None, scale=1e6)
    write(found / "d.h5", (0.2, np.nan, 0.6, 0.9), "fedavg", seed=1, fields="", masks=None, scale=1e6)
    return found


@pytest.fixture(scope="module")
def runs(folder: Path) -> Any:
    return fedsim_analysis.open(folder)


@pytest.mark.parametrize(("name", "axes"), ALL.items())
def test_every_figure_is_drawn_with_units(runs: Any, name: str, axes: tuple[str, str]) -> None:
    before = dict(mpl.rcParams)
    ax = getattr(plots, name)(runs)
    png(ax)
    assert named(ax) == axes
    assert ax.figure.get_figwidth() == 3.35
    assert dict(mpl.rcParams) == before
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("name", "group"),
    [("accuracy", "rounds"), ("clients", "clients"), ("phases", "timing"), ("layer_density", "layers"), ("mask_overlap", "masks")],
)
def test_the_nodes_do_as_well(runs: Any, name: str, group: str) -> None:
    assert named(getattr(plots, name)(runs[group].to_dataset())) == ALL[name]


def test_lines_are_means_in_percent_and_bands_their_intervals(runs: Any) -> None:
    ax = plots.accuracy(runs)
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_data()[1], [30, 50, 65])
    assert line.get_data()[0].tolist() == [0, 2, 3]
    (band, _) = (one for one in ax.collections if isinstance(one, FillBetweenPolyCollection))
    one = measures.curves(runs, "accuracy")[0]
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(100 * one.high.max())
    assert [entry.get_text() for entry in ax.get_legend().get_texts()] == ["fedtiny", "fedavg"]
    assert [note.get_text() for note in ax.texts] == ["mean and 95 % interval of 2 seeds"]
    assert ax.get_ylim()[1] <= 102


def test_costs_that_differ_widely_are_on_a_logarithmic_axis(runs: Any) -> None:
    ax = plots.accuracy(runs, over="bytes")
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "Sent, up and down (MB)")
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [33, 66])  # nothing was sent in round 0
    assert plots.accuracy(runs, over="seconds").get_xscale() == "linear"


def test_a_method_looks_the_same_in_every_figure(runs: Any) -> None:
    looks = {
        (line.get_color(), line.get_marker())
        for ax in (plots.accuracy(runs), plots.mask_churn(runs), plots.loss(runs.isel(run=[0, 1])), plots.clients(runs))
        for line in ax.lines[:1]
    }
    assert looks == {(plots.colours.of_method("fedtiny"), "o")}


def test_the_front_is_a_line_and_what_it_beats_is_hollow(runs: Any, tmp_path: Path) -> None:
    write(tmp_path / "e.h5", (0.1, 0.1), "fedmef", fields="", scale=1e8)
    ax = plots.pareto(fedsim_analysis.open([*runs["rounds"]["path"].values.tolist(), tmp_path / "e.h5"]))
    front, *others = [line for line in ax.lines if line.get_drawstyle() == "steps-post" or line.get_marker() in "oDs"]
    np.testing.assert_allclose(front.get_data(), [[0.0066, 0.066], [65, 90]])  # GB
    assert [line.get_markerfacecolor() == "white" for line in others] == [False, False, True]


def test_phases_of_each_round(runs: Any) -> None:
    ax = plots.phases(runs, over="round", group="fedavg")
    assert named(ax) == ("Round", "Time of a round (s)")
    compute, evaluate = ax.collections  # phases that took no time are left out
    assert compute.get_paths()[0].vertices[:, 1].max() == 4
    assert evaluate.get_paths()[0].vertices[:, 1].max() == 4.5
    with pytest.raises(ValueError, match="no group 'fedtin'; the groups are fedtiny; fedavg"):
        plots.phases(runs, over="round", group="fedtin")


def test_legends_cover_no_data(tmp_path: Path) -> None:
    for k in range(9):
        write(tmp_path / f"{k}.h5", (0.1, 0.2 + 0.05 * k), "fedtiny", fields=f"density = {k / 100}")
    ax = plots.accuracy(fedsim_analysis.open(tmp_path))
    png(ax)
    assert len(ax.get_legend().get_texts()) == 9
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1
    assert ax.get_window_extent().height > 0.5 * ax.figure.dpi
    assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.x1


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two runs whose every name looks like a formula, or has signs that no font of matplotlib has."""
    folder = tmp_path_factory.mktemp("foreign")
    more: dict[str, Any] = {"fields": "", "layers": ["conv", FOREIGN]}
    more["called"] = {"client": [FOREIGN, "$", "_"], "class": ["\\frac{1}{2}", "$$"]}
    write(folder / "$a$.h5", method=FOREIGN, **more)
    write(folder / "b.h5", method="$b$", **more)
    return fedsim_analysis.open(folder)


@pytest.mark.parametrize("name", ["accuracy", "layer_density", "partition", "phases", "pareto"])
def test_foreign_text_is_shown_to_the_letter(foreign: Any, name: str) -> None:
    ax = getattr(plots, name)(foreign)
    png(ax)  # warnings, such as of missing signs, are errors
    assert not [found for found in ax.figure.findobj(mpl.text.Text) if cbook.is_math_text(found.get_text())]


def test_text_is_kept_short_and_told_apart() -> None:
    assert text.plain("a$b\n c") == r"a\$b c"
    assert text.plain("研") in ("研", "\\u7814")
    assert text.shortened(["abcdefghij", "abc"], 7) == ["abc…hij", "abc"]
    assert text.shortened(["abcXdefghij", "abcYdefghij"], 7) == ["abcXdefghij", "abcYdefghij"]
    assert text.shortened(["abcdefghij"] * 2, 7) == ["abc…hij"] * 2


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_files_are_the_same_bytes_and_hold_their_fonts(runs: Any, tmp_path: Path, kind: str) -> None:
    for name in ("one", "two"):
        plots.accuracy(runs, over="bytes").figure.savefig(tmp_path / f"{name}.{kind}")
    content = (tmp_path / f"one.{kind}").read_bytes()
    assert content == (tmp_path / f"two.{kind}").read_bytes()
    assert (b"<text" not in content) if kind == "svg" else (b"/FontFile2" in content and b"/Type3" not in content)


def test_axes_that_are_given_are_used_and_saved_in_the_style(runs: Any, tmp_path: Path) -> None:
    figure = Figure(figsize=(7, 3))
    left, right = figure.subplots(1, 2)
    assert plots.accuracy(runs, ax=left) is left
    assert plots.partition(runs, ax=right) is right
    for name in ("one", "two"):
        plots.save(left, tmp_path / f"{name}.pdf")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
    assert b"/Type3" not in (tmp_path / "one.pdf").read_bytes()


def test_width_and_style_may_be_chosen(runs: Any) -> None:
    assert plots.accuracy(runs, width="page").figure.get_figwidth() == 6.9
    assert plots.accuracy(runs, width=5).figure.get_figwidth() == 5
    with plots.style({"axes.labelsize": 11}):
        assert plots.accuracy(runs).xaxis.label.get_size() == 11
    assert plots.accuracy(runs).xaxis.label.get_size() == 8
    with pytest.raises(ValueError, match="width='narrow'; it is 'column' or 'page', or a number of inches"):
        plots.accuracy(runs, width="narrow")


def test_an_interactive_pyplot_shows_the_figure(runs: Any) -> None:
    with pyplot.ion():
        ax = plots.accuracy(runs)
    assert pyplot.gcf() is ax.figure
    pyplot.close("all")


@pytest.mark.parametrize("accuracies", [(0.3,), (np.nan, 0.3, np.nan, np.nan, 0.5)])
def test_few_points_are_drawn(tmp_path: Path, accuracies: tuple[float, ...]) -> None:
    write(tmp_path / "a.h5", accuracies, planned=9)
    runs = fedsim_analysis.open(tmp_path / "a.h5")
    assert plots.accuracy(runs).get_legend() is None
    for name in ("accuracy", "clients", "pareto", "layer_density"):
        png(getattr(plots, name)(runs))
    assert [entry.get_text() for entry in plots.pareto(runs).get_legend().get_texts()] == ["fedtiny (unfinished)"]


def test_dense_runs_have_no_masks_to_draw(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", method="fedavg", fields="", masks=None)
    runs = fedsim_analysis.open(tmp_path / "a.h5")
    for draw in (plots.mask_churn, plots.mask_overlap, lambda held: plots.mask_overlap(held, "rounds")):
        with pytest.raises(ValueError, match="no run has masks: the networks are dense"):
            draw(runs)
    write(tmp_path / "b.h5", masks=((True, False, True, False),))
    with pytest.raises(ValueError, match="no mask has changed in any round"):
        plots.mask_churn(fedsim_analysis.open(tmp_path / "b.h5"))


def test_an_unknown_figure_is_answered_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'acuracy'; it has accuracy, bytes, clients"):
        plots.acuracy  # noqa: B018
    assert all(callable(getattr(plots, name)) or name == "colours" for name in plots.__all__)


@pytest.mark.processes
@pytest.mark.parametrize("name", list(ALL))
def test_a_figure_of_a_path_says_what_it_needs(name: str) -> None:
    with pytest.raises(TypeError, match=r"a figure needs the runs that fedsim_analysis.open\(…\) gives, not a str"):
        getattr(plots, name)("runs/figure")


def test_matplotlib_is_imported_with_the_first_figure_alone() -> None:
    code = "import sys, fedsim_analysis.plots; from fedsim_analysis.measures import colours; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")  # of the machinery of notebooks
def test_a_notebook_shows_each_figure_once(folder: Path) -> None:
    first = f"import fedsim_analysis\nfrom fedsim_analysis import plots\nruns = fedsim_analysis.open({str(folder)!r})\nplots.accuracy(runs)"
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (first, "ax = plots.pareto(runs)", "1")])
    nbclient.NotebookClient(page, kernel_name="python3", timeout=120).execute()
    shown = [[output.data for output in cell.outputs if "image/png" in output.get("data", {})] for cell in page.cells]
    assert [len(pictures) for pictures in shown] == [1, 1, 0]


def test_legends_beside_long_names_keep_within_the_figure(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.h5", (0.2, 0.4), fields=f"a_long_name_of_a_field = {1 / (3 + i)}\n", scale=1e5)
    ax = plots.phases(fedsim_analysis.open(tmp_path))
    png(ax)
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= ax.figure.bbox.x1


def test_legends_of_four_long_entries_keep_within_the_figure(tmp_path: Path) -> None:
    for i, density in enumerate((0.03, 0.1, 0.3)):
        write(tmp_path / f"{i}.h5", (0.2, 0.4), fields=f"density = {density}", scale=1e5)
    write(tmp_path / "dense.h5", (0.2, 0.5), "fedavg", fields="", masks=None, scale=1e6)
    ax = plots.accuracy(fedsim_analysis.open(tmp_path))
    png(ax)
    legend, figure = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert legend.x1 <= figure.x1
    assert ax.get_window_extent().width > 0.7 * figure.width
