"""Large inputs: what a page shows of many jobs, rounds, layers and clients, and that it says what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fedsim_analysis import measures
from fedsim_analysis.measures.layers import Heat
from fedsim_analysis.report import assembly, charts, escaping, sparsity
from fedsim_analysis.report.contents import Call, Details, Figure, Note, Table
from reported_runs import write


def test_figures_show_the_best_of_many_jobs_and_tables_show_all(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"run{i}.h5", extra=f"density = 0.{i + 1}", accuracy=0.5 + i / 100, done=1, finished=False)
    made = assembly.report([tmp_path], "figures", most=2)
    best = ["fedtiny, density 0.3", "fedtiny, density 0.4"]
    assert [name for name, _ in made.report.groups] == best
    assert made.report.left_out[0] == "Figures show the 2 jobs of 4 with the highest accuracy; the tables have all."
    accuracy = next(figure for figure in made.report.figures() if figure.name == "accuracy_over_round")
    assert [trace["legendgroup"] for trace in accuracy.chart["data"]] == best
    tables = [block for section in made.report.sections for block in section.blocks if isinstance(block, Table)]
    assert {table.name: len(table.rows) for table in tables}.items() >= {"overview": 4, "each-run": 4, "compared-1": 4}.items()
    assert "run1.h5" not in made.opening
    assert "run2.h5" in made.opening
    (figure,) = sparsity.densities(made.runs, measures.groups(made.runs), most=1)
    assert isinstance(figure, Figure)
    assert figure.caption.endswith("Maps left out: 1, of other jobs.")


def heat(rows: int, columns: int) -> Heat:
    values = np.arange(rows * columns, dtype=float).reshape(rows, columns)
    names = tuple(map(str, range(rows))), tuple(map(str, range(columns)))
    return Heat("run", values, *names, "Client", "Round", "Images", "1", False, 1)


def test_a_large_heat_map_is_thinned_and_says_so() -> None:
    shown = sparsity.heat_map("map", "Title", "Text.", Call("partition"), heat(1000, 1001))
    trace = shown.chart["data"][0]
    assert trace["z"].shape == (400, 500)
    assert (trace["x"][0], trace["x"][-1], trace["y"][0], trace["y"][-1]) == (0, 1000, "0", "999")
    assert trace["z"][-1, -1] == 1001 * 1000 - 1
    assert shown.caption == "Text. The page shows 400 of 1000 rows and 500 of 1001 columns, evenly chosen."
    assert len(escaping.script_json(shown.chart)) < 2_000_000
    assert sparsity.heat_map("map", "Title", "Text.", Call("partition"), heat(3, 4)).caption == "Text."


def test_rows_of_one_name_stay_apart() -> None:
    twice = Heat("run", np.ones((2, 1)), ("a" * 40 + "1", "a" * 40 + "2"), ("0",), "Client", "Class", "Images", "1", False, 1)
    assert sparsity.heat_map("map", "Title", "Text.", Call("partition"), twice).chart["data"][0]["y"] == [
        "a" * 23 + "… (1)",
        "a" * 23 + "… (2)",
    ]


def test_a_figure_that_is_alone_in_its_line_gets_the_whole_of_it() -> None:
    figures = [Figure(name, name, "", {"data": []}, Call("accuracy")) for name in "abcde"]
    blocks = [*figures[:3], Note("text"), *figures[3:], Details("title", "text")]
    assert [block.wide for block in assembly._filled(blocks) if isinstance(block, Figure)] == [False, False, True, False, False]


def test_titles_of_axes_break_between_words_and_never_before_the_unit() -> None:
    title = charts.axis("Memory of the client that needs most, of each round (MB)")["title"]["text"]
    assert title == "Memory of the client that needs<br>most, of each round\u00a0(MB)"
