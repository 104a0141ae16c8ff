"""The exact sum: order and grouping cannot matter, and what cannot be summed is refused by name."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core import exact_sum
from fedsim.core.exact_sum import HEADROOM, Sum, unit_of

VALUES = st.lists(st.floats(-1e3, 1e3, allow_nan=False, width=64), min_size=2, max_size=12)


def summed(values: list[float], groups: list[list[int]], shared: dict[str, torch.Tensor]) -> torch.Tensor:
    total = Sum(shared, len(values))
    for group in groups:
        part = Sum(shared, len(values))
        rows = torch.tensor([[values[i]] for i in group], dtype=torch.float64)
        part.add({"w/a": rows, "grad/b": rows}, group, [1] * len(group))
        total.merge(part)
    return torch.cat([total.value()["w/a"], total.value()["grad/b"]])


@given(VALUES, st.randoms(use_true_random=False), st.integers(1, 5))
@settings(deadline=None)
def test_order_and_grouping_change_no_bit(values, random, parts) -> None:
    shared = {"w/a": torch.ones(1)}
    order = list(range(len(values)))
    straight = summed(values, [order], shared)
    random.shuffle(order)
    grouped = summed(values, [order[i::parts] for i in range(parts) if order[i::parts]], shared)
    assert torch.equal(straight, grouped)


@given(VALUES)
@settings(deadline=None)
def test_the_sum_is_the_sum_of_the_rounded_values(values) -> None:
    shared = {"w/a": torch.ones(1)}
    one, two = summed(values, [list(range(len(values)))], shared).tolist()
    true = sum(map(Fraction, values))
    unit, last = 1 / Fraction(unit_of(shared["w/a"], len(values)).scale), abs(true) * Fraction(1, 2**52)
    assert abs(Fraction(one) - true) <= len(values) * unit / 2 + last
    assert abs(Fraction(two) - true) <= (len(values) + 2) * Fraction(1, 2**69) + last


@pytest.mark.parametrize(("largest", "n"), [(0.3, 1), (1.0, 10), (7.5, 360), (3.0, 1437), (100.0, 2**20)])
def test_the_unit_is_the_one_of_the_promise(largest, n) -> None:
    unit = unit_of(torch.tensor([-largest, 0.1]), n)
    assert unit.scale == 2.0 ** (62 - ceil(log2(n * max(torch.tensor(largest).item(), 1.0) * HEADROOM)))


def test_a_power_of_two_needs_no_bit_more() -> None:
    assert unit_of(torch.ones(1), 4).scale == 2.0 ** (62 - 22)


def test_the_largest_allowed_sum_does_not_overflow() -> None:
    n = [3, 5, 8]
    total = Sum({"w/a": torch.ones(1)}, sum(n))
    total.add({"w/a": torch.tensor([[HEADROOM * k] for k in n], dtype=torch.float64)}, [0, 1, 2], n)
    assert total.value()["w/a"].item() == HEADROOM * 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e300, HEADROOM * 2 + 1])
def test_a_value_that_cannot_be_summed_names_client_and_key(bad) -> None:
    total = Sum({"w/a": torch.ones(3)}, 9)
    rows = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'w/a' of client 231 holds"):
        total.add({"w/a": rows}, [7, 231], [2, 2])


@pytest.mark.parametrize("bad", [float("nan"), 2.0**28])
def test_two_limbs_have_a_range_too(bad) -> None:
    with pytest.raises(ValueError, match=r"'loss/a' of client 4"):
        Sum({}, 1).add({"loss/a": torch.tensor([[bad]], dtype=torch.float64)}, [4], [1])


def test_a_total_is_float64() -> None:
    with pytest.raises(ValueError, match="float64"):
        Sum({}, 1).add({"n/images": torch.ones(1, 1)}, [0], [1])


def test_a_key_keeps_its_shape() -> None:
    total = Sum({}, 2)
    total.add({"grad/a": torch.zeros(1, 2, dtype=torch.float64)}, [0], [1])
    with pytest.raises(ValueError, match="grad/a"):
        total.add({"grad/a": torch.zeros(1, 3, dtype=torch.float64)}, [1], [1])


def test_flat_and_take_are_inverse() -> None:
    shared = {"w/a": torch.ones(2, 3)}
    total = Sum(shared, 5)
    total.add({"w/a": torch.randn(1, 2, 3).double(), "n/images": torch.tensor([5.0]).double()}, [0], [5])
    other = Sum(shared, 5)
    other.take(total.layout(), total.flat(), 1)
    assert all(torch.equal(other.value()[key], value) for key, value in total.value().items())


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_accelerators_arithmetic_is_the_processors(values) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    scale, mine, theirs = 2.0**30, torch.zeros(len(values), dtype=torch.int64), torch.zeros(len(values), dtype=torch.int64)
    assert exact_sum._add(mine.numpy(), numbers.numpy(), scale, 1e6) == exact_sum._add_torch(theirs, numbers, scale, 1e6)
    assert torch.equal(mine, theirs)
    mine, theirs = torch.zeros(2, len(values), dtype=torch.int64), torch.zeros(2, len(values), dtype=torch.int64)
    exact_sum._add_limbs(mine.numpy(), numbers.numpy(), exact_sum.COARSE, exact_sum.FINE, exact_sum.LARGEST)
    exact_sum._add_limbs_torch(theirs, numbers, exact_sum.COARSE, exact_sum.FINE, exact_sum.LARGEST)
    assert torch.equal(mine, theirs)


def test_merged_parts_of_too_large_a_cohort_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(exact_sum, "MAX_COHORT", 3)
    total, part = Sum({}, 2), Sum({}, 2)
    part.add({"n/images": torch.ones(2, 1).double()}, [0, 1], [1, 1])
    total.merge(part)
    with pytest.raises(ValueError, match="4 clients is too large to sum exactly; at most 3"):
        total.merge(part)


@pytest.mark.parametrize("first", [0, 1])
def test_a_client_that_reports_nothing_is_not_summed_with_others(first) -> None:
    rows: list[dict[str, torch.Tensor]] = [{}, {"n/images": torch.ones(1, 1).double()}]
    total = Sum({}, 2)
    total.add(rows[first], [0], [1])
    with pytest.raises(ValueError, match=r"client 1 and the clients before it do not both report total 'n/images'"):
        total.add(rows[1 - first], [1], [1])
    parts = Sum({}, 2), Sum({}, 2)
    for k, part in enumerate(parts):
        part.add(rows[k], [k], [1])
    with pytest.raises(ValueError, match=r"some clients report total 'n/images' and others do not"):
        parts[first].merge(parts[1 - first])
