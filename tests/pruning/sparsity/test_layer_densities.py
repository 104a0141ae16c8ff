"""How layers share the kept weights: by hand, against published densities, and whatever the shapes."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.pruning.sparsity.layer_densities import shared_out

GOLDEN = {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (128, 64, 3, 3), "d": (512, 512, 3, 3), "e": (10, 512)}
DENSITIES = {"a": 1, "b": 0.64273, "c": 0.47485, "d": 0.07719, "e": 1}  # at a whole density of 0.1


def test_erk_by_hand() -> None:
    shapes = {"a": (10, 10, 3, 3), "b": (20, 10, 3, 3), "c": (10, 80)}
    found = shared_out(shapes, 300)
    eps = 300 / (26 + 36 + 90)
    wanted = {"a": int(eps * 26), "b": int(eps * 36), "c": int(eps * 90)}
    assert found == {"a": wanted["a"] + 1, "b": wanted["b"] + (300 - sum(wanted.values()) > 1), "c": wanted["c"]}
    assert shared_out({"a": (2, 2), "b": (10, 10)}, 60) == {"a": 4, "b": 56}  # a would get 2.5 · 4


def test_erk_has_the_published_densities() -> None:
    sizes = {layer: prod(shape) for layer, shape in GOLDEN.items()}
    found = shared_out(GOLDEN, int(0.1 * sum(sizes.values())))
    assert {layer: found[layer] / sizes[layer] for layer in sizes} == pytest.approx(DENSITIES, abs=5e-5)


def test_er_reads_outputs_and_inputs_alone_and_is_erk_on_linear_layers() -> None:
    linear = {"a": (30, 20), "b": (10, 30), "c": (5, 10)}
    assert shared_out(linear, 200, "er") == shared_out(linear, 200, "erk")
    found = shared_out({"a": (8, 8, 3, 3), "b": (8, 8)}, 80, "er")
    assert found == {"a": 72, "b": 8}  # both have 16 / 64 times eps, eps = 80 / (16 · 10): an eighth of the weights


def test_what_the_minimum_of_one_adds_is_taken_from_the_largest_layer() -> None:
    small, large = {"a": (10, 10), "b": (1, 2), "c": (1, 1)}, {"d": (20, 20)}
    assert shared_out(small | large, 10, "uniform") == {"a": 1, "b": 1, "c": 1, "d": 7}  # 1.99, 0.04, 0.02 and 7.95: 1, 1, 1, 7
    assert shared_out(small | large, 11, "uniform") == {"a": 2, "b": 1, "c": 1, "d": 7}  # 2.19, 0.04, 0.02 and 8.75: 2, 1, 1, 8
    assert shared_out({"a": (6, 6), "b": (1, 1), "d": (8, 8)}, 3, "uniform") == {"a": 1, "b": 1, "d": 1}


def test_uniform_is_one_density() -> None:
    assert shared_out({"a": (10, 10), "b": (20, 10, 3, 3)}, 190, "uniform") == {"a": 10, "b": 180}


@pytest.mark.parametrize("how", ["erk", "er", "uniform"])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6), st.floats(0, 1))
def test_the_budget_is_met(how, shapes, share) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    sizes = {name: a * b for name, (a, b) in named.items()}
    budget = max(len(sizes), int(share * sum(sizes.values())))
    found = shared_out(named, budget, how)
    assert sum(found.values()) == budget
    assert all(1 <= found[name] <= size for name, size in sizes.items())
