"""units and colours: numbers that are read at once, and methods that everybody tells apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from fedsim_analysis.measures import colours, readable, scale_of
from fedsim_analysis.plots.lines import MARKERS

from fedsim.config import method_registry

PRUNING = ("fedtiny", "fedmef", "dwfnp", "structured", "adp", "feddp", "fedavg")
AGGREGATIONS = ("fedprox", "fednova", "scaffold")
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]  # Machado et al., 2009
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]


@pytest.mark.parametrize(
    ("values", "units", "share", "expected"),
    [
        ([999, 5], "B", False, (1, "B")),
        ([1000.0], "B", False, (1e-3, "kB")),
        ([85_264_000], "B", False, (1e-6, "MB")),
        ([1e18], "FLOP", False, (1e-18, "EFLOP")),
        ([1e25], "FLOP", False, (1e-18, "EFLOP")),
        ([2e9], "FLOP/s", False, (1e-9, "GFLOP/s")),
        ([0.2], "1", True, (100, "%")),
        ([0.2], "nat", False, (1, "nat")),
        ([7], "1", False, (1, "")),
        ([100], "s", False, (1, "s")),
        ([600], "s", False, (1 / 60, "min")),
        ([7200], "s", False, (1 / 3600, "h")),
        ([np.nan, 0], "B", False, (1, "B")),
        ([], "B", False, (1, "B")),
    ],
)
def test_scales(values: list[float], units: str, share: bool, expected: tuple[float, str]) -> None:
    scale = scale_of(values, units, share)
    assert (scale.factor, scale.units) == pytest.approx(expected)
    assert scale.axis("Sent") == (f"Sent ({expected[1]})" if expected[1] else "Sent")


def test_readable() -> None:
    assert [readable(44_734_248, "B"), readable(0.9754, "1", True), readable(999_999, "B"), readable(np.nan, "s")] == [
        "44.7 MB",
        "97.5 %",
        "1 MB",
        "-",
    ]


def test_a_method_has_one_colour_whatever_else_is_shown() -> None:
    alone, among = colours.styles(["mine:Magnitude"]), colours.styles(["fedavg", "mine:Magnitude", "fedtiny"])
    assert alone[0] == among[1]
    assert colours.of_method("mine:Magnitude") == "#CC6677"  # in every process
    assert colours.of_method("fedtiny") == among[2].colour == "#0072B2"
    assert {colours.of_phase("compute"), colours.of_phase("own")} <= {*colours.PHASES.values(), *colours.OTHER_PHASES}


def test_groups_of_one_method_are_told_apart() -> None:
    assert len(set(colours.styles(["fedtiny"] * 12))) == 12
    assert {style.marker for style in colours.styles(["fedtiny"] * 4)} == {"circle"}
    assert len({style.dash for style in colours.styles(["fedtiny"] * 4)}) == 4


def linear(colour: str) -> np.ndarray:
    """Linear red, green and blue of sRGB."""
    held = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(held <= 0.04045, held / 12.92, ((held + 0.055) / 1.055) ** 2.4)


def lab(red_green_blue: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(red_green_blue, 1e-3, 1) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", [np.eye(3), np.array(DEUTERANOPIA), np.array(PROTANOPIA)], ids=["normal", "deuteranopia", "protanopia"])
def test_methods_are_told_apart_by_any_colour_vision(vision: np.ndarray) -> None:
    seen = {method: lab(vision @ linear(colours.of_method(method))) for method in PRUNING}
    apart = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in combinations(PRUNING, 2)}
    assert min(apart.values()) > 12, min(apart, key=lambda pair: apart[pair])
    assert len(set(colours.METHODS.values())) == len(colours.METHODS)
    assert len({colours.marker_of(method) for method in PRUNING}) == len(PRUNING)


@pytest.mark.parametrize("vision", [np.eye(3), np.array(DEUTERANOPIA), np.array(PROTANOPIA)], ids=["normal", "deuteranopia", "protanopia"])
def test_families_are_told_apart_by_any_colour_vision(vision: np.ndarray) -> None:
    """Methods of two families have colours that differ; aggregations other than FedAvg had theirs before, and are told by the marker."""
    seen = {method: lab(vision @ linear(colours.of_method(method))) for method in colours.METHODS if method not in AGGREGATIONS}
    pairs = [pair for pair in combinations(seen, 2) if colours.family_of(pair[0]) != colours.family_of(pair[1])]
    apart = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in pairs}
    assert min(apart.values()) > 12, min(apart, key=lambda pair: apart[pair])


def test_every_method_of_fedsim_has_a_colour_a_marker_and_a_family() -> None:
    assert {*method_registry.own_names(), colours.SMALL_DENSE} == set(colours.METHODS) | {"at_init"}  # which has another name in each job
    assert sorted(name for names in colours.FAMILIES.values() for name in names) == sorted(colours.METHODS)
    assert {marker for _, marker in colours.METHODS.values()} <= set(colours.MARKERS) == set(MARKERS)
    assert (colours.family_of("mine:Magnitude"), colours.marker_of("mine:Magnitude") in colours.FIRST) == ("", True)


def test_methods_of_one_family_differ_in_the_marker_and_neighbours_in_the_dash() -> None:
    for names in colours.FAMILIES.values():
        found = colours.styles(names)
        assert len({(style.colour, style.marker) for style in found}) == len(names)
    assert [style.dash for style in colours.styles(["random", "magnitude", "snip", "grasp"])] == list(colours.DASHES)
    assert colours.styles(["rigl"])[0] == colours.styles(["prunefl", "set", "rigl"])[2]  # the same whatever else is shown


def test_lines_are_seen_on_white_and_on_black() -> None:
    for colour, _ in colours.METHODS.values():
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 2
        assert (luminance + 0.05) / 0.05 > 2
