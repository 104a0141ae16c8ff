"""When, where and how much masks are adjusted, and the swap itself: worked numbers, and a brute-force swap beside it."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import models
from fedsim.core import masks
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.pruning import mask_adjustment

SCORES = st.sampled_from([-3.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0])  # ties, and positions without a vote


def by_hand(mask: list[bool], w: list[float], score: list[float], k: int) -> tuple[list[bool], list[float], set[int], set[int]]:
    """One layer's exchange as the specification writes it, with plain loops."""
    grow = sorted((i for i in range(len(w)) if not mask[i] and score[i] != 0), key=lambda i: (-abs(score[i]), i))[:k]
    drop = sorted((i for i in range(len(w)) if mask[i]), key=lambda i: (abs(w[i]), i))[: len(grow)]
    after = [(kept or i in grow) and i not in drop for i, kept in enumerate(mask)]
    return after, [0.0 if i in grow or not after[i] else w[i] for i in range(len(w))], set(grow), set(drop)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[bool], list[float], list[float], int]:
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=24))
    w = [draw(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 4.0])) if kept else 0.0 for kept in mask]
    score = [0.0 if kept and draw(st.booleans()) else draw(SCORES) for kept in mask]
    return mask, w, score, draw(st.integers(0, min(mask.count(True), mask.count(False))))


# ---- when and how much


@pytest.mark.parametrize(("r", "moved"), [(0, 300), (10, 292), (20, 271), (30, 238), (50, 150), (90, 7), (100, 0)])
def test_check_6_moves_fall_with_the_cosine(r, moved) -> None:
    assert mask_adjustment.moves(1000, 100_000, 0.15, r, 100) == moved


@pytest.mark.parametrize(("r", "moved"), [(10, 293), (50, 150), (90, 8), (100, 0)])
def test_moves_rounded_up_on_wish_leave_whole_numbers_alone(r, moved) -> None:
    """150 is 149.99999999999997 or 150.00000000000003 by the cosine of some machines."""
    assert mask_adjustment.moves(1000, 100_000, 0.15, r, 100, up=True) == moved


def test_no_more_moves_than_there_are_pruned_or_kept_weights() -> None:
    assert mask_adjustment.moves(90, 100, 0.15, 1, 100) == 10  # 26 by the cosine
    assert mask_adjustment.moves(100, 100, 0.15, 1, 100) == 0
    assert mask_adjustment.moves(2, 100, 0.5, 1, 100, up=True) == 2
    assert mask_adjustment.moves(1, 100, 0.15, 1, 100) == 0


def test_rounds_that_adjust() -> None:
    """Rounds count from 1; R_stop is the last that may."""
    assert [r for r in range(1, 60) if mask_adjustment.due(r, 10, 40)] == [10, 20, 30, 40]
    assert [r for r in range(1, 10) if mask_adjustment.due(r, 3, 8)] == [3, 6]
    assert not any(mask_adjustment.due(r, 1, 0) for r in range(1, 5))


# ---- which layers


def resnet18() -> list[str]:
    module = models.build(ModelSettings("resnet18"), (3, 32, 32), 10, 0)
    return [layer.name for layer in profiler.profile(module, (3, 32, 32)).layers][1:]


def test_blocks_of_resnet18_are_four_tensors_each_and_its_stages_end_with_the_classifier() -> None:
    names = resnet18()
    blocks = mask_adjustment.groups(names, 5)
    assert [len(block) for block in blocks] == [4] * 5
    assert [name for block in blocks for name in block] == names
    stages = mask_adjustment.stages(names)
    assert [len(stage) for stage in stages] == [4, 5, 5, 6]  # two convs a block, and a shortcut where the stage narrows
    assert [{name.split(".")[0] for name in stage} for stage in stages] == [{"layer1"}, {"layer2"}, {"layer3"}, {"layer4", "fc"}]
    assert stages[3][-1] == "fc"
    assert [name for stage in stages for name in stage] == names


@pytest.mark.parametrize(
    ("layers", "count", "lengths"),
    [(10, 5, [2] * 5), (7, 5, [2, 2, 1, 1, 1]), (19, 5, [4, 4, 4, 4, 3]), (3, 5, [1, 1, 1]), (7, 1, [7]), (7, 7, [1] * 7)],
)
def test_blocks_differ_by_at_most_one_longer_ones_first(layers, count, lengths) -> None:
    names = [f"layer{i}" for i in range(layers)]
    blocks = mask_adjustment.groups(names, count)
    assert [len(block) for block in blocks] == lengths
    assert [name for block in blocks for name in block] == names


def test_a_lone_layer_before_the_first_stage_belongs_to_it() -> None:
    assert mask_adjustment.stages(["stem", "a.0", "a.1", "b.0", "b.1", "fc"]) == [["stem", "a.0", "a.1"], ["b.0", "b.1", "fc"]]


@pytest.mark.parametrize("layers", [["conv2", "fc1", "fc2"], ["features.3", "features.6", "fc"]])
def test_a_model_of_one_stage_has_no_stages(layers) -> None:
    with pytest.raises(ValueError, match=r"no stages in a model of .*fc"):
        mask_adjustment.stages(layers)


# ---- votes


def test_check_8_votes_worked() -> None:
    """A (n = 3) sends {4: 1.0, 5: -2.0}; B (n = 1) sends {5: 4.0, 6: 3.0}."""
    index, value = torch.tensor([[4, 5], [5, 6]], dtype=torch.int32), torch.tensor([[1.0, -2.0], [4.0, 3.0]])
    found = mask_adjustment.votes(index, value, torch.tensor([3, 1]) / 4, 8)
    assert found.tolist() == [0, 0, 0, 0, 0.75, -0.5, 0.75, 0]


@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 2**32))
@settings(deadline=None)
def test_check_14_scattered_votes_are_the_dense_weighted_mean_of_masked_top_gradients(clients, k, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(5, 6, dtype=torch.bool).view(-1).index_fill(0, torch.randperm(30, generator=generator)[:12], False).view(5, 6)
    gradients = torch.randint(-9, 10, (clients, 5, 6), generator=generator).float() / 3
    n = torch.randint(1, 50, (clients,), generator=generator)
    sparse = [masks.largest(g, mask, k) for g in gradients]
    index, value = (torch.stack(parts) for parts in zip(*sparse, strict=True))
    dense = torch.zeros(30, dtype=torch.float64)
    for g, images in zip(gradients, n, strict=True):
        top = masks.top(torch.where(mask, -1.0, g.abs()), k)
        dense += float(images) / float(n.sum()) * (g * top).double().flatten()
    assert torch.allclose(mask_adjustment.votes(index, value, n / n.sum(), 30), dense, atol=1e-6)


# ---- the swap


def test_check_7_swap_worked() -> None:
    w, votes = [5, 4, 0.1, 0.2, 0, 0, 0, 0], [0, 0, 9, 0, 1, 2, 3, 0.5]
    mask = [1, 1, 1, 1, 0, 0, 0, 0]
    after, moved, count = mask_adjustment.swap(torch.tensor(mask).bool(), torch.tensor(w), torch.tensor(votes), 2)
    assert after.int().tolist() == [1, 1, 0, 0, 0, 1, 1, 0]
    assert moved.tolist() == [5, 4, 0, 0, 0, 0, 0, 0]
    assert count == 2


@given(layers())
@settings(deadline=None, max_examples=300)
def test_a_swap_is_the_loop_by_hand_with_disjoint_sets_and_exact_counts(layer) -> None:
    mask, w, score, k = layer
    shape = (1, len(mask))
    after, moved, count = mask_adjustment.swap(torch.tensor(mask).view(shape), torch.tensor(w).view(shape), torch.tensor(score), k)
    expected, weights, grow, drop = by_hand(mask, w, score, k)
    assert after.flatten().tolist() == expected
    assert moved.flatten().tolist() == weights
    assert count == len(grow) == len(drop)
    assert not grow & drop
    assert after.sum() == sum(mask)
    assert after.shape == moved.shape == shape


def test_a_vote_of_0_is_none_and_a_negative_one_counts_by_its_size() -> None:
    mask = torch.tensor([True, True, True, False, False, False])
    w = torch.tensor([3.0, -1.0, 2.0, 0, 0, 0])
    after, moved, count = mask_adjustment.swap(mask, w, torch.tensor([9.0, 9, 9, 0, -0.5, 0]), 3)
    assert after.tolist() == [True, False, True, False, True, False]
    assert (moved.tolist(), count) == ([3, 0, 2, 0, 0, 0], 1)
    same, unmoved, none = mask_adjustment.swap(mask, w, torch.zeros(6), 3)
    assert (same.tolist(), unmoved.tolist(), none) == (mask.tolist(), w.tolist(), 0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(wrong: float) -> None:
    w = torch.tensor([5.0, 4.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="only finite scores"):
        mask_adjustment.swap(w != 0, w, torch.tensor([0.0, 0.0, 1.0, wrong]), k=1)


def test_a_swap_leaves_what_it_is_given_alone() -> None:
    mask, w = torch.tensor([True, False]), torch.tensor([1.0, 0.0])
    mask_adjustment.swap(mask, w, torch.tensor([0.0, 1.0]), 1)
    assert (mask.tolist(), w.tolist()) == ([True, False], [1, 0])


def tree(generator: torch.Generator) -> dict[str, Tensor]:
    held = {f"mask/{name}.weight": torch.rand(4, 5, generator=generator) < 0.4 for name in "abc"}
    return {f"w/{key[5:]}": torch.randn(4, 5, generator=generator) * mask for key, mask in held.items()} | held


def test_only_the_layers_that_move_change_each_by_its_own_votes() -> None:
    generator = torch.Generator().manual_seed(2)
    shared, moves, weight = tree(generator), {"a": 3, "c": 2}, torch.tensor([0.25, 0.75])
    each = {}
    for layer, k in moves.items():
        tops = [masks.largest(torch.randn(4, 5, generator=generator), shared[f"mask/{layer}.weight"], k) for _ in range(2)]
        each |= {f"top/index/{layer}": torch.stack([i for i, _ in tops]), f"top/value/{layer}": torch.stack([v for _, v in tops])}
    changed, moved = mask_adjustment.swapped(shared, each | {"n/images": torch.tensor([1, 3])}, moves, weight)
    assert moved == sum(moves.values())
    assert changed.keys() == shared.keys()
    for name in "abc":
        score = [0.0] * 20
        for client in range(2) if name in moves else ():
            for i, v in zip(each[f"top/index/{name}"][client].tolist(), each[f"top/value/{name}"][client].tolist(), strict=True):
                score[i] += float(weight[client]) * v
        mask, w = shared[f"mask/{name}.weight"], shared[f"w/{name}.weight"]
        after, weights, _, _ = by_hand(mask.flatten().tolist(), w.flatten().tolist(), score, moves.get(name, 0))
        assert changed[f"mask/{name}.weight"].flatten().tolist() == after
        assert changed[f"w/{name}.weight"].flatten().tolist() == weights


def test_three_tenths_of_the_kept_weights_is_the_most_that_moves_by_default() -> None:
    for kept in range(1, 200):
        assert mask_adjustment.moves(kept, 10_000, 0.15, 1, 1_000_000) <= floor(0.3 * kept + 1e-9)


def test_an_adjustment_every_0_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="every 0 rounds; at least 1"):
        mask_adjustment.due(3, 0, 10)


def test_votes_that_are_not_finite_name_their_layer() -> None:
    shared = {"w/fc.weight": torch.ones(2, 2), "mask/fc.weight": torch.tensor([[True, False], [True, False]])}
    each = {"top/index/fc": torch.tensor([[1]]), "top/value/fc": torch.tensor([[float("inf")]])}
    with pytest.raises(ValueError, match="gradients of layer 'fc' are not finite"):
        mask_adjustment.swapped(shared, each, {"fc": 1}, torch.ones(1))


@pytest.mark.parametrize(("kept", "moved"), [([1, 1, 1, 0], 1), ([1, 1, 1, 1], 0)])
def test_no_more_weights_are_exchanged_than_there_are_pruned_ones(kept, moved) -> None:
    """Else those that cannot be exchanged would leave, come back, and be 0."""
    w, mask = torch.tensor([4.0, 3.0, 2.0, 1.0]) * torch.tensor(kept), torch.tensor(kept) > 0
    after, values, count = mask_adjustment.swap(mask, w, torch.tensor([0.0, 0.0, 1.0, 5.0]), k=2, regrow=True)
    assert (count, int(after.sum())) == (moved, sum(kept))
    assert int((values != 0).sum()) == sum(kept) - moved
