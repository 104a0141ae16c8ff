"""Gates by arithmetic: Gumbel draws, hard values with soft gradients, masks never empty, base and choice merged."""

from __future__ import annotations

from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core import rng
from fedsim.pruning import gates

GROUPS = (2, 3, 1)
N = 6


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- draws


@pytest.mark.parametrize("level", [-2, -1, 0, 1])
def test_a_channel_is_kept_as_often_as_the_formula_says(level) -> None:
    """P = 1 - exp(-exp(o + b)), within four standard deviations of 1e5 draws."""
    n, bias = 100_000, 3.0
    o = torch.full((n,), level - bias)
    y = gates.soft(o, gates.gumbel(rng.key(0, "gates", level), n), 0.4, bias)
    p = 1 - exp(-exp(level))
    assert abs(float((y >= 0.5).double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_the_noise_is_gumbels() -> None:
    """Mean: Euler's constant; variance pi^2 / 6; both within four standard errors. Finite for every draw."""
    g = gates.gumbel(rng.key(1), 100_000).double()
    assert g.isfinite().all()
    assert abs(float(g.mean()) - 0.57722) < 4 * (1.6449 / 1e5) ** 0.5
    assert abs(float(g.var()) - 1.6449) < 4 * (4.4 * 1.6449**2 / 1e5) ** 0.5
    assert torch.equal(gates.gumbel(rng.key(1, torch.arange(3)), 5)[2], gates.gumbel(rng.key(1, 2), 5))


def test_soft_values_by_hand() -> None:
    y = gates.soft(torch.tensor([0.2]), torch.tensor([-1.0]), 0.4, 3.0)
    assert float(y) == pytest.approx(1 / (1 + exp(-(0.2 - 1.0 + 3.0) / 0.4)), abs=1e-6)


def test_at_the_start_everything_is_kept() -> None:
    y = gates.soft(torch.zeros(100_000), gates.gumbel(rng.key(2), 100_000), 0.4, 3.0)
    assert (y >= 0.5).all()


def test_the_mean_noise_mask_keeps_what_is_kept_with_probability_043() -> None:
    p = torch.tensor([0.42962, 0.42964, 0.1, 0.9], dtype=torch.float64)
    o = torch.log(-torch.log1p(-p)) - 3.0
    assert gates.mean(o, 3.0, (4,)).tolist() == [False, True, False, True]


# ---- straight-through, never empty


def test_hard_values_have_the_gradient_of_the_soft_ones() -> None:
    y = torch.sigmoid(numbers(0, 4, N)).requires_grad_()
    slope = numbers(1, 4, N)
    hard = gates.straight(y, GROUPS)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    (hard * slope).sum().backward()
    assert torch.equal(y.grad, slope)


def brute(hard: list[bool], score: list[float], within: list[bool]) -> list[bool]:
    """Group by group, channel by channel."""
    found = [h and w for h, w in zip(hard, within, strict=True)]
    at = 0
    for size in GROUPS:
        mine = range(at, at + size)
        if not any(found[c] for c in mine):
            found[max((c for c in mine if within[c]), key=lambda c: score[c])] = True
        at += size
    return found


FLAGS = st.lists(st.booleans(), min_size=N, max_size=N)
SCORES = st.lists(st.floats(0, 0.49), min_size=N, max_size=N, unique=True)


@given(FLAGS, SCORES, FLAGS)
def test_no_group_is_ever_empty_and_all_stays_within(hard, score, within) -> None:
    within = [w or c in (1, 4, 5) for c, w in enumerate(within)]  # every group of a base keeps something
    expected = brute(hard, score, within)
    values = torch.tensor(score, dtype=torch.float64)
    assert gates.never_empty(torch.tensor(hard), values, GROUPS, torch.tensor(within)).tolist() == expected
    y = torch.where(torch.tensor(hard), 0.5 + values, values)
    assert gates.straight(y, GROUPS, torch.tensor(within)).tolist() == [float(kept) for kept in brute(hard, y.tolist(), within)]
    free = [True] * N
    assert gates.never_empty(torch.tensor(hard), values, GROUPS).tolist() == brute(hard, score, free)


def test_rows_are_guarded_one_by_one() -> None:
    hard, score = numbers(2, 5, N) > 1.0, numbers(3, 5, N)
    found = gates.never_empty(hard, score, GROUPS)
    assert found.tolist() == [brute(h, s, [True] * N) for h, s in zip(hard.tolist(), score.tolist(), strict=True)]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_bias_that_closes_everything_leaves_one_channel_a_group(sampled) -> None:
    """b = -10: in the base, and in every client's gate inside of it."""
    o, u = numbers(4, 3, N), numbers(5, 3, N)

    def hard(logits: Tensor, key: int, within: Tensor | None = None) -> Tensor:
        if not sampled:
            return gates.mean(logits, -10.0, GROUPS, within)
        y = gates.soft(logits, gates.gumbel(rng.key(key, torch.arange(3)), N), 0.4, -10.0)
        return gates.straight(y, GROUPS, within) >= 0.5

    v = hard(o, 0)
    m = hard(u, 1, v)
    for gate in (v, m):
        assert [part.sum(1).tolist() for part in gate.split(GROUPS, 1)] == [[1] * 3] * 3
    assert torch.equal(m & v, m)
    if not sampled:
        assert [part.int().argmax(1).tolist() for part in v.split(GROUPS, 1)] == [p.argmax(1).tolist() for p in o.split(GROUPS, 1)]


def test_a_gate_that_was_rescued_keeps_the_soft_gradient() -> None:
    y = torch.tensor([0.1, 0.3], requires_grad=True)
    hard = gates.straight(y, (2,))
    assert hard.tolist() == [0.0, 1.0]
    hard.sum().backward()
    assert y.grad.tolist() == [1.0, 1.0]


# ---- base and choice


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_dropped_channel_tells_the_base_and_not_the_choice(kind) -> None:
    v, u = (torch.sigmoid(numbers(seed, 3, N)).requires_grad_() for seed in (6, 7))
    base, choice = (v, u) if kind == "soft" else (gates.straight(v, GROUPS), gates.straight(u, GROUPS))
    merged = gates.merge(base, choice)
    gate, slope = base * merged, numbers(8, 3, N)
    dv, du = torch.autograd.grad((gate * slope).sum(), (v, u))
    kept = v.detach() >= 0.5 if kind == "soft" else base.detach() == 1
    assert torch.equal(merged.detach(), torch.where(kept, choice.detach(), torch.ones(())))
    assert torch.allclose(dv, slope * merged.detach())
    assert torch.allclose(du, slope * base.detach() * kept)
    assert (~kept).any()
    assert not du[~kept].any()
    if kind == "hard":
        assert bool((gate <= base).all())
        assert torch.equal(gate, base * choice)


def test_a_choice_that_would_leave_a_group_empty_is_rescued_inside_the_base() -> None:
    v = torch.tensor([True, False, False])
    y = torch.tensor([0.2, 0.9, 0.4])
    u = gates.straight(y, (3,), v)
    assert (v * gates.merge(v.float(), u)).tolist() == [1.0, 0.0, 0.0]


@given(st.lists(FLAGS.filter(any), min_size=1, max_size=4))
def test_overlap_is_the_share_of_common_channels(rows) -> None:
    found = gates.overlap(torch.tensor(rows))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            both, either = sum(map(min, zip(a, b, strict=True))), sum(map(max, zip(a, b, strict=True)))
            assert float(found[i, j]) == pytest.approx(both / either)
