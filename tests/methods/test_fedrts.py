"""FedRTS: rewards and posteriors by hand, the draws, what travels, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import cos, floor, pi

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_federation import FLEETS, SLOW, World, batches, drawn, kept, loaded, small, stored, world
from torch.nn import functional as F

from fedsim.config.job import check
from fedsim.core import masks, rng
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.methods.baselines import fedrts
from fedsim.methods.baselines.fedrts import FedRTS, FedRTSState

SIZES = (6, 9, 5)
MASKED = ("conv2", "fc1", "fc2")
METHOD = FedRTS(density=0.45, adjust_every=2, stop_round=8, average_share=0.3, step=4.0)
STILL = LocalTraining(batch=4, epochs=1, lr=0.0)


def made(kind: type = FLEETS[0], cohort: int | None = None, training: LocalTraining = SLOW) -> World:
    return world(stored(*drawn(list(SIZES))), kind=kind, cohort=cohort, training=training)


def largest(w: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    """1 for the k largest |w| of the kept ones, by a plain sort."""
    order = sorted((i for i, keeps in enumerate(mask.flatten().tolist()) if keeps), key=lambda i: (-abs(float(w.flatten()[i])), i))
    found = torch.zeros(mask.numel(), dtype=torch.float64)
    found[order[:k]] = 1
    return found


def loose(r: int, count: int) -> int:
    return floor(0.2 * (1 + cos(pi * r / 8)) * count) if r <= 8 else 0


def trained(shared: Tree, steps: list, probe: list) -> tuple[dict, dict]:
    """A client's weights after plain masked SGD, and the dense gradients of one more batch at them."""
    module = loaded(small(), shared).train()
    hidden = {key[5:]: mask for key, mask in under(shared, "mask/").items()}
    named = dict(module.named_parameters())
    optimiser = torch.optim.SGD(named.values(), SLOW.lr, SLOW.momentum, weight_decay=SLOW.decay)
    for x, y in steps:
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        for name, p in named.items():
            p.grad *= hidden.get(name, 1)
        optimiser.step()
    ((x, y),) = probe
    optimiser.zero_grad()
    F.cross_entropy(module(x), y).backward()
    return {name: p.detach() for name, p in named.items()}, {name: p.grad for name, p in named.items()}


# ---- rounds by hand


@pytest.mark.parametrize("kind", FLEETS)
def test_four_rounds_by_hand(kind) -> None:
    """Every posterior and every mask, of two plain rounds and two adjustments, with two of three clients in a round."""
    one = made(kind, cohort=2)
    state = METHOD.init(one.setting, None)
    a = {layer: torch.ones(state.shared[f"w/{layer}.weight"].numel(), dtype=torch.float64) for layer in MASKED}
    b = {layer: value.clone() for layer, value in a.items()}
    for r in range(1, 5):
        one.fleet.open(r)
        before, cohort = state.shared, one.fleet.pick(2, r)
        state, told = METHOD.round(one.setting, state, one.fleet, r)
        n = sum(SIZES[k] for k in cohort)
        feed, moved = SLOW.feed(), 0
        clients = {}
        for k in cohort:
            probe = batches(one, replace(feed, epochs=0, steps=1), k, r, 1)
            clients[k] = trained(before, batches(one, feed, k, r, 0), probe)
        for place, layer in enumerate(MASKED):
            name = f"{layer}.weight"
            mask = before["mask/" + name].flatten()
            count = int(mask.sum())
            out = loose(r, count)
            mean = sum(SIZES[k] / n * clients[k][0][name] for k in cohort)
            votes = sum(SIZES[k] / n * largest(clients[k][0][name], mask, count - out) for k in cohort)
            reward = 0.3 * largest(mean, mask, count - out) + 0.7 * votes
            seen = mask.clone()
            if r % 2 == 0:
                named = torch.zeros(mask.numel(), dtype=torch.float64)
                for k in cohort:
                    named += SIZES[k] / n * largest(clients[k][1][name], ~mask, min(out, int((~mask).sum())))
                reward, seen = torch.where(mask, reward, 0.3 * 0.5 + 0.7 * named), torch.ones_like(mask)
            a[layer][seen] += 4 * reward[seen]
            b[layer][seen] += 4 * (1 - reward[seen])
            torch.testing.assert_close(state.alpha[f"vote/{name}"].flatten().double(), a[layer], rtol=1e-6, atol=0)
            torch.testing.assert_close(state.beta[f"vote/{name}"].flatten().double(), b[layer], rtol=1e-6, atol=0)
            new = state.shared["mask/" + name].flatten()
            if r % 2 == 1:
                assert torch.equal(new, mask)
            elif not bool(mask.all()):
                generator = np.random.default_rng(rng.number(0, "beta", r, place) % 2**64)
                xi = generator.beta(*(part[f"vote/{name}"].flatten().double().numpy() for part in (state.alpha, state.beta)))
                assert set(new.nonzero().flatten().tolist()) == set(np.argsort(-xi)[:count].tolist())
            moved += int((new & ~mask).sum())
            wanted = torch.where(new & mask, mean.flatten(), 0.0).view(state.shared["w/" + name].shape)
            torch.testing.assert_close(state.shared["w/" + name], wanted, rtol=0, atol=1e-6)
        assert told["weights_swapped"] == moved
        assert (moved > 0) == (r % 2 == 0)


@pytest.mark.parametrize("kind", FLEETS)
def test_a_constant_reward_has_the_closed_form(kind) -> None:
    """At rate 0 nothing moves, so that after t rounds the mean is (1 + lambda sum X) / (2 + lambda t)."""
    one = made(kind, training=STILL)
    method = replace(METHOD, stop_round=400, adjust_every=399, step=2.0)
    state, _ = one.play(method, 5)
    for layer in MASKED:
        name = f"{layer}.weight"
        mask, w = state.shared["mask/" + name], state.shared["w/" + name]
        count = int(mask.sum())
        total = sum(largest(w, mask, count - floor(0.2 * (1 + cos(pi * r / 400)) * count)) for r in range(1, 6))
        a, b = (part[f"vote/{name}"].flatten().double() for part in (state.alpha, state.beta))
        held = mask.flatten()
        torch.testing.assert_close((a / (a + b))[held], ((1 + 2.0 * total) / (2 + 2.0 * 5))[held], rtol=1e-6, atol=0)
        assert bool((a[~held] == 1).all())
        assert bool((b[~held] == 1).all())
        if layer == "conv2":
            assert len(set(total[held].tolist())) > 1


def test_a_large_step_makes_the_mean_an_indicator_without_variance() -> None:
    one = made(training=STILL)
    state, _ = one.play(replace(METHOD, stop_round=400, adjust_every=399, step=1e6), 3)
    for layer in MASKED:
        name = f"{layer}.weight"
        mask, w = state.shared["mask/" + name], state.shared["w/" + name]
        wanted = largest(w, mask, int(mask.sum()) - floor(0.2 * (1 + cos(pi * 3 / 400)) * int(mask.sum())))
        a, b = (part[f"vote/{name}"].flatten().double()[mask.flatten()] for part in (state.alpha, state.beta))
        torch.testing.assert_close(a / (a + b), wanted[mask.flatten()], atol=1e-6, rtol=0)
        assert float((a * b / ((a + b) ** 2 * (a + b + 1))).max()) < 1e-12


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_average_alone_or_the_clients_alone(share) -> None:
    """gamma = 1: rewards are 0 or 1 by the average, and 1/2 for pruned weights. gamma = 0: shares of the clients' votes."""
    one = made()
    method = replace(METHOD, average_share=share)
    begin = method.init(one.setting, None)
    one.fleet.open(2)
    after, _ = method.round(one.setting, begin, one.fleet, 2)
    total = one.seen[-1].reply.total
    mean = {key: value / 20 for key, value in total.items()}
    apart = 0
    for layer in MASKED:
        name = f"{layer}.weight"
        mask = begin.shared["mask/" + name]
        k = int(mask.sum()) - loose(2, int(mask.sum()))
        average = largest(mean["w/" + name], mask, k)
        reward = (after.alpha[f"vote/{name}"].flatten().double() - 1) / 4
        held = mask.flatten()
        votes = mean[f"vote/{name}"].flatten()
        torch.testing.assert_close(reward[held], (average if share else votes)[held], rtol=1e-6, atol=1e-6)
        apart += int((average != votes)[held].sum())
        if share:
            torch.testing.assert_close(reward[~held], torch.full_like(reward[~held], 0.5))
        else:
            assert set((reward[~held] * 20).round().long().tolist()) <= {0, 6, 9, 5, 15, 11, 14, 20}
    assert apart


# ---- the draws


def test_draws_follow_their_posteriors() -> None:
    """How often the first of two draws is the larger one, against the integral over both densities."""
    alpha, beta = torch.tensor([3.0, 2.0]), torch.tensor([1.5, 2.5])
    grid = (np.arange(200_000) + 0.5) / 200_000
    first, second = (grid ** (a - 1) * (1 - grid) ** (b - 1) for a, b in zip(alpha.tolist(), beta.tolist(), strict=True))
    wins = float((first * np.cumsum(second)).sum() / first.sum() / second.sum())
    found = np.mean([bool(one_of_two(alpha, beta, seed)[0]) for seed in range(2000)])
    assert found == pytest.approx(wins, abs=4 * (wins * (1 - wins) / 2000) ** 0.5)
    assert wins > 0.7


def one_of_two(alpha: torch.Tensor, beta: torch.Tensor, seed: int) -> torch.Tensor:
    shared = {"mask/a.weight": torch.tensor([True, False])}
    return fedrts.drawn(FedRTSState(shared, {}, {"vote/a.weight": alpha}, {"vote/a.weight": beta}), "a", seed)


def test_rounds_layers_and_seeds_draw_differently_and_again_the_same() -> None:
    ends = []
    for seed in (0, 0, 1):
        one = made()
        one = replace(one, setting=replace(one.setting, seed=seed))
        ends.append(one.play(replace(METHOD, adjust_every=1), 2)[0].shared)
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert any(not torch.equal(value, ends[2][key]) for key, value in ends[0].items() if key.startswith("mask/"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])), min_size=1, max_size=24), st.data())
def test_votes_are_for_the_largest_and_of_equal_ones_for_the_first(pairs, data) -> None:
    mask, w = torch.tensor([keeps for keeps, _ in pairs]), torch.tensor([value for _, value in pairs])
    k = data.draw(st.integers(0, int(mask.sum())))
    assert torch.equal(masks.without_smallest(w, mask, k).double(), largest(w, mask, int(mask.sum()) - k))


# ---- many rounds, and what travels


@pytest.mark.parametrize("aggregate", [None, FedProx(0.1), FedNova(0.9), Scaffold(0.1)])
def test_twelve_rounds_keep_their_counts(aggregate) -> None:
    one = made(cohort=2)
    if aggregate:
        one = replace(one, setting=replace(one.setting, aggregate=aggregate))
    state, moved = METHOD.init(one.setting, None), []
    first = kept(state.shared)
    assert sum(first.values()) + 36 == floor(0.45 * 522)
    for r in range(13):
        one.fleet.open(r)
        before = state.shared
        state, told = METHOD.round(one.setting, state, one.fleet, r)
        moved.append(bool(told.get("weights_swapped")))
        assert kept(state.shared) == first
        for key, mask in under(state.shared, "mask/").items():
            w = state.shared["w/" + key[5:]]
            assert not w[~(mask & before[key])].any()
    assert moved == [r in (2, 4, 6, 8) for r in range(13)]


def test_indices_alone_are_charged_beside_the_model() -> None:
    one = made()
    state = METHOD.init(one.setting, None)
    free = 2 * 4 + 2 * 6 + 10 + 3 + 2 * 4 + 2 * 6  # gains, shifts, biases and running statistics
    for r in range(1, 5):
        one.fleet.open(r)
        counts = kept(state.shared)
        sizes = {"conv2": 216, "fc1": 240, "fc2": 30}
        named = sum(min(loose(r, count), sizes[layer] - count) for layer, count in counts.items()) if r % 2 == 0 else 0
        state, _ = METHOD.round(one.setting, state, one.fleet, r)
        assert named or r % 2
        for bill in one.fleet.account.bills.values():
            assert bill.bytes_up == 4 * (36 + sum(counts.values()) + free + named)
            assert bill.memory_terms.get("top", 0) == 8 * named  # the search holds values too
        assert {key for key in one.seen[-1].reply.each if key.startswith("top/")} == (
            {f"top/index/{layer}" for layer in MASKED if loose(r, counts[layer]) and counts[layer] < sizes[layer]} if r % 2 == 0 else set()
        )


def test_nothing_is_loose_after_the_last_adjustment() -> None:
    one = made()
    shared = METHOD.init(one.setting, None).shared
    assert METHOD.loose(one.setting.net, shared, 9) == dict.fromkeys(MASKED, 0)
    assert METHOD.loose(one.setting.net, shared, 2) == {layer: loose(2, count) for layer, count in kept(shared).items()}
    assert max(METHOD.loose(one.setting.net, shared, 2).values()) > 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average_share": 1.1}, "average_share = 1.1: should be from 0 to 1"),
        ({"step": 0}, "step = 0.0: should be above 0"),
        ({"adjust_every": 0}, "adjust_every = 0"),
        ({"adjust_fraction": 1.2}, "adjust_fraction = 1.2"),
        ({"density": 0.0}, "density"),
    ],
)
def test_fields_outside_of_their_ranges(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check({"method": {"name": "fedrts"} | fields})


def test_a_density_that_leaves_a_layer_without_a_weight() -> None:
    with pytest.raises(BadInput, match="conv1 stays dense"):
        FedRTS(density=0.07).init(made().setting, None)
