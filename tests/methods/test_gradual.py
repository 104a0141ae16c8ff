"""Gradual magnitude pruning: the density of every round, nested masks of exact size, what is kept, what travels, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import FREE, SIZES, WEIGHTS, by_hand, plain
from small_federation import FLEETS, World, drawn, kept, stored, world

from fedsim.config.job import check
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.methods.baselines.gradual import Gradual
from fedsim.methods.fedavg import FedAvg
from fedsim.pruning.mask_adjustment import falling_density
from fedsim.pruning.sparsity.layer_densities import shared_out
from fedsim.simulation.experiment import build_experiment

SGD = LocalTraining(batch=4, epochs=2, lr=0.1)
METHOD = Gradual(density=0.3, start_round=1, stop_round=8, adjust_every=2)
WAYS = [{"scope": "global"}, {"sharing": "uniform"}, {"sharing": "erk"}, {"sharing": "er"}]


def made(sizes: list[int], kind: type = FLEETS[0]) -> World:
    return world(stored(*drawn(sizes)), plain(), kind, SGD)


def rounds_of(one: World, method: Gradual, last: int) -> list[tuple[Tree, dict]]:
    """The broadcast after every round, and what the round recorded."""
    state, found = method.init(one.setting, None), []
    for r in range(last + 1):
        one.fleet.open(r)
        state, told = method.round(one.setting, state, one.fleet, r)
        found.append((state.shared, told))
    return found


# ---- the schedule


def test_the_density_falls_by_the_papers_cubic_law() -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta t))^3 with s_i = 0, for s_f = 0.875: powers of 2 are exact."""
    assert [falling_density(r, 2, 10, 1.0, 0.125) for r in (0, 2, 6, 10, 11)] == [1, 1, 0.125 + 0.875 / 8, 0.125, 0.125]
    assert 1 - falling_density(4, 2, 10, 1.0, 0.125) == pytest.approx(0.875 - 0.875 * 0.75**3)


@pytest.mark.parametrize(
    ("start", "stop", "every", "rounds"), [(1, 8, 2, [3, 5, 7, 8]), (0, 6, 3, [3, 6]), (4, 5, 10, [5]), (2, 6, 1, [3, 4, 5, 6])]
)
def test_it_prunes_every_few_rounds_after_the_start_and_at_the_stop(start, stop, every, rounds) -> None:
    method = Gradual(start_round=start, stop_round=stop, adjust_every=every)
    assert [r for r in range(20) if method.due(r, stop)] == rounds


# ---- rounds


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "-".join(ways.values()))
def test_masks_are_nested_have_exact_sizes_and_keep_the_largest(ways) -> None:
    one, method = made([6, 9, 5]), replace(METHOD, **ways)
    found = rounds_of(one, method, 9)
    assert kept(found[0][0]) == {layer: SIZES[layer] for layer in ("conv2", "fc1", "fc2")}
    for r in range(1, 10):
        (before, _), (after, told) = found[r - 1 : r + 1]
        density = 0.3 + 0.7 * (1 - min(max((r - 1) / 7, 0), 1)) ** 3
        assert told["target_density"] == pytest.approx(density)
        if r not in (3, 5, 7, 8):
            assert kept(after) == kept(before)
            continue
        assert sum(kept(after).values()) + SIZES["conv1"] == floor(density * WEIGHTS + 1e-9)
        for key, mask in under(after, "mask/").items():
            assert not bool((mask & ~before[key]).any())
            assert not after["w/" + key[5:]][~mask].any()
    assert sum(kept(found[9][0]).values()) + SIZES["conv1"] == floor(0.3 * WEIGHTS)


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pruning_round_by_hand(kind, scope) -> None:
    """Trained densely, averaged by images; then a sort of the absolute values says what is left."""
    sizes = [6, 9, 5]
    one, method = made(sizes, kind), Gradual(density=0.3, scope=scope, stop_round=2, adjust_every=1)
    state = method.init(one.setting, None)
    one.fleet.open(1)
    mean, _ = by_hand(one, state.shared, 1, sizes)
    after, _ = method.round(one.setting, state, one.fleet, 1)
    density = 0.3 + 0.7 / 8
    left = floor(density * WEIGHTS) - SIZES["conv1"]
    layers = {layer: mean[f"{layer}.weight"].abs().flatten() for layer in ("conv2", "fc1", "fc2")}
    if scope == "global":
        floors = dict.fromkeys(layers, float(torch.cat(list(layers.values())).sort(descending=True).values[left - 1]))
    else:
        share = left / sum(SIZES[layer] for layer in layers)
        counts = {layer: floor(share * SIZES[layer]) for layer in layers}
        for layer in list(layers)[: left - sum(counts.values())]:
            counts[layer] += 1
        floors = {layer: float(layers[layer].sort(descending=True).values[k - 1]) for layer, k in counts.items()}
    for layer, values in layers.items():
        mask = after.shared[f"mask/{layer}.weight"].flatten()
        assert torch.equal(mask, values >= floors[layer] - 1e-7), layer
        torch.testing.assert_close(after.shared[f"w/{layer}.weight"].flatten(), mean[f"{layer}.weight"].flatten() * mask, rtol=0, atol=2e-7)
    torch.testing.assert_close(after.shared["w/conv1.weight"], mean["conv1.weight"], rtol=0, atol=2e-7)


def test_a_pruned_weight_never_returns_also_where_kept_ones_are_0() -> None:
    one, method = made([6]), replace(METHOD, scope="global")
    shared = method.init(one.setting, None).shared
    for layer in ("conv2", "fc1", "fc2"):
        shared = shared | {
            f"mask/{layer}.weight": shared[f"mask/{layer}.weight"].clone(),
            f"w/{layer}.weight": shared[f"w/{layer}.weight"] * 0,
        }
    shared["mask/conv2.weight"].view(-1)[:100] = False
    after = method.smaller_masks(one.setting.net, shared, 0.5)
    assert not after["mask/conv2.weight"].flatten()[:100].any()
    assert sum(int(mask.sum()) for mask in after.values()) == 261 - 36


@pytest.mark.parametrize("sharing", ["uniform", "erk", "er"])
def test_pruned_weight_by_weight_no_layer_ever_gains(sharing) -> None:
    """Where the counts of two layers fall together, a share rounded for the smaller budget alone gives a third one a weight more."""
    one, method = made([6]), replace(METHOD, sharing=sharing)
    shared = method.init(one.setting, None).shared
    for whole in range(WEIGHTS, 60, -1):
        after = method.smaller_masks(one.setting.net, shared, whole / WEIGHTS)
        assert not any(bool((mask & ~shared[key]).any()) for key, mask in after.items())
        assert sum(int(mask.sum()) for mask in after.values()) + SIZES["conv1"] == whole
        shared = shared | after


def test_a_layer_that_one_ranking_empties_is_recorded() -> None:
    one, method = made([6]), Gradual(density=0.3, scope="global", stop_round=1)
    state = method.init(one.setting, None)
    tiny = state.shared["w/fc2.weight"] * 1e-6
    one = replace(one, setting=replace(one.setting, train=replace(SGD, lr=1e-9)))
    one.fleet.open(1)
    after, told = method.round(one.setting, replace(state, shared=state.shared | {"w/fc2.weight": tiny}), one.fleet, 1)
    assert told["empty_layers"] == 1
    assert not after.shared["mask/fc2.weight"].any()


@pytest.mark.parametrize("kind", FLEETS)
def test_density_1_is_federated_averaging_to_the_bit(kind) -> None:
    ends = []
    for method in (Gradual(density=1.0, stop_round=3, adjust_every=1), FedAvg()):
        state, _ = made([6, 9, 5], kind).play(method, 4)
        ends.append(under(state.shared, "w/"))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("aggregate", [FedProx(0.3), FedNova(0.0), Scaffold(0.1)])
def test_every_aggregation_trains_under_shrinking_masks(aggregate) -> None:
    one = made([6, 9, 5])
    one = replace(one, setting=replace(one.setting, aggregate=aggregate))
    shared = rounds_of(one, METHOD, 9)[-1][0]
    assert sum(kept(shared).values()) + SIZES["conv1"] == floor(0.3 * WEIGHTS)
    for key, mask in under(shared, "mask/").items():
        assert bool(shared["w/" + key[5:]].isfinite().all())
        assert not shared["w/" + key[5:]][~mask].any()
        assert shared["w/" + key[5:]][mask].any()


# ---- shares under a cap


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5), st.integers(0, 2**31), st.data())
def test_shares_of_what_is_left_meet_the_budget_and_exceed_no_layer(shapes, seed, data) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    sizes = {name: a * b for name, (a, b) in named.items()}
    how = data.draw(st.sampled_from(["erk", "er", "uniform"]))
    generator = torch.Generator().manual_seed(seed)
    most = {name: int(torch.randint(1, size + 1, (), generator=generator)) for name, size in sizes.items()}
    budget = data.draw(st.integers(len(sizes), sum(most.values())))
    found = shared_out(named, budget, how, most)
    assert sum(found.values()) == budget
    assert all(1 <= found[name] <= most[name] for name in sizes)
    assert shared_out(named, budget, how, sizes) == shared_out(named, budget, how)


# ---- costs


def test_bytes_by_hand() -> None:
    """Dense at first, without positions; after a pruning the kept weights, and once the positions."""
    one, method = made([6]), Gradual(density=0.3, stop_round=1)
    state, bills = method.init(one.setting, None), []
    for r in range(3):
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        bills.append(one.fleet.account.bills.get(0))
    nnz = sum(kept(state.shared).values()) + SIZES["conv1"]
    positions = sum(min(4 * k, -(-SIZES[layer] // 8), 4 * (SIZES[layer] - k)) for layer, k in kept(state.shared).items())
    assert bills[1].bytes_up == bills[1].bytes_down == 4 * (WEIGHTS + FREE)
    assert bills[2].bytes_up == 4 * (nnz + FREE)
    assert bills[2].bytes_down == 4 * (nnz + FREE) + positions


# ---- what cannot be


def small(method: dict, rounds: int = 10) -> dict:
    data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 80, "test_images": 20}
    return {"rounds": rounds, "data": data, "partition": {"clients": 4}, "method": {"name": "gradual"} | method}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_round": 0}, "stop_round = 0: should be at least 1"),
        ({"start_round": -1}, "start_round = -1: should be at least 0"),
        ({"adjust_every": 0}, "adjust_every = 0: should be at least 1"),
        ({"density": 0.0}, "density = 0.0: should be above 0"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check(small(fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_round": 8, "stop_round": 8}, r"\[method\] start_round = 8: should be below 8, the round of the last pruning"),
        ({"start_round": 7}, r"\[method\] start_round = 7: should be below 7, the round of the last pruning"),
        (
            {"stop_round": 300},
            r"\[method\] stop_round = 300: should be at most the job's rounds = 10, or the model never reaches density = 0.1",
        ),
        ({"stop_round": 10, "density": 1e-4}, r"\[method\] density = 0.0001 leaves 0 of .* Take at least"),
    ],
)
def test_a_job_that_cannot_reach_its_density_is_refused(fields, message) -> None:
    parts = build_experiment(check(small(fields)))
    with pytest.raises(BadInput, match=message):
        parts.method.init(parts.setting, None)
