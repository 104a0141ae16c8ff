"""The rounds as a CSV file: a line for each round, a column for each column of the run file. What was not measured is empty."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from fedsim.simulation.mirrors.rows import Described, Row, rows


class CSVTable:
    """The file is written anew where rows are cut, and where a column is added; else lines are appended."""

    def __init__(self, target: Path, run: Described, done: int, source: Path) -> None:
        self.target, self.source, self.last = target, source, done
        self._columns = list(run.columns)
        self._file = self._anew()

    def write(self, r: int, row: Row) -> None:
        if added := [name for name in row if name not in self._columns]:
            self._columns += added
            self._file.close()
            self._file = self._anew()
        _write(self._file, self._columns, [(r, row)])
        self.last = r

    def flush(self) -> None:
        self._file.flush()

    def close(self, run: Described) -> None:
        self._file.close()

    def _anew(self) -> TextIO:
        """All rows up to the last, in a file that takes the place of the one before; open for more."""
        aside = self.target.with_name(self.target.name + ".new")
        with aside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(["round", *self._columns])
            _write(file, self._columns, rows(self.source, 0, self.last) if self.last >= 0 else [])
        aside.replace(self.target)
        return self.target.open("a", newline="", encoding="utf-8")


def _write(file: TextIO, columns: Sequence[str], lines: Iterable[tuple[int, Row]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([r, *(_text(row[name]) if name in row else "" for name in columns)] for r, row in lines)


def _text(value: float) -> str:
    """The shortest text of the same number."""
    return repr(value).removesuffix(".0")
