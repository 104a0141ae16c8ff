"""Tables as text: aligned, wrapped, escaped, and units and digits that fit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fedsim_analysis.comparison import cells, forms
from fedsim_analysis.comparison.cells import Cell, Column, Sheet, counts, numbers, texts

NAN = float("nan")
NASTY = r"\a{b}_$x^2$ & 50% #1 ~<b>[u](v)`c`|*d* é 中 --- ''"
SHEET = Sheet(
    "Accuracy",
    (
        texts("method", ["fedavg", "fedtiny"], key=True),
        counts("seeds", [3, "2 of 3"]),
        numbers("sent", "B", [85_264_000, 9_718_587], [0, 107_407]),
        numbers("difference", "", [NAN, -0.125], [NAN, NAN], signed=True),
    ),
)


def shown(*args: object, **more: object) -> list[str]:
    column = numbers("x", *args, **more)  # type: ignore[arg-type]
    return [f"{cell.text} ± {cell.half}" if cell.half else cell.text for cell in column.cells] + [column.unit]


def test_numbers_have_digits_and_units_that_fit() -> None:
    assert shown("B", [85_264_000, 9_718_587], [0, 107_407]) == ["85.26 ± 0", "9.72 ± 0.11", "MB"]
    assert shown("B", [743_360.0], [1342.4]) == ["743 ± 1", "kB"]
    assert shown("B", [999_999.0]) == ["1.00", "MB"]
    assert shown("FLOP", [4e9, 2.5e6]) == ["4000.00", "2.50", "MFLOP"]
    assert shown("%", [0.98703704, 0.5], [0.01436, NAN]) == ["98.70 ± 1.44", "50.00", "%"]
    assert shown("", [0.0989, 1.0], [0.0012, 0]) == ["0.0989 ± 0.0012", "1.0000 ± 0", ""]
    assert shown("", [15.0, NAN, 20.0]) == ["15", "-", "20", ""]
    assert shown("", [NAN, np.inf]) == ["-", "inf", ""]
    assert shown("B", []) == ["B"]
    assert shown("s", [0.0, 0.0], [0.0, 0.0]) == ["0 ± 0", "0 ± 0", "s"]


def test_an_interval_is_not_rounded_away() -> None:
    assert shown("", [9.75], [0.004]) == ["9.750 ± 0.004", ""]


def test_amounts_and_chances() -> None:
    assert cells.amount(9_751_880, "B") == "9.75 MB"
    assert cells.amount(0.9377, "%") == "93.77 %"
    assert [cells.chance(p) for p in (0.25, 0.0004, 1.0, NAN)] == ["0.250", "< 0.001", "1.000", "-"]


def test_the_terminal_has_aligned_columns() -> None:
    assert forms.terminal([SHEET], ["a note"]).splitlines() == [
        "Accuracy",
        "method    seeds    sent (MB)  difference",
        "fedavg        3    85.26 ± 0           -",
        "fedtiny  2 of 3  9.72 ± 0.11      -0.125",
        "",
        "a note",
    ]


def test_what_is_too_wide_stands_below_with_its_keys() -> None:
    lines = forms.terminal([SHEET], ["a note of more than thirty signs"], width=30).splitlines()
    assert lines == [
        "Accuracy",
        "method    seeds    sent (MB)",
        "fedavg        3    85.26 ± 0",
        "fedtiny  2 of 3  9.72 ± 0.11",
        "",
        "method   difference",
        "fedavg            -",
        "fedtiny      -0.125",
        "",
        "a note of more than thirty",
        "signs",
    ]


def test_rows_are_numbered_where_the_keys_alone_are_wide() -> None:
    wide = Sheet("T", (texts("field", ["a" * 18, "b"], key=True), *(counts(f"count {i}", [i, 10 * i]) for i in range(3))))
    lines = forms.terminal([wide], [], width=30).splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[1].split() == ["row", "field"]
    assert [line.split()[0] for line in lines[2:4]] == ["1", "2"]
    assert lines[5].split()[0] == "row"


def test_wide_signs_take_two_places() -> None:
    lines = forms.terminal([Sheet("T", (texts("name", ["中文", "ab"]), counts("n", [1, 2])))], []).splitlines()
    assert lines[1:] == ["name  n", "中文  1", "ab    2"]


def test_markdown() -> None:
    text = forms.markdown([Sheet("A", (texts("method", [NASTY]), counts("n", ["- "])))], ["- a note", "1. another"])
    head, rule, row = text.split("\n\n")[1].splitlines()
    assert (head, rule) == ("| method | n |", "|---|---:|")
    assert row.replace(r"\|", "").count("|") == 3
    assert r"\<b\>\[u\](v)\`c\`\|\*d\*" in row
    assert r"\\a{b}\_\$x^2\$ \& 50% \#1 \~" in row
    assert text.endswith("\\- a note\n\n1\\. another")


def test_latex_is_escaped() -> None:
    text = forms.latex([Sheet(NASTY, (texts("m (%)", [NASTY, "ok"]), numbers("sent", "B", [1e6, 2e6], [1e4, NAN])))], ["50 % of\nit"])
    assert r"\textbackslash{}a\{b\}\_\$x\textasciicircum{}2\$ \& 50\% \#1 \textasciitilde{}\textless{}b\textgreater{}" in text
    assert r"\`{}c\`{}\textbar{}*d* é U+4E2D -{}-{}- ''" in text
    assert r"m (\%) & sent (MB) \\" in text
    assert r"& $1.00 \pm 0.01$ \\" in text
    assert r"ok & $2.00$ \\" in text
    assert [line for line in text.splitlines() if line.startswith("%")] == ["% needs \\usepackage{booktabs}", "% 50 % of it"]


def test_cells_of_text_are_no_formulas() -> None:
    column = Column("pairs", (Cell("-", number=True), Cell("< 0.001", number=True), Cell("baseline", number=True)))
    rows = [line for line in forms.latex([Sheet("T", (column,))], []).splitlines() if line.endswith(r"\\")]
    assert rows == [r"pairs \\", r"-- \\", r"\textless{} 0.001 \\", r"baseline \\"]


@pytest.mark.processes
def test_latex_compiles(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no pdflatex (Debian: texlive-latex-recommended)")
    nasty = Sheet(NASTY, (texts("x", [NASTY]), numbers("sent", "B", [1e6], [1e4])))
    tables = forms.latex([SHEET, nasty], ["a note"])
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\listoftables " + tables + "\\end{document}"
    (tmp_path / "t.tex").write_text(document)
    for _ in range(2):  # the list of tables is made of what the first time wrote
        ended = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout[-2000:]
