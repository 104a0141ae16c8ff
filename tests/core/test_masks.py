"""Masks: exact counts, ties to the lower position, the budget of a density, and the stream that keeps the largest of a gradient."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_tensors import Alive
from torch import Tensor
from torch.func import vmap

from fedsim.core import keys, masks

RESNET18 = {"conv1": 1_728, "others": 11_164_352 - 1_728}  # first layer, all the other conv and linear weights
FEW_VALUES = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])  # so that ties are the rule


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A gradient, a mask, and how many of its pruned positions are wanted."""
    values = draw(st.lists(st.one_of(FEW_VALUES, st.floats(-10, 10, width=32)), min_size=1, max_size=40))
    kept = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return torch.tensor(values), torch.tensor(kept), draw(st.integers(0, kept.count(False)))


def full_sort(g: Tensor, mask: Tensor, k: int) -> list[int]:
    """The k pruned positions of largest |g|, of equal ones the lower first."""
    pruned = [i for i in range(g.numel()) if not bool(mask.flatten()[i])]
    return sorted(pruned, key=lambda i: (-abs(float(g.flatten()[i])), i))[:k]


# ---- a number of its own for each client


@given(st.lists(gradients().filter(lambda case: bool(case[1].any())), min_size=1, max_size=3), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_largest_kept_weights_are_those_of_a_full_sort(cases, source) -> None:
    n = min(len(g) for g, _, _ in cases)
    w = torch.stack([g[:n] for g, _, _ in cases])
    kept = torch.stack([mask[:n] for _, mask, _ in cases])
    kept[:, 0] |= ~kept.any(1)
    k = torch.tensor([source.randint(1, int(mask.sum())) for mask in kept])
    found = vmap(masks.largest_kept)(w, kept, k)
    for row, mask, count, one in zip(w, kept, k.tolist(), found, strict=True):
        assert one.nonzero().flatten().tolist() == sorted(full_sort(row, ~mask, count))


# ---- the buffer


@given(gradients(), st.integers(1, 45))
@settings(deadline=None, max_examples=200)
def test_check_9_the_buffer_is_a_full_sort_for_any_chunk_ties_included(case, chunk) -> None:
    g, mask, k = case
    index, value = masks.largest(g, mask, k, chunk)
    expected = full_sort(g, mask, k)
    assert index.tolist() == expected
    assert value.tolist() == [float(g[i]) for i in expected]  # signed
    assert (index.dtype, value.dtype) == (torch.int32, torch.float32)


def test_check_9_a_layer_of_many_chunks_full_of_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randint(-8, 9, (3, 5, 4_001), generator=generator) / 4.0  # 60,015 values of 9 magnitudes, four chunks
    mask = torch.rand(g.shape, generator=generator) < 0.4
    for k in (1, 100, 5_000, int((~mask).sum())):
        assert masks.largest(g, mask, k)[0].tolist() == full_sort(g, mask, k)


def test_check_9_values_too_close_for_their_bits_to_be_mixed_up() -> None:
    """Neighbours among float32, subnormal ones too, far from and near to 0."""
    step = torch.tensor([1e-45, 2e-45, 1e-38, 1.0, 3e38])
    g = torch.cat([torch.nextafter(step, torch.tensor(0.0)), step, -torch.nextafter(step, torch.tensor(torch.inf))])
    mask = torch.zeros(len(g), dtype=torch.bool)
    assert masks.largest(g, mask, len(g), 4)[0].tolist() == full_sort(g, mask, len(g))


def test_check_9_the_buffer_of_a_pack_is_each_clients() -> None:
    generator = torch.Generator().manual_seed(1)
    g = torch.randint(-4, 5, (6, 7, 11), generator=generator).float()
    mask = torch.rand(7, 11, generator=generator) < 0.5
    index, value = vmap(lambda one: masks.largest(one, mask, 9, 10))(g)
    for k in range(6):
        assert index[k].tolist() == full_sort(g[k], mask, 9)
        assert torch.equal(value[k], g[k].flatten()[index[k].long()])


def test_the_stream_makes_no_second_tensor_of_the_gradients_size() -> None:
    """A gradient of 4 MB through a buffer of 100 entries: what is alive at once is a few numbers for each position of a chunk."""
    g, mask = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)), torch.zeros(1024, 1024, dtype=torch.bool)
    pruned = mask.numel()  # the complement of the mask, a byte each
    with Alive(g, mask) as alive:
        masks.largest(g, mask, 100)
    assert alive.peak <= pruned + 48 * (g.numel() // 64 + 100)  # five int64 and a float32 or two at once
    assert alive.peak < g.numel() * 4


# ---- choices


@given(st.lists(FEW_VALUES, min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_the_top_is_a_full_sort_with_exact_count(values, data) -> None:
    score = torch.tensor(values).view(-1, 1)
    k = data.draw(st.integers(0, len(values)))
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    mask = masks.top(score, k)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    assert sorted(chosen) == mask.flatten().nonzero().flatten().tolist()
    assert torch.equal(masks.first(masks.rank(score), k, score.shape), mask)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_cannot_be_ranked(wrong) -> None:
    with pytest.raises(ValueError, match="only finite scores"):
        masks.rank(torch.tensor([1.0, wrong, 2.0]))
    with pytest.raises(ValueError, match="only finite scores"):
        masks.rank(torch.tensor([1.0, wrong, 2.0]), 1)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3e-40, 1e30]), min_size=1, max_size=40), st.integers(0, 45))
def test_the_first_of_a_ranking_are_those_of_the_whole_one(values: list[float], most: int) -> None:
    score = torch.tensor(values)
    assert masks.rank(score, most).tolist() == masks.rank(score).tolist()[:most]


def test_a_product_with_a_mask_and_a_count_are_those_of_torch() -> None:
    value, mask = torch.tensor([[1.5, -2.0], [float("inf"), 0.0]]), torch.tensor([[True, False], [True, True]])
    assert torch.equal(masks.times(value, mask).view(torch.int32), (value * mask).view(torch.int32))
    assert masks.count(mask) == 3
    assert masks.count(mask.t()[:, 1:]) == 2  # no contiguous piece of memory


# ---- the budget


def test_the_budget_of_resnet18_at_one_percent() -> None:
    """floor(0.01 · 11,164,352) - 1,728; the density that is left for the masked layers is the specification's 0.0098467."""
    left = masks.budget(RESNET18, 0.01)
    assert left == 111_643 - 1_728
    assert left / RESNET18["others"] == pytest.approx(0.0098467, abs=5e-8)
    assert 4 * (left + 1_728) == 446_572


@pytest.mark.parametrize(("density", "left"), [(1.0, 90), (0.3, 20), (0.29, 19), (0.12, 2)])
def test_the_budget_is_what_the_dense_first_layer_leaves(density, left) -> None:
    """0.29 · 100 is 28.999999999999996 in float64."""
    assert masks.budget({"first": 10, "a": 40, "b": 50}, density) == left


@pytest.mark.parametrize("density", [0.11, 0.1, 0.01])
def test_a_budget_below_one_weight_a_layer_names_what_takes_it(density) -> None:
    with pytest.raises(ValueError, match=rf"density = {density} .* 2 layers .* first stays dense with 10.* at least 0\.12$"):
        masks.budget({"first": 10, "a": 40, "b": 50}, density)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=8))
@settings(deadline=None)
def test_the_least_density_that_is_reported_is_possible(counts) -> None:
    sizes = {f"layer{i}": count for i, count in enumerate(counts)}
    with pytest.raises(ValueError, match="at least") as error:
        masks.budget(sizes, 1e-9)
    least = Fraction(str(error.value).rpartition(" ")[2])
    assert masks.budget(sizes, float(least)) == floor(least * sum(counts)) - counts[0] >= len(counts) - 1


# ---- masks beside their weights


def test_every_tensor_of_a_weight_has_the_weights_mask() -> None:
    for key in ("w/conv.weight", "opt/momentum/conv.weight", "opt/control/conv.weight", "grad/conv.weight"):
        assert keys.mask_of(key) == "mask/conv.weight"


def test_what_a_mask_hides_is_exactly_0_and_the_rest_untouched() -> None:
    mask = torch.tensor([True, False, False])
    tree = {"w/a": torch.tensor([1.5, -2.0, 1e30]), "opt/momentum/a": torch.ones(3), "w/b": torch.ones(3)}
    after = masks.apply(tree, {"mask/a": mask})
    assert after["w/a"].tolist() == [1.5, 0, 0]
    assert after["opt/momentum/a"].tolist() == [1, 0, 0]
    assert after["w/b"] is tree["w/b"]
    assert masks.ones({"mask/a": mask, "w/b": torch.ones(3)}) == {"a": 1}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"mask 'a' is torch.float32; a mask is bool"),
        (torch.ones(3, 2).bool(), r"mask 'a' is \(3, 2\), its weight is \(2, 3\)"),
    ],
)
def test_a_mask_that_is_none_is_named(mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        masks.check({"w/a": torch.ones(2, 3), "mask/a": mask})
