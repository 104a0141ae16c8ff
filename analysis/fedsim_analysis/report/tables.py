"""Tables of the comparison on a page: accuracy and paired differences, accuracy at equal cost, and the cost of a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsim_analysis import comparison
from fedsim_analysis.comparison.command import measured
from fedsim_analysis.comparison.printed import remarks, sheets
from fedsim_analysis.comparison.printed.cells import Cell, Column, Sheet
from fedsim_analysis.comparison.printed.naming import Naming
from fedsim_analysis.report.contents import Table


def compared(found: comparison.Comparison) -> Iterator[Table]:
    """Of several jobs; the remarks stand below the last table."""
    frames = {
        "metrics": measured(found, ["accuracy"]),
        "equal": comparison.at_equal(found),
        "target": comparison.to_target(found),
    }
    naming = Naming(found, frames.keys())
    made = sheets.of(naming, frames)
    for number, sheet in enumerate(made, start=1):
        yield _table(f"compared-{number}", sheet, remarks.of(naming, frames) if number == len(made) else ())


def _table(name: str, sheet: Sheet, below: Sequence[str]) -> Table:
    columns = [_heading(column) for column in sheet.columns]
    rows = list(zip(*([_text(cell) for cell in column.cells] for column in sheet.columns), strict=True))
    numeric = [title for title, column in zip(columns, sheet.columns, strict=True) if any(cell.number for cell in column.cells)]
    return Table(name, f"{sheet.title}.", columns, rows, numeric, [*sheet.notes, *below])


def _heading(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _text(cell: Cell) -> str:
    return f"{cell.text} ± {cell.half}" if cell.half else cell.text
