"""LotteryFL: the checks of its specification, a federation by hand in torch and plain loops, its costs, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import floor
from typing import Any

import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, loaded, small, stored, world
from torch import Tensor
from torch.nn import functional as F

from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed, LocalTraining
from fedsim.costs.flops import feed_flops
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Evaluate
from fedsim.federated.protocol import ClientInput
from fedsim.methods.baselines.lotteryfl import LotteryFL, kept_after
from fedsim.methods.fedavg import FedAvg as Dense

SIZES = [9, 14, 6, 11, 1]  # the last one has no image to hold out
LAYERS = {"conv2": 216, "fc1": 240, "fc2": 30}
ALL, DENSE = 36 + 216 + 240 + 30, 36
FREE = 2 * (4 + 6) * 2 + 10 + 3  # scales, shifts and statistics of two norms; two biases
SOME = LotteryFL(target=0.3, threshold=0.3, prune=0.4)


def made(
    kind: type = FLEETS[0], cohort: int | None = 3, training: LocalTraining = SLOW, aggregate: Any = None, holdout: float = 0.3
) -> World:
    found = world(stored(*drawn(SIZES)), small(), kind, training, cohort, holdout)
    found.setting = replace(found.setting, aggregate=aggregate or FedAvg())
    return found


def ones() -> Tree:
    net = small()
    return {layer: torch.ones_like(net.get_submodule(layer).weight, dtype=torch.bool) for layer in LAYERS}


def drop(w: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask without its `count` smallest weights, of equal ones the later first."""
    flat, held = w.flatten().tolist(), mask.flatten().tolist()
    order = sorted((i for i, kept in enumerate(held) if kept), key=lambda i: (abs(flat[i]), -i))
    gone = set(order[:count])
    return torch.tensor([kept and i not in gone for i, kept in enumerate(held)]).view(mask.shape)


class ByHand:
    """The server, and clients each with a mask, a rate and a number of images, as the paper tells it."""

    def __init__(self, world: World, method: LotteryFL, mu: float = 0.0) -> None:
        self.world, self.method, self.mu = world, method, mu
        self.first = dict(world.setting.net.initial)
        self.shared = dict(self.first)
        self.masks = [ones() for _ in SIZES]
        self.rates = [1.0 for _ in SIZES]
        self.pruned: list[int] = []  # clients that pruned in the last round
        self.refused = 0  # visits whose model was not accurate enough

    def round(self, r: int) -> None:
        cohort = self.world.fleet.pick(self.world.setting.cohort, r)
        self.pruned = []
        ends = {k: self.visit(k, r) for k in cohort}
        n = {k: self.world.population.size(k) if self.method.weights == "samples" else 1 for k in cohort}
        after = {}
        for key, before in self.shared.items():
            layer = key.removeprefix("w/").removesuffix(".weight")
            top, bottom = torch.zeros_like(before, dtype=torch.float64), torch.zeros_like(before, dtype=torch.float64)
            for k in cohort:
                holds = self.masks[k][layer].double() if layer in LAYERS and key.startswith("w/") else torch.ones_like(top)
                top, bottom = top + n[k] * holds * ends[k][key].double(), bottom + n[k] * holds
            after[key] = torch.where(bottom > 0, top / bottom, before)
        self.shared = after

    def visit(self, k: int, r: int) -> Tree:
        w = self.under_mask(self.shared, k)
        module = loaded(small(), w).eval()
        held = [(x, y) for x, y in batches(self.world, Feed("held", epochs=1, batch=4, augment=False), k, r, 0)]
        right, seen = sum(int((module(x).argmax(1) == y).sum()) for x, y in held), sum(len(y) for _, y in held)
        accurate = bool(seen) and right / seen > self.method.threshold
        self.refused += bool(seen) and not accurate
        if accurate and self.rates[k] > self.method.target:
            self.prune(k, w)
            w = self.under_mask({key: self.first[key] if key.startswith("w/") else value for key, value in w.items()}, k)
            self.pruned.append(k)
        return self.train(w, k, r)

    def prune(self, k: int, w: Tree) -> None:
        rate = (1 - self.method.prune) * self.rates[k]
        last = rate <= self.method.target
        for layer, size in LAYERS.items():
            mask = self.masks[k][layer]
            kept = int(mask.sum())
            count = kept - floor(self.method.target * size) if last else floor(self.method.prune * kept)
            self.masks[k][layer] = drop(w[f"w/{layer}.weight"], mask, count)
        self.rates[k] = max(rate, self.method.target)

    def train(self, w: Tree, k: int, r: int) -> Tree:
        rate, module = self.world.setting.train, loaded(small(), {key: value.clone() for key, value in w.items()}).train()
        optimiser = torch.optim.SGD(module.parameters(), rate.lr, rate.momentum, weight_decay=rate.decay)
        for x, y in batches(self.world, rate.feed(), k, r, 0):
            optimiser.zero_grad()
            loss = F.cross_entropy(module(x), y)
            for name, value in module.named_parameters():
                loss = loss + self.mu / 2 * (value - self.shared[f"w/{name}"]).square().sum()
            loss.backward()
            for layer, mask in self.masks[k].items():
                module.get_submodule(layer).weight.grad *= mask
            optimiser.step()
        end = {f"w/{name}": value.detach() for name, value in module.named_parameters()}
        return end | {f"buf/{name}": value for name, value in module.named_buffers() if value.is_floating_point()}

    def under_mask(self, tree: Tree, k: int) -> Tree:
        return tree | {f"w/{layer}.weight": tree[f"w/{layer}.weight"] * mask for layer, mask in self.masks[k].items()}


def near(one: Tree, other: Tree) -> None:
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert torch.allclose(one[key].double(), value.double(), rtol=1e-6, atol=1e-7), key


# ---- counts


def test_counts_after_each_prune_by_hand() -> None:
    assert kept_after(30, 0.2, 0.1) == (30, 24, 20, 16, 13, 11, 9, 8, 7, 6, 5, 3)  # floor(0.2 · 5) = 1 would leave 4, floor(0.1 · 30) is 3
    assert kept_after(1000, 0.2, 0.5) == (1000, 800, 640, 512, 500)
    assert kept_after(1000, 0.2, 0.8) == (1000, 800)
    assert kept_after(100, 0.2, 0.64) == (100, 80, 64)  # though 0.8 · 0.8 is a little more than 0.64 in floating point
    assert kept_after(100, 0.5, 0.29) == (100, 50, 29)  # though 0.29 · 100 is a little less than 29
    assert kept_after(5, 0.2, 0.1)[-1] == 1  # never none
    assert kept_after(7, 0.2, 1.0) == (7,)


@pytest.mark.parametrize("size", [1, 2, 17, 30, 216])
@pytest.mark.parametrize("prune", [0.05, 0.2, 1.0])
def test_all_layers_take_equally_many_prunes_and_never_more_weights(size, prune) -> None:
    for target in (0.07, 0.5):
        after = kept_after(size, prune, target)
        assert len(after) == len(kept_after(10_000, prune, target))
        assert list(after) == sorted(after, reverse=True)
        assert after[-1] == max(1, floor(target * size))


# ---- the federation


@pytest.mark.parametrize(
    ("weights", "mu", "kind"),
    [("samples", 0.0, FLEETS[0]), ("uniform", 0.0, FLEETS[0]), ("samples", 0.7, FLEETS[0]), ("uniform", 0.7, FLEETS[1])],
)
def test_the_federation_is_the_one_by_hand(weights, mu, kind) -> None:
    one = made(kind, aggregate=FedProx(fedprox_mu=mu) if mu else FedAvg())
    method = replace(SOME, weights=weights)
    hand, state, pruned = ByHand(one, method, mu), method.init(one.setting, None), 0
    for r in range(1, 8):
        one.fleet.open(r)
        state, row = method.round(one.setting, state, one.fleet, r)
        hand.round(r)
        near(state.shared, hand.shared)
        assert row["clients_pruned"] == len(hand.pruned)
        density = [1 - sum(int((~mask).sum()) for mask in hand.masks[k].values()) / ALL for k in one.fleet.pick(3, r)]
        assert row["client_density"] == pytest.approx(sum(density) / 3)
        for k, kept in one.fleet.kept.items():
            for layer, mask in hand.masks[k].items():
                assert torch.equal(kept[f"mask/{layer}.weight"], mask), (r, k, layer)
        pruned += len(hand.pruned)
    assert pruned > 4
    assert hand.refused > 0
    assert hand.rates[4] == 1.0  # it has no held-out image
    assert mu or any(rate == SOME.target for rate in hand.rates)


def test_a_weight_that_nobody_of_the_cohort_holds_stays_as_it_was() -> None:
    one = made(cohort=1)
    method = replace(SOME, threshold=0.0)
    state, fresh = method.init(one.setting, None), 0
    for r in range(1, 6):
        one.fleet.open(r)
        before, (state, _) = state.shared, method.round(one.setting, state, one.fleet, r)
        (k,) = one.fleet.pick(1, r)
        for layer in LAYERS:
            mask, w = one.fleet.kept[k][f"mask/{layer}.weight"], f"w/{layer}.weight"
            assert torch.equal(state.shared[w][~mask], before[w][~mask])
            assert (state.shared[w][mask] != before[w][mask]).any()
            fresh += int((~mask).sum())
    assert fresh


def test_masks_are_nested_in_time_and_have_the_exact_counts() -> None:
    one = made(cohort=5)
    method = LotteryFL(target=0.1, threshold=0.0, prune=0.2)
    state, before = method.init(one.setting, None), [ones() for _ in SIZES]
    for r in range(1, 16):
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        for k, kept in one.fleet.kept.items():
            prunes = int(kept["n/prunes"])
            for layer, size in LAYERS.items():
                mask = kept[f"mask/{layer}.weight"]
                assert not (mask & ~before[k][layer]).any()
                assert int(mask.sum()) == kept_after(size, 0.2, 0.1)[prunes]
                before[k][layer] = mask
    assert max(int(kept["n/prunes"]) for kept in one.fleet.kept.values()) == 11
    assert int(one.fleet.kept[4]["n/prunes"]) == 0


@pytest.mark.parametrize("kind", FLEETS)
def test_rewound_weights_are_the_first_ones_under_the_new_mask(kind) -> None:
    """At a learning rate of 0 what a client uploads is what it began with."""
    one = made(kind, cohort=4, training=replace(SLOW, lr=0.0))
    state = SOME.init(one.setting, None)
    other = {key: value + 0.1 if key.startswith("w/") else value for key, value in state.shared.items()}
    one.fleet.open(1)
    state, row = replace(SOME, threshold=0.0).round(one.setting, replace(state, shared=other), one.fleet, 1)
    rewound = [k for k, kept in one.fleet.kept.items() if kept["n/prunes"]]
    assert len(rewound) == row["clients_pruned"] > 0
    total, images = one.seen[0].reply.total, {k: one.population.size(k) for k in one.fleet.kept}
    for layer in ("conv1", *LAYERS):
        w, parts = f"w/{layer}.weight", []
        for k, n in images.items():
            mask = one.fleet.kept[k].get(f"mask/{layer}.weight", torch.tensor(True))
            parts.append(n * (one.setting.net.initial if k in rewound else other)[w] * mask)
        assert torch.allclose(total[w], sum(parts), rtol=1e-9), layer


@pytest.mark.parametrize("kind", FLEETS)
def test_a_threshold_that_none_exceeds_is_fedavg_to_the_last_bit(kind) -> None:
    mine, plain = made(kind), made(kind)
    found, _ = mine.play(replace(SOME, threshold=1.01), 3)
    other, _ = plain.play(Dense(), 3)
    assert found.shared.keys() == other.shared.keys()
    assert all(torch.equal(found.shared[key], value) for key, value in other.shared.items())


def test_the_gate_needs_more_than_the_threshold() -> None:
    """All held-out images right is not above 1."""
    one = made(cohort=5)
    state, rows = replace(SOME, threshold=1.0).init(one.setting, None), []
    for r in range(1, 3):
        one.fleet.open(r)
        state, row = replace(SOME, threshold=1.0).round(one.setting, state, one.fleet, r)
        rows.append(row)
    assert [row["clients_pruned"] for row in rows] == [0, 0]


@pytest.mark.parametrize(("first", "classifier"), [(True, True), (True, False), (False, False)])
def test_which_layers_have_masks(first, classifier) -> None:
    one = made(cohort=2)
    one.play(replace(SOME, mask_first=first, mask_classifier=classifier, threshold=0.0), 1)
    expected = {"conv2", "fc1"} | ({"conv1"} if first else set()) | ({"fc2"} if classifier else set())
    for kept in one.fleet.kept.values():
        assert {key[5:].removesuffix(".weight") for key in under(kept, "mask/")} == expected


def test_accuracy_of_clients_is_that_of_their_masked_models_and_the_global_one_is_dense() -> None:
    one = made(cohort=4)
    hand = ByHand(one, SOME)
    state, _ = one.play(SOME, 4)
    for r in range(1, 5):
        hand.round(r)
    shared, own, net = SOME.deploy(one.setting, state, one.fleet, list(range(5)))
    assert (own, net) == ({}, None)
    assert not under(shared, "mask/")
    each = one.fleet.run(Evaluate.of(SOME, split="global"), range(5), shared).each
    test = one.population.test
    x, y = (test.images(torch.arange(len(test))).double() / 255 - 0.5) / 0.25, test.labels(torch.arange(len(test)))
    outputs = []
    for k in range(5):
        w = hand.under_mask(hand.shared, k)
        outputs.append(loaded(small(), w).eval()(x))
        sent = ClientInput(shared, {}, one.fleet.kept.get(k, {}), *[torch.tensor(0)] * 3)
        assert torch.allclose(one.setting.net(SOME.model_of(one.setting.net, sent), x)[0], outputs[k], atol=1e-6)
        assert int(each["n/correct"][k]) == int((outputs[k].argmax(1) == y).sum())
    assert not torch.allclose(outputs[0], outputs[1])


# ---- costs


def test_bytes_memory_and_flops_of_a_client_by_hand() -> None:
    """Down and up 4 bytes for each weight it holds and each free value; the mask up where it changed; held-out images forward alone."""
    one = made(cohort=4)
    method = replace(SOME, threshold=0.2)
    hand, state, changed = ByHand(one, method), method.init(one.setting, None), 0
    for r in range(1, 5):
        before = [{layer: mask.clone() for layer, mask in masks.items()} for masks in hand.masks]
        hand.round(r)
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        for k, bill in one.fleet.account.bills.items():
            old, new = before[k], hand.masks[k]
            positions = 0
            for layer, size in LAYERS.items():
                moved, kept = int((old[layer] ^ new[layer]).sum()), int(new[layer].sum())
                positions += min(4 * moved, 4 * kept, -(-size // 8)) if kept < size else 0
                changed += moved > 0
            weights = {layer: int(mask.sum()) for layer, mask in new.items()}
            assert bill.bytes_down == 4 * (DENSE + sum(int(mask.sum()) for mask in old.values()) + FREE)
            assert bill.bytes_up == 4 * (DENSE + sum(weights.values()) + FREE) + positions
            assert bill.density == pytest.approx((DENSE + sum(weights.values())) / ALL)
            profile, n = one.setting.model_profile, one.population.size(k)
            held = SIZES[k] - n
            measured = {layer: int(mask.sum()) for layer, mask in old.items()}  # before it is pruned
            spent = feed_flops(profile, 2 * n, weights).total + feed_flops(profile, held, measured, "forward").total
            assert bill.train_flops == spent
            assert bill.samples == 2 * n
    assert changed


# ---- what cannot be


@pytest.mark.parametrize("aggregate", [FedNova(0.9), Scaffold(0.1)])
def test_aggregations_without_a_mean_of_weights_are_refused(aggregate) -> None:
    with pytest.raises(BadInput, match=r'aggregate = "(fednova|scaffold)": lotteryfl .* needs "fedavg" or "fedprox"'):
        SOME.init(made(aggregate=aggregate).setting, None)


def test_without_held_out_images_it_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^\[partition\] holdout = 0: .*partition.holdout = 0.2"):
        SOME.init(made(holdout=0.0).setting, None)


@pytest.mark.parametrize("field", [{"target": 0.0}, {"target": 1.1}, {"threshold": -0.1}, {"prune": 0.0}, {"prune": 1.5}])
def test_fields_out_of_range_are_named(field) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} = "):
        LotteryFL(**field)
