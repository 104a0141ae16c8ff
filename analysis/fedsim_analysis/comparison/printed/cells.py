"""A table for people, before it takes a form: headings with units, texts, and numbers with half their interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
DIGITS = 3  # of the smallest number of a column
FINER = 2  # further digits at most, for an interval that is small beside its mean
PERCENT = 2  # decimals
NONE = "-"
ROW = "row"  # heading of the numbers of rows


@dataclass(frozen=True)
class Cell:
    """A text, or a number as text with half its interval."""

    text: str
    half: str = ""
    number: bool = False


@dataclass(frozen=True)
class Column:
    title: str
    cells: tuple[Cell, ...]
    unit: str = ""
    key: bool = False  # one of those that say which row it is


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()


def texts(title: str, values: Sequence[str], key: bool = False) -> Column:
    return Column(title, tuple(Cell(value) for value in values), key=key)


def counts(title: str, values: Iterable[int | str], key: bool = False) -> Column:
    return Column(title, tuple(Cell(str(value), number=True) for value in values), key=key)


def numbers(title: str, unit: str, means: Sequence[float], halves: Sequence[float] | None = None, signed: bool = False) -> Column:
    """A column in one unit, whose prefix and decimals fit all its numbers. NaN is "-"."""
    factor, shown = scale(unit, means)
    return scaled(title, shown, factor, means, halves, signed)


def scale(unit: str, values: Sequence[float]) -> tuple[float, str]:
    """What the numbers of a column are divided by, and the unit that they have then."""
    if unit == "%":
        return 0.01, "%"
    sizes = _sizes(values)
    if unit not in ("B", "FLOP", "B/s", "FLOP/s", "J") or not sizes:
        return 1.0, unit
    least, most = (min(max(floor(log10(size) / 3), 0), len(PREFIXES) - 1) for size in (min(sizes), max(sizes)))
    power = max(least, most - 1)
    return 1000.0**power, f"{PREFIXES[power]}{unit}"


def scaled(
    title: str, unit: str, factor: float, means: Sequence[float], halves: Sequence[float] | None = None, signed: bool = False
) -> Column:
    """A column of numbers that are divided by `factor`."""
    shown = [mean / factor for mean in means]
    wide = [half / factor for half in halves] if halves is not None else [np.nan] * len(shown)
    decimals = PERCENT if unit in ("%", "points") else _decimals(shown, wide)
    return Column(title, tuple(_cell(mean, half, decimals, signed) for mean, half in zip(shown, wide, strict=True)), unit)


def _decimals(means: Sequence[float], halves: Sequence[float]) -> int:
    if all(mean == int(mean) for mean in means if np.isfinite(mean)) and not any(half > 0 for half in halves):
        return 0
    of_means = max(0, DIGITS - 1 - _power(means))
    return min(max(of_means, -_power(halves)), of_means + FINER) if any(half > 0 for half in halves) else of_means


def _power(values: Sequence[float]) -> int:
    """The place of the first digit of the smallest number that is not 0: 0 for 5, -1 for 0.5."""
    sizes = _sizes(values)
    return floor(log10(min(sizes))) if sizes else DIGITS - 1


def _sizes(values: Sequence[float]) -> list[float]:
    """Of all numbers but 0, rounded, so that 999,999 is a million."""
    return [float(f"{abs(value):.{DIGITS}g}") for value in values if np.isfinite(value) and value]


def _cell(mean: float, half: float, decimals: int, signed: bool) -> Cell:
    if np.isnan(mean):
        return Cell(NONE, number=True)
    text = f"{mean:{'+' if signed else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return Cell(text, "" if np.isnan(half) else f"{half:.{decimals}f}" if half else "0", True)


def chance(value: float) -> str:
    """A p value."""
    return NONE if np.isnan(value) else "< 0.001" if value < 0.0005 else f"{value:.3f}"


def amount(value: float, unit: str) -> str:
    """A number alone, with its unit: "9.75 MB"."""
    column = numbers("", unit, [value])
    return f"{column.cells[0].text} {column.unit}".rstrip()
