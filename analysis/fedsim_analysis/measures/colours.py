"""Colours that people with any kind of colour vision tell apart, the same for a method in every figure, page and process.

Methods of fedsim have a fixed colour each: those that prune have the colours of Okabe and Ito, dense averaging has grey, brown, olive and
wine. The colour of another method follows from its name alone, so it is the same whatever else a figure shows; two such
methods may share a colour. Markers, dashes and shades then tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

METHODS = {  # colour, marker
    "fedtiny": ("#0072B2", "circle"),
    "fedmef": ("#D55E00", "square"),
    "dwfnp": ("#009E73", "triangle-up"),
    "structured": ("#CC79A7", "pentagon"),
    "adp": ("#E69F00", "triangle-down"),
    "feddp": ("#56B4E9", "cross"),
    "fedavg": ("#5F5F5F", "diamond"),
    "fedprox": ("#8C6D4F", "x"),
    "fednova": ("#999933", "hexagon"),
    "scaffold": ("#AA4499", "triangle-left"),
}
OTHERS = ("#6A5ACD", "#44AA99", "#CC6677", "#B8860B", "#5F7F9F")
PHASES = {
    "compute": "#77AADD",
    "server": "#EE8866",
    "evaluate": "#44BB99",
    "broadcast": "#EEDD88",
    "reduce": "#FFAABB",
    "record": "#BBBBBB",
}
OTHER_PHASES = ("#99DDFF", "#BBCC33", "#AAAA00")
HEAT = "viridis"  # the colour map of shares and overlaps, known by this name to matplotlib and plotly
COUNTS = "Blues"  # of counts, 0 being white
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon", "cross", "triangle-left", "x", "hexagon")
SHADES = 0.45  # the share of white or black in the lightest and the darkest shade


@dataclass(frozen=True)
class Style:
    """How a group is drawn. `dash` is one of DASHES, `marker` one of MARKERS."""

    colour: str  # "#RRGGBB"
    dash: str
    marker: str


def of_method(method: str) -> str:
    """The colour of a method, "#RRGGBB"; also of "", where the method is not known."""
    return METHODS[method][0] if method in METHODS else OTHERS[_number(method) % len(OTHERS)]


def marker_of(method: str) -> str:
    """The marker of a method, one of MARKERS: what tells methods apart in grey, or by another colour vision."""
    return METHODS[method][1] if method in METHODS else MARKERS[_number(method) % len(MARKERS)]


def of_phase(phase: str) -> str:
    """The colour of a phase of a round."""
    return PHASES.get(phase) or OTHER_PHASES[_number(phase) % len(OTHER_PHASES)]


def _number(name: str) -> int:
    """A number that follows from the name alone, in every process."""
    return sum(place * ord(sign) for place, sign in enumerate(name, 1))


def styles(methods: Sequence[str]) -> list[Style]:
    """The style of each group, from the methods of the groups in their order.

    A method has its colour and its marker. Groups of one colour get shades of it, from dark to light, and differ in the dash;
    from the fifth on also in the marker.
    """
    counts, seen = Counter(map(of_method, methods)), Counter[str]()
    found = []
    for method in methods:
        colour = of_method(method)
        k = seen[colour]
        seen[colour] += 1
        marker = MARKERS[(MARKERS.index(marker_of(method)) + k // len(DASHES)) % len(MARKERS)]
        found.append(Style(shade(colour, k, counts[colour]), DASHES[k % len(DASHES)], marker))
    return found


def shade(colour: str, k: int, count: int) -> str:
    """The `k`-th of `count` shades, from dark to light; a single one is the colour itself."""
    at = 0.0 if count < 2 else SHADES * (2 * k / (count - 1) - 1)
    other = 255 if at > 0 else 0
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (other - part) * abs(at)):02X}" for part in parts)
