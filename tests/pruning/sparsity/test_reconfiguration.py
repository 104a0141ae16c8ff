"""The masks of the largest rate: brute force over all subsets, hand cases, what must not change them, and the time model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import models
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.pruning.sparsity.reconfiguration import chosen, must_keep, seconds_per_weight


def case(seed: int, size: int = 10, kept: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(size, generator=generator, dtype=torch.float64) ** 3
    seconds = 0.05 + torch.rand(size, generator=generator, dtype=torch.float64)
    must = torch.rand(size, generator=generator) < kept
    constant, rest = (0.1 + torch.rand(2, generator=generator, dtype=torch.float64) * 2).tolist()
    return z, seconds, must, constant, rest


def rate_of(mask, z, seconds, constant, rest) -> float:  # type: ignore[no-untyped-def]
    top, below = rest, constant
    for i, kept in enumerate(mask):
        if kept:
            top, below = top + float(z[i]), below + float(seconds[i])
    return top / below


@pytest.mark.parametrize("seed", range(40))
def test_no_subset_has_a_larger_rate(seed) -> None:
    z, seconds, must, constant, rest = case(seed)
    mask, rate = chosen(z, seconds, must, constant, rest)
    assert bool(mask[must].all())
    assert rate == pytest.approx(rate_of(mask, z, seconds, constant, rest), rel=1e-12)
    free = (~must).nonzero().flatten().tolist()
    best = 0.0
    for bits in product((False, True), repeat=len(free)):
        other = must.clone()
        other[free] = torch.tensor(bits)
        best = max(best, rate_of(other, z, seconds, constant, rest))
    assert rate == pytest.approx(best, rel=1e-12)


def test_the_hand_case_of_the_specification() -> None:
    mask, rate = chosen(torch.tensor([4.0, 9, 1, 2]), torch.tensor([1.0, 1, 1, 2]), torch.tensor([True, False, False, False]), 2)
    assert mask.tolist() == [True, True, False, False]
    assert rate == 3.25


def test_it_ranks_by_the_ratio_and_not_by_importance_alone() -> None:
    mask, rate = chosen(torch.tensor([6.0, 5.0]), torch.tensor([6.0, 1.0]), torch.tensor([False, False]), 1)
    assert mask.tolist() == [False, True]  # the other alone has the rate 6 / 7, both 11 / 8
    assert rate == 2.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2.0**-20, 0.5, 8.0, 2.0**30]))
def test_scales_of_importance_and_of_time_change_nothing(seed, scale) -> None:
    z, seconds, must, constant, rest = case(seed, 60)
    mask = chosen(z, seconds, must, constant, rest)[0]
    assert torch.equal(mask, chosen(z * scale, seconds, must, constant, rest * scale)[0])
    assert torch.equal(mask, chosen(z, seconds * scale, must, constant * scale, rest)[0])


def test_a_long_constant_keeps_every_candidate_of_any_importance() -> None:
    z, seconds, must, _, _ = case(5, 50)
    z[3], must[3], z[4], must[4] = 0.0, False, 0.0, True
    mask, _ = chosen(z, seconds, must, 1e12)
    assert torch.equal(mask, (z > 0) | must)


def test_all_candidates_may_be_wanted_and_there_may_be_none() -> None:
    z, seconds = torch.ones(5), torch.ones(5)
    assert chosen(z, seconds, torch.zeros(5, dtype=torch.bool), 1.0)[0].all()
    assert chosen(z, seconds, torch.ones(5, dtype=torch.bool), 1.0) == (pytest.approx(torch.ones(5, dtype=torch.bool)), 5 / 6)


def test_equal_times_are_a_threshold_on_importance_and_ties_go_to_the_lowest_position() -> None:
    z, _, must, constant, _ = case(8, 80, 0.1)
    mask, _ = chosen(z, torch.full((80,), 0.2), must, constant)
    assert 0 < int(mask.sum()) < 80
    assert float(z[mask & ~must].min()) > float(z[~mask].max())
    assert chosen(torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.bool), 1.0, most=2)[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("most", range(12))
def test_a_cap_is_never_exceeded_but_by_what_must_stay(most) -> None:
    z, seconds, must, _, rest = case(4, 12)
    rest = rest / 100  # all candidates would enter
    mask, rate = chosen(z, seconds, must, 1e3, rest, most)
    assert 0 < int(must.sum()) < 11
    assert int(mask.sum()) == max(most, int(must.sum()))
    assert bool(mask[must].all())
    assert rate == pytest.approx(rate_of(mask, z, seconds, 1e3, rest))


def test_a_score_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="a score is nan"):
        chosen(torch.tensor([float("nan"), 1.0]), torch.ones(2), torch.zeros(2, dtype=torch.bool), 1.0)


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.49, 1), (0.5, 2), (1.0, 4)])
def test_what_must_stay_is_all_but_the_smallest_of_each_layer(share, gone) -> None:
    w = torch.tensor([[0.0, 4.0, 0.0], [-1.0, 2.0, -3.0]])
    found = must_keep({"w/a.weight": w, "mask/a.weight": w != 0}, ["a"], share)["a"]
    assert sorted(w[found].abs().tolist()) == [1.0, 2.0, 3.0, 4.0][gone:]


def test_seconds_by_hand() -> None:
    profile = profiler.profile(models.build(ModelSettings(name="cnn", width=4), (1, 8, 8), 10, 0), (1, 8, 8))
    places = {layer.name: layer.positions for layer in profile.layers}
    conv, linear = next(name for name, many in places.items() if many > 1), list(places)[-1]
    found = seconds_per_weight(profile, [conv, linear], 100, 3e9, 1e6)
    assert found == pytest.approx([100 * 6 * places[conv] / 3e9 + 8e-6, 100 * 6 / 3e9 + 8e-6])
    assert places[linear] == 1
