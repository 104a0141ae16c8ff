"""Curves in a terminal: plots by plotext, and lines of small bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from fedsim_analysis.watch.signs import ascii_only

Array = NDArray[np.float64]

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
COLOURS = ("cyan", "yellow")
LARGEST = 1e300  # beyond which the arithmetic of an axis overflows


@dataclass(frozen=True)
class Curve:
    """Points of rounds 0 …; rounds that were not measured are not-a-number."""

    name: str
    values: Array


def plot(curves: Sequence[Curve], width: int, height: int, plain: bool) -> list[Text]:
    """`height` lines of `width` signs: an axis, and two curves at most; the first is a line, the second has dots.

    plain: whether signs beyond ASCII cannot be shown.
    """
    plotext: Any = import_module("plotext")  # takes a tenth of a second
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    figure.theme("colorless")
    points = [_points(curve.values, 2 * width) for curve in curves]
    for (x, y), colour, marker in reversed([*zip(points, COLOURS, ("*", ".") if plain else ("braille", "•"), strict=False)]):
        if len(x):
            signal = figure.signal(x.tolist(), y.tolist(), marker=plotext.marker(marker, pixel=colour))
            figure.draw(signal.lines() if colour == COLOURS[0] else signal)
    _axes(figure, points, width, height)
    drawn = figure.build().string().rstrip("\n").split("\n")
    return [Text.from_ansi(ascii_only(line) if plain else line) for line in drawn]


def _axes(figure: Any, points: Sequence[tuple[Array, Array]], width: int, height: int) -> None:
    """Whole rounds below; three values at most on the left, and a range of them that is not empty."""
    last = int(max([x[-1] for x, _ in points if len(x)], default=1)) or 1
    figure.ruler("x").lim(0, last)
    marks = np.unique(np.linspace(0, last, max(min(width // 12, 5), 2)).round())
    figure.ruler("x").ticks(marks.tolist(), [f"{mark:.0f}" for mark in marks])
    values = np.concatenate([np.zeros(0), *(y for _, y in points)])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    room = 0.0 if high > low else abs(low) / 10 or 1.0
    figure.ruler("y").lim(low - room, high + room)
    marks = np.linspace(low - room, high + room, 3 if height > 5 else 2)
    figure.ruler("y").ticks(marks.tolist(), [f"{mark:.3g}" for mark in marks])


def _points(values: Array, most: int) -> tuple[Array, Array]:
    """(rounds, values) that were measured; of many, the means of as many stretches as can be seen."""
    x = np.flatnonzero(np.isfinite(values) & (np.abs(values) < LARGEST)).astype(np.float64)
    y = values[x.astype(int)]
    if len(x) <= most:
        return x, y
    return _means(x, most), _means(y, most)


def _means(values: Array, parts: int) -> Array:
    edges = np.linspace(0, len(values), parts + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def bars(values: Array, width: int, plain: bool) -> str:
    """A line of bars from the lowest value to the highest, each the mean of as many that were measured."""
    signs, (_, found) = PLAIN_BARS if plain else BARS, _points(values, max(width, 1))
    if not len(found):
        return ""
    low, room = found.min(), np.ptp(found)
    level = (found - low) / room * (len(signs) - 1) if room else np.zeros(len(found))
    return "".join(signs[round(at)] for at in level)


def bar(part: float, width: int, plain: bool) -> Text:
    """A line of which a part, between 0 and 1, is full."""
    full = round(min(max(part, 0.0), 1.0) * width)
    return Text(("#" if plain else "━") * full, "cyan") + Text(("." if plain else "─") * (width - full), "dim")
