"""What rows are called: by the fields that tell them apart, or, where these are many, by their number in the overview."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim_analysis.comparison import jobs
from fedsim_analysis.comparison.grouping import PLANNED, Comparison
from fedsim_analysis.comparison.metrics import METRICS
from fedsim_analysis.comparison.printed.cells import ROW, Column, counts, texts

Row = Mapping[Hashable, Any]
MOST = 4  # fields that every table shows
TAKEN = (*METRICS, "sent", "memory", "time", "seeds", "round", "rounds")


@dataclass(frozen=True)
class Naming:
    comparison: Comparison
    tables: Collection[str]  # that are shown

    @property
    def numbered(self) -> bool:
        return "overview" in self.tables and len(self.comparison.shown) > MOST

    def keys(self, rows: Sequence[Row]) -> list[Column]:
        """The columns that say which row it is: the fields that tell these rows apart, the method always; or number and method."""
        if not self.numbered:
            return self.fields(rows)
        numbers = counts(ROW, [self._number(row["group"]) for row in rows], key=True)
        method = [texts("method", [jobs.plain(row[jobs.METHOD]) for row in rows], key=True)] if jobs.METHOD in rows[0] else []
        return [numbers, *method]

    def fields(self, rows: Sequence[Row]) -> list[Column]:
        names = [PLANNED.get(name, name) for name in self.comparison.shown]
        there = [name for name in names if name in rows[0]]
        telling = [name for name in there if name == jobs.METHOD or len({repr(row[name]) for row in rows}) > 1] or there[:1]
        titles = jobs.titles(telling, TAKEN)
        return [texts(title, [jobs.plain(row[name]) for row in rows], key=True) for name, title in titles.items()]

    def of(self, label: object) -> str:
        """A group, by its label."""
        return f"{ROW} {self._number(label)}" if self.numbered else str(label)

    def _number(self, label: object) -> int:
        return [group.label for group in self.comparison.groups].index(str(label)) + 1
