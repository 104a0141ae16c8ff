"""Colours that people with any kind of colour vision tell apart, the same for a method in every figure, page and process.

Methods of fedsim have a fixed colour and marker each. Methods of one family of FAMILIES share a colour, and differ in marker and dash;
those that had a colour before there were families keep it, after Okabe and Ito where they prune. The colour of another method follows
from its name alone, so it is the same whatever else a figure shows; two such methods may share a colour. Markers, dashes and shades
then tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

AT_INIT, MOVING, OWN = "#8C2D04", "#5B3FD6", "#5FBF6F"  # of families
SMALL_DENSE = "small dense"  # federated averaging of a network that is small from the start; no name of a method in a job
METHODS = {  # colour, marker
    "fedtiny": ("#0072B2", "circle"),
    "fedmef": ("#D55E00", "square"),
    "dwfnp": ("#009E73", "triangle-up"),
    "adp": ("#E69F00", "triangle-down"),
    "structured": ("#CC79A7", "pentagon"),
    "flpqsu": ("#CC79A7", "x"),
    "feddp": ("#56B4E9", "cross"),
    "fedavg": ("#5F5F5F", "diamond"),
    SMALL_DENSE: ("#5F5F5F", "cross"),
    "fedprox": ("#8C6D4F", "x"),
    "fednova": ("#999933", "hexagon"),
    "scaffold": ("#AA4499", "triangle-left"),
    "random": (AT_INIT, "circle"),
    "magnitude": (AT_INIT, "square"),
    "snip": (AT_INIT, "triangle-up"),
    "grasp": (AT_INIT, "diamond"),
    "synflow": (AT_INIT, "star"),
    "prunefl": (MOVING, "pentagon"),
    "feddst": (MOVING, "triangle-down"),
    "rigl": (MOVING, "hexagon"),
    "set": (MOVING, "diamond-tall"),
    "fedrts": (MOVING, "x"),
    "feddip": (MOVING, "triangle-left"),
    "gradual": (MOVING, "triangle-right"),
    "finetune": (OWN, "square"),
    "lotteryfl": (OWN, "star"),
    "heterofl": (OWN, "hexagon"),
}
FAMILIES = {  # what is said of them in a legend, and their methods
    "mask chosen at the start": ("random", "magnitude", "snip", "grasp", "synflow"),
    "mask moves in training": ("prunefl", "feddst", "rigl", "set", "fedrts", "feddip", "gradual", "feddp"),
    "channels cut once": ("structured", "flpqsu"),
    "whole systems": ("fedtiny", "fedmef", "dwfnp", "adp"),
    "networks of clients' own": ("finetune", "lotteryfl", "heterofl"),
    "dense": ("fedavg", SMALL_DENSE, "fedprox", "fednova", "scaffold"),
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
FIRST = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon", "cross", "triangle-left", "x", "hexagon")
MARKERS = (*FIRST, "star", "triangle-right", "diamond-tall")  # FIRST alone are given to methods by their names
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
    return METHODS[method][1] if method in METHODS else FIRST[_number(method) % len(FIRST)]


def dash_of(method: str) -> str:
    """The dash of a method, one of DASHES: methods that share a colour differ in it as far as there are dashes."""
    same = [name for name, (colour, _) in METHODS.items() if colour == of_method(method)]
    return DASHES[same.index(method) % len(DASHES)] if method in METHODS else DASHES[0]


def family_of(method: str) -> str:
    """The family of a method, of FAMILIES; "" for a method that is not of fedsim."""
    return next((family for family, methods in FAMILIES.items() if method in methods), "")


def of_phase(phase: str) -> str:
    """The colour of a phase of a round."""
    return PHASES.get(phase) or OTHER_PHASES[_number(phase) % len(OTHER_PHASES)]


def _number(name: str) -> int:
    """A number that follows from the name alone, in every process."""
    return sum(place * ord(sign) for place, sign in enumerate(name, 1))


def styles(methods: Sequence[str]) -> list[Style]:
    """The style of each group, from the methods of the groups in their order.

    A method has its colour, its marker and its dash. Groups of one method, and of methods that are not of fedsim and share a colour, get
    shades of it, from dark to light, and differ in the dash; from the fifth on also in the marker.
    """
    keys = [method if method in METHODS else of_method(method) for method in methods]
    counts, seen = Counter(keys), Counter[str]()
    found = []
    for method, key in zip(methods, keys, strict=True):
        k = seen[key]
        seen[key] += 1
        marker = MARKERS[(MARKERS.index(marker_of(method)) + k // len(DASHES)) % len(MARKERS)]
        dash = DASHES[(DASHES.index(dash_of(method)) + k) % len(DASHES)]
        found.append(Style(shade(of_method(method), k, counts[key]), dash, marker))
    return found


def shade(colour: str, k: int, count: int) -> str:
    """The `k`-th of `count` shades, from dark to light; a single one is the colour itself."""
    at = 0.0 if count < 2 else SHADES * (2 * k / (count - 1) - 1)
    other = 255 if at > 0 else 0
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (other - part) * abs(at)):02X}" for part in parts)
