"""Federated RigL and SET: rounds by hand, the shared drop and growth, uniform draws, what travels, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import cos, floor, pi

import pytest
import torch
from plain_training import FREE, SIZES, WEIGHTS, by_hand, plain
from small_federation import FLEETS, World, drawn, kept, stored, world
from torch import Tensor

from fedsim.config.job import check
from fedsim.core.tree import under
from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.methods.baselines.rigl import RigL
from fedsim.pruning.mask_adjustment import swap
from fedsim.simulation.experiment import build_experiment

SGD = LocalTraining(batch=4, epochs=2, lr=0.1)
ALWAYS = RigL(density=0.45, adjust_every=1, stop_round=8, adjust_fraction=0.4)
MASKED = ("conv2", "fc1", "fc2")


def made(sizes: list[int], kind: type = FLEETS[0], cohort: int | None = None) -> World:
    return world(stored(*drawn(sizes)), plain(), kind, SGD, cohort)


def exchanged_by_hand(w: Tensor, mask: Tensor, g: Tensor, k: int, regrow: bool) -> tuple[list[int], list[float]]:
    """Kept positions and values after `k` left and `k` entered, by sorting lists. Without regrowth a gradient of 0 grows nothing."""
    values, held = w.flatten().tolist(), [place for place, one in enumerate(mask.flatten().tolist()) if one]
    if not regrow:
        k = min(k, sum(1 for place in range(len(values)) if place not in held and float(g.flatten()[place])))
    left = sorted(held, key=lambda place: (abs(values[place]), -place))[:k]
    stay = [place for place in held if place not in left]
    free = [place for place in range(len(values)) if place not in (stay if regrow else held)]
    entered = sorted(free, key=lambda place: -abs(float(g.flatten()[place])))[:k]
    return sorted(stay + entered), [values[place] if place in stay else 0.0 for place in range(len(values))]


# ---- rounds by hand


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("sizes", [[6, 9, 5], [8]], ids=["three clients", "one client: centralised"])
def test_two_adjusting_rounds_by_hand(kind, regrow, sizes) -> None:
    one, method = made(sizes, kind), replace(ALWAYS, regrow=regrow)
    state, came_back = method.init(one.setting, None), 0
    for r in (1, 2):
        one.fleet.open(r)
        before = state.shared
        mean, dense = by_hand(one, before, r, sizes)
        state, told = method.round(one.setting, state, one.fleet, r)
        moved = 0
        for layer in MASKED:
            mask = before[f"mask/{layer}.weight"]
            k = min(floor(0.2 * (1 + cos(pi * r / 8)) * int(mask.sum())), int((~mask).sum()))
            places, values = exchanged_by_hand(mean[f"{layer}.weight"], mask, dense[f"{layer}.weight"], k, regrow)
            after = state.shared[f"mask/{layer}.weight"].flatten()
            assert after.nonzero().flatten().tolist() == places, (layer, r)
            torch.testing.assert_close(state.shared[f"w/{layer}.weight"].flatten(), torch.tensor(values).double(), rtol=0, atol=2e-7)
            new = sum(1 for place in places if not mask.flatten()[place])
            moved, came_back = moved + new, came_back + (k - new if regrow else 0)
        for name in ("conv1.weight", "conv1.bias", "fc2.bias"):
            torch.testing.assert_close(state.shared[f"w/{name}"], mean[name], rtol=0, atol=2e-7)
        assert told == {"lr": 0.1, "weights_swapped": moved}
        assert moved > 0
    assert bool(came_back) == regrow


def test_the_gradient_is_weighted_by_images_and_dense() -> None:
    one = made([6, 9, 5])
    state = ALWAYS.init(one.setting, None)
    one.fleet.open(1)
    _, dense = by_hand(one, state.shared, 1, [6, 9, 5])
    ALWAYS.round(one.setting, state, one.fleet, 1)
    for layer in ("conv2", "fc1"):
        found = one.seen[0].reply.total[f"grad/{layer}.weight"] / 20
        torch.testing.assert_close(found, dense[f"{layer}.weight"], rtol=0, atol=2e-7)
        assert found[~state.shared[f"mask/{layer}.weight"]].any()


def test_the_drop_and_growth_of_the_specification() -> None:
    w, g = torch.tensor([5, 4, 0.1, 0.2, 0, 0, 0, 0]), torch.tensor([0, 0, 9, 0, 1, 2, 3, 0.5])
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    assert swap(mask, w, g, 2, regrow=True)[0].int().tolist() == [1, 1, 1, 0, 0, 0, 1, 0]
    assert swap(mask, w, g, 2)[0].int().tolist() == [1, 1, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_many_rounds_keep_their_counts_and_stop_at_t_end(growth) -> None:
    one = made([6, 9, 5], FLEETS[1], cohort=2)
    method = RigL(density=0.45, growth=growth, regrow=False, adjust_every=2, stop_round=11)
    state, first, due = method.init(one.setting, None), None, []
    for r in range(16):
        one.fleet.open(r)
        before = state.shared
        state, told = method.round(one.setting, state, one.fleet, r)
        first = first or kept(state.shared)
        assert kept(state.shared) == first
        moved = sum(int((mask & ~before[key]).sum()) for key, mask in under(state.shared, "mask/").items())
        assert told.get("weights_swapped", 0) == moved
        free = {layer: SIZES[layer] - count for layer, count in first.items()}
        f = 0.1 * (1 + cos(pi * r / 11)) if r in (2, 4, 6, 8, 10) else 0
        assert moved == sum(min(floor(f * count), free[layer]) for layer, count in first.items())
        assert not any(bool(state.shared["w/" + key[5:]][~mask].any()) for key, mask in under(state.shared, "mask/").items())
        due += [r] if moved else []
    assert due == [2, 4, 6, 8]  # in round 10 f is 0.004, of at most 100 weights
    assert first is not None
    assert sum(first.values()) == int(0.45 * WEIGHTS) - SIZES["conv1"]


@pytest.mark.parametrize("still", [{"adjust_fraction": 0.0}, {"stop_round": 0}])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_without_moves_the_mask_is_static_and_nothing_more_is_sent(still, growth) -> None:
    one = made([6, 9, 5])
    method = replace(ALWAYS, growth=growth, **still)
    state, _ = one.play(method, 3)
    first = method.init(one.setting, None).shared
    assert all(torch.equal(mask, first[key]) for key, mask in under(state.shared, "mask/").items())
    assert not any(key.startswith("grad/") for seen in one.seen for key in seen.reply.total)
    assert all(len(seen.work.feeds) == 1 for seen in one.seen)


# ---- where weights are kept at first


def test_the_first_masks_keep_the_largest_weights_or_drawn_ones() -> None:
    one = made([6])
    by_size, by_draw = (replace(ALWAYS, start=start).init(one.setting, None).shared for start in ("magnitude", "random"))
    assert kept(by_size) == kept(by_draw)
    other = replace(ALWAYS, start="random").init(replace(one.setting, seed=1), None).shared
    again = replace(ALWAYS, start="random").init(one.setting, None).shared
    for key, mask in under(by_size, "mask/").items():
        w = one.setting.net.initial["w/" + key[5:]].abs()
        assert float(w[mask].min()) >= float(w[~mask].max()) if not mask.all() else True
        assert torch.equal(again[key], by_draw[key])
    assert not torch.equal(by_draw["mask/conv2.weight"], by_size["mask/conv2.weight"])
    assert not torch.equal(by_draw["mask/conv2.weight"], other["mask/conv2.weight"])


# ---- SET


def test_growth_of_set_is_uniform_and_of_exactly_k() -> None:
    """Chi-square of 10,000 positions, 4 at a time of the 15 that may grow: 14 degrees of freedom, 36.1 is passed once in 1,000 seeds."""
    one, method = made([6]), RigL(growth="random", regrow=True)
    mask = torch.arange(30).view(3, 10) % 2 == 0
    w = torch.arange(1.0, 31).view(3, 10) * mask
    seen = torch.zeros(30)
    for r in range(2_500):
        score = method.scores(one.setting, {"fc2": 4}, None, r)["fc2"]
        after = swap(mask, w, score, 4, regrow=False)[0].flatten()
        assert int((after & ~mask.flatten()).sum()) == 4
        seen += after & ~mask.flatten()
    expected = 10_000 / 15
    chi = ((seen[1::2] - expected) ** 2 / expected).sum() / (1 - 4 / 15) * 14 / 15  # draws without replacement vary less
    assert float(chi) < 36.1
    assert float(seen[::2].sum()) == 0


def ordered(scores: Tensor) -> list[float]:
    """The scores up to 200 alone, in their order."""
    return [score for score in scores.tolist() if score <= 200]


def test_draws_of_set_differ_between_rounds_layers_and_seeds_alone() -> None:
    one, method = made([6]), RigL(growth="random")
    moves = {"fc1": 1, "conv2": 1}
    first, again, later = (method.scores(one.setting, moves, None, r) for r in (3, 3, 4))
    other = method.scores(replace(one.setting, seed=1), moves, None, 3)
    assert torch.equal(first["fc1"], again["fc1"])
    assert not torch.equal(first["fc1"], later["fc1"])
    assert not torch.equal(first["fc1"], other["fc1"])
    assert ordered(first["fc1"]) != ordered(first["conv2"])  # one key would rank the positions below both sizes alike
    assert sorted(first["fc1"].tolist()) == list(range(1, 241))


def test_set_trains_as_plain_masked_averaging_and_moves_the_smallest() -> None:
    one, method = made([6, 9, 5]), replace(ALWAYS, growth="random", regrow=False)
    state = method.init(one.setting, None)
    one.fleet.open(1)
    mean, _ = by_hand(one, state.shared, 1, [6, 9, 5])
    after, told = method.round(one.setting, state, one.fleet, 1)
    moved = 0
    for layer in MASKED:
        mask = state.shared[f"mask/{layer}.weight"].flatten()
        gone = mask & ~after.shared[f"mask/{layer}.weight"].flatten()
        k = min(floor(0.2 * (1 + cos(pi / 8)) * int(mask.sum())), int((~mask).sum()))
        assert int(gone.sum()) == k
        if k:
            assert float(mean[f"{layer}.weight"].flatten().abs()[gone].max()) <= float(
                mean[f"{layer}.weight"].flatten().abs()[mask & ~gone].min()
            )
        moved += k
    assert told["weights_swapped"] == moved > 0


# ---- all aggregations


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("aggregate", [FedProx(0.3), FedNova(0.0), Scaffold(0.1)])
def test_every_aggregation_trains_under_moving_masks(aggregate, growth) -> None:
    one = made([6, 9, 5])
    one = replace(one, setting=replace(one.setting, aggregate=aggregate))
    state, told = one.play(replace(ALWAYS, growth=growth), 4)
    assert all(found["weights_swapped"] > 0 for found in told[1:])
    for key, mask in under(state.shared, "mask/").items():
        w = state.shared["w/" + key[5:]]
        assert bool(w.isfinite().all())
        assert not w[~mask].any()
        assert w[mask].any()


# ---- costs


def test_bytes_memory_and_flops_by_hand() -> None:
    """An adjusting round sends n · 4 bytes more, holds the gradients of all layers that move, and computes one batch more; SET does not."""
    bills = {}
    for name, method in {"rigl": ALWAYS, "set": replace(ALWAYS, growth="random"), "static": replace(ALWAYS, stop_round=0)}.items():
        one = made([6])
        state = method.init(one.setting, None)
        one.fleet.open(1)
        moving = method.moves(one.setting.net, state.shared, 1)
        method.round(one.setting, state, one.fleet, 1)
        bills[name] = one.fleet.account.bills[0]
        if name == "rigl":
            sizes = [SIZES[layer] for layer in moving]
            nnz = sum(kept(state.shared).values()) + SIZES["conv1"]
    assert len(sizes) > 1
    assert bills["static"].bytes_up == 4 * (nnz + FREE)
    assert bills["rigl"].bytes_up == 4 * (nnz + FREE + sum(sizes))
    assert bills["set"].bytes_up == bills["static"].bytes_up
    assert bills["rigl"].bytes_down == bills["set"].bytes_down == bills["static"].bytes_down
    assert bills["rigl"].memory - bills["static"].memory == 4 * sum(sizes)
    assert bills["set"].memory == bills["static"].memory
    assert bills["rigl"].train_flops > bills["set"].train_flops == bills["static"].train_flops


# ---- what cannot be


def small(method: dict, **sections: dict) -> dict:
    data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 80, "test_images": 20}
    return {"data": data, "partition": {"clients": 4}, "method": method, **sections}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adjust_fraction": 1.5}, "adjust_fraction = 1.5: should be from 0 to 1"),
        ({"adjust_every": 0}, "adjust_every = 0: should be at least 1"),
        ({"stop_round": -1}, "stop_round = -1: should be at least 0"),
        ({"growth": "votes"}, "growth"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check(small({"name": "rigl"} | fields))


def test_a_density_that_leaves_a_layer_without_a_weight_is_refused() -> None:
    setting = build_experiment(check(small({"name": "rigl", "density": 1e-4}))).setting
    with pytest.raises(BadInput, match=r"\[method\] density = 0.0001 leaves 0 of .* Take at least"):
        RigL(density=1e-4).init(setting, None)


def test_set_is_rigl_with_drawn_growth() -> None:
    method = check(small({"name": "set", "density": 0.2})).method.use
    assert method == RigL(density=0.2, growth="random")
    with pytest.raises(BadInput, match=r"'set' means method\.growth = 'random'; the job says 'gradient'"):
        check(small({"name": "set", "growth": "gradient"}))
