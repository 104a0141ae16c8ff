"""FedMef's method: the acceptance checks 1 to 5, 13, 14 of its specification (section 8), its options, and what cannot be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from math import cos, pi, tanh

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_federation import FLEETS, World, batches, drawn, kept, stored, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config.job import check
from fedsim.core import masks
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import MARKED
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.costs import communication
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedProx
from fedsim.federated.averaged_round import trained
from fedsim.federated.client_work import TrainAndScore
from fedsim.kernels.nsconv import normalised
from fedsim.methods.fedmef import FedMef
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.pruning import extrusion, mask_adjustment
from fedsim.pruning.extrusion import ExtrudeAndProbe, marked
from fedsim.pruning.sparsity import layer_densities

SGD = LocalTraining(batch=4, epochs=2, lr=0.1)
FALLING = LocalTraining(batch=4, epochs=2, lr=0.1, schedule="exponential", factor=0.5)
ALWAYS = FedMef(density=0.45, adjust_every=1, stop_round=8, penalty=0.05)


def small() -> nn.Module:
    """36 weights in the first layer, then 216, 240 and 30; no norms."""
    torch.manual_seed(1)
    layers = {"conv1": NormalisedConv2d(1, 4, 3, padding=1), "relu1": nn.ReLU(), "conv2": NormalisedConv2d(4, 6, 3, stride=2, padding=1)}
    layers |= {"relu2": nn.ReLU(), "flatten": nn.Flatten(), "fc1": nn.Linear(24, 10), "relu3": nn.ReLU(), "fc2": nn.Linear(10, 3)}
    return nn.Sequential(OrderedDict(layers))


def made(training: LocalTraining = SGD, kind: type = FLEETS[0], keep: ActivationPruning | None = None, cohort: int | None = None) -> World:
    found = world(stored(*drawn([6, 9, 5])), small(), kind, training, cohort)
    found.setting.net.set_activation_pruning(keep)
    return found


# ---- 1 and 2: numbers


def test_check_1_moves() -> None:
    assert [mask_adjustment.moves(1000, 10_000, FedMef().adjust_fraction, r, 300) for r in (10, 150, 290, 300)] == [398, 200, 1, 0]
    assert mask_adjustment.moves(1000, 10_000, FedMef().adjust_fraction, 0, 300) == 400


def test_check_2_rates() -> None:
    assert extrusion.rex(0, 40) == 1
    assert extrusion.rex(10, 40) == pytest.approx(0.857143, abs=1e-6)
    assert extrusion.rex(20, 40) == pytest.approx(2 / 3)
    assert extrusion.rex(40, 40) == 0
    assert float(extrusion.beta(torch.tensor(1.0), 0, 40, 0.1)) == pytest.approx(0.0462117, abs=1e-7)
    assert float(extrusion.beta(torch.tensor(0.0), 0, 40, 0.1)) == 0


# ---- 3: the penalty


@pytest.mark.parametrize(("penalty", "shrunk"), [(1e-4, 0.9992), (1e-3, 0.9920), (1e-2, 0.9230), (1e-1, 0.4457)])
def test_check_3_marked_weights_alone_shrink_when_the_data_say_nothing(penalty, shrunk, monkeypatch) -> None:
    one = made(replace(SGD, epochs=0, steps=40))
    method = FedMef(density=0.45, adjust_every=1, stop_round=8, penalty=penalty)
    state = method.init(one.setting, None)
    net = one.setting.net
    zero = {key: torch.zeros_like(value) for key, value in under(net.initial, "w/").items()}

    def nothing(self, tree, batch, wrt="w", **rest):  # type: ignore[no-untyped-def]
        return batch.x.sum() * 0, {**zero}, {}, _taps(rest, zero)

    monkeypatch.setattr(type(net), "gradient", nothing)
    extrusion = method.extrusion(net, state.shared, 1)
    after, _ = trained(one.setting, one.fleet, state, 1, method.training(one.setting, 1, extrusion))
    marks = marked(state.shared, extrusion.marks)
    for key, value in under(state.shared, "w/").items():
        index = marks.get(MARKED + key[2:].removesuffix(".weight"), torch.zeros(0, dtype=torch.int64))
        wanted = value.flatten().index_put((index,), value.flatten()[index] * shrunk)
        torch.testing.assert_close(after.shared[key].flatten(), wanted, rtol=1e-4, atol=1e-7)


def _taps(rest: dict, zero: Tree) -> Tree:
    found: Tree = {}
    for layer in rest.get("layers", ()):
        found |= rest["tap"](layer, zero[f"w/{layer}.weight"])
    return found


@pytest.mark.parametrize("kind", FLEETS)
def test_check_3_without_a_penalty_an_adjusting_round_trains_as_a_plain_one_to_the_bit(kind) -> None:
    ends = []
    for method in (replace(ALWAYS, penalty=0.0), replace(ALWAYS, stop_round=0)):
        one = made(kind=kind)
        state = method.init(one.setting, None)
        work = method.training(one.setting, 1, method.extrusion(one.setting.net, state.shared, 1))
        ends.append(trained(one.setting, one.fleet, state, 1, work)[0].shared)
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def test_a_vanishing_penalty_at_a_constant_rate_changes_nothing_either() -> None:
    """At a rate that never falls beta is below it, and 2 lambda w is lost beside the gradient: the plain round to the bit."""
    ends = []
    for penalty in (0.0, 1e-300):
        one = made()
        method = replace(ALWAYS, penalty=penalty)
        state = method.init(one.setting, None)
        work = method.training(one.setting, 1, method.extrusion(one.setting.net, state.shared, 1))
        ends.append(trained(one.setting, one.fleet, state, 1, work)[0].shared)
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# ---- a round by hand


def logits(tree: dict[str, Tensor], hidden: Tree, x: Tensor) -> Tensor:
    """The small network in plain torch."""
    for i, stride in ((1, 1), (2, 2)):
        w = normalised(tree[f"conv{i}.weight"], tree[f"conv{i}.gain"], hidden.get(f"conv{i}.weight"))
        x = F.conv2d(x, w, tree[f"conv{i}.bias"], stride, 1).relu()
    x = F.linear(x.flatten(1), tree["fc1.weight"] * hidden["fc1.weight"], tree["fc1.bias"]).relu()
    return F.linear(x, tree["fc2.weight"] * hidden["fc2.weight"], tree["fc2.bias"])


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("form", ["squared", "norm"])
def test_an_extruding_round_by_hand(kind, mu, form) -> None:
    """Round 3 of a falling rate: the loss with the penalty, the rate of each step, the swap by the votes."""
    one = made(FALLING, kind)
    one = replace(one, setting=replace(one.setting, aggregate=FedProx(mu)))
    method = FedMef(density=0.45, adjust_every=1, stop_round=8, penalty=0.03, penalty_form=form)
    state, _ = method.round(one.setting, method.init(one.setting, None), one.fleet, 0)
    state = replace(state, shared={key: value * 3 if key.startswith("w/") else value for key, value in state.shared.items()})
    one.fleet.open(3)
    after, told = method.round(one.setting, state, one.fleet, 3)
    hidden = {key[5:]: mask for key, mask in under(state.shared, "mask/").items()}
    counts = {}
    for layer in ("conv2", "fc1", "fc2"):
        mask = hidden[f"{layer}.weight"]
        counts[layer] = min(int(0.2 * (1 + cos(pi * 3 / 8)) * int(mask.sum())), int((~mask).sum()))
    low = {}
    for layer, k in counts.items():
        flat, mask = state.shared[f"w/{layer}.weight"].flatten(), hidden[f"{layer}.weight"].flatten()
        low[f"{layer}.weight"] = torch.where(mask, flat.abs(), torch.inf).sort(stable=True).indices[:k]
    total: dict[str, Tensor] = {}
    raised = 0
    votes = {layer: torch.zeros(hidden[f"{layer}.weight"].numel(), dtype=torch.float64) for layer in counts}
    for client, n in enumerate((6, 9, 5)):
        tree = {key[2:]: value.clone().requires_grad_() for key, value in under(state.shared, "w/").items()}
        feed = FALLING.feed()
        steps = batches(one, feed, client, 3, 0)
        for t, (x, y) in enumerate(steps):
            theta = torch.cat([tree[name].flatten()[index] for name, index in low.items()])
            norm = float(theta.detach().norm())
            loss = F.cross_entropy(logits(tree, hidden, x), y) + 0.03 * (theta.square().sum() if form == "squared" else theta.norm())
            loss = loss + sum(mu / 2 * (value - state.shared["w/" + name]).square().sum() for name, value in tree.items())
            T = len(steps)
            rate = max(0.1 * 0.5**2, (2 * T - 2 * t) / (2 * T - t) * tanh(norm / 2) * 0.1)
            raised += rate > 0.1 * 0.5**2
            for (name, value), g in zip(tree.items(), torch.autograd.grad(loss, list(tree.values())), strict=True):
                with torch.no_grad():
                    value -= rate * g * hidden.get(name, 1)
        ((x, y),) = batches(one, replace(feed, epochs=0, steps=1), client, 3, 1)
        used = {name: (value.detach() if name != "conv2.weight" else None) for name, value in tree.items()}
        effective = {"conv2.weight": normalised(tree["conv2.weight"], tree["conv2.gain"], hidden["conv2.weight"]).detach().requires_grad_()}
        effective |= {name: (tree[name] * hidden[name]).detach().requires_grad_() for name in ("fc1.weight", "fc2.weight")}
        w1 = normalised(used["conv1.weight"], used["conv1.gain"], None)
        out = F.conv2d(x, w1, used["conv1.bias"], 1, 1).relu()
        out = F.conv2d(out, effective["conv2.weight"], used["conv2.bias"], 2, 1).relu().flatten(1)
        out = F.linear(F.linear(out, effective["fc1.weight"], used["fc1.bias"]).relu(), effective["fc2.weight"], used["fc2.bias"])
        dense = torch.autograd.grad(F.cross_entropy(out, y), list(effective.values()))
        for (name, _), g in zip(effective.items(), dense, strict=True):
            layer = name.removesuffix(".weight")
            score = torch.where(hidden[name].flatten(), 0.0, g.flatten())
            index = score.abs().sort(descending=True, stable=True).indices[: counts[layer]]
            votes[layer][index] += n / 20 * score[index].float().double()
        for name, value in tree.items():
            total[name] = total.get(name, 0) + n / 20 * value.detach()
    moved, pressed = 0, float(torch.cat([total[name].flatten()[index] for name, index in low.items()]).norm())
    for layer, k in counts.items():
        name = f"{layer}.weight"
        mask, w = hidden[name].flatten().clone(), total[name].flatten()
        grown = votes[layer].abs().sort(descending=True, stable=True).indices[:k]
        grown = grown[votes[layer][grown] != 0]
        dropped = torch.where(mask, w.abs(), torch.inf).sort(stable=True).indices[: len(grown)]
        mask[grown], mask[dropped] = True, False
        total[name] = torch.where(mask, w, 0).index_fill(0, grown, 0.0).view(total[name].shape)
        assert torch.equal(after.shared[f"mask/{name}"].flatten(), mask), layer
        moved += len(grown)
    for name, value in total.items():
        torch.testing.assert_close(after.shared["w/" + name], value, rtol=0, atol=2e-7)
    assert 0 < raised < 14  # steps
    assert told["weights_swapped"] == moved > 0
    assert told["marked_norm_before"] == pytest.approx(
        float(torch.cat([state.shared["w/" + n].flatten()[i] for n, i in low.items()]).norm())
    )
    assert told["marked_norm_after"] == pytest.approx(pressed, rel=1e-6)


# ---- 4: the marked set


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_check_4_marked_are_the_smallest_kept_as_a_full_sort_has_them(k, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-4, 5, (10, 20), generator=generator).float()
    mask = torch.zeros(200, dtype=torch.bool).index_fill(0, torch.randperm(200, generator=generator)[:60], True).view(10, 20)
    found = masks.smallest(w, mask, k)
    order = torch.where(mask.flatten(), w.flatten().abs(), torch.inf).sort(stable=True).indices[:k]
    assert torch.equal(found, order)
    assert bool(mask.flatten()[found].all())


@pytest.mark.parametrize("kind", FLEETS)
def test_check_4_every_client_marks_the_same(kind) -> None:
    one = made(kind=kind)
    state = ALWAYS.init(one.setting, None)
    extrusion = ALWAYS.extrusion(one.setting.net, state.shared, 1)
    seen: list[Tensor] = []
    work = ExtrudeAndProbe(SGD.feed() and (SGD.feed(),), 0.1, marks=extrusion.marks, lr0=0.1)
    for _ in range(3):
        found = work.init_state(one.setting.net, _sent(state.shared))
        seen.append(torch.cat([found[MARKED + layer] for layer in extrusion.marks]))
        assert {layer: len(found[MARKED + layer]) for layer in extrusion.marks} == dict(extrusion.moves)
    assert all(torch.equal(one, seen[0]) for one in seen)


def _sent(shared: Tree):  # type: ignore[no-untyped-def]
    from fedsim.federated.protocol import ClientInput

    zero = torch.tensor(0)
    return ClientInput(shared, {}, {}, zero, zero, zero)


# ---- 5: the swap


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"drop_rule": "marked", "remark_every_step": True}, {"extrusion_rounds": 1, "blocks": 2, "ramp": True, "beta_norm": "l1"}],
)
def test_check_5_twenty_five_rounds_keep_their_counts(kind, options) -> None:
    one = made(FALLING, kind, ActivationPruning(0.4), cohort=2)
    method = FedMef(density=0.45, adjust_every=2, stop_round=20, penalty=0.01, **options)
    state, told = method.init(one.setting, None), []
    first = kept(state.shared)
    assert sum(first.values()) + 36 <= 0.45 * 522
    for r in range(26):
        one.fleet.open(r)
        before = state.shared
        state, found = method.round(one.setting, state, one.fleet, r)
        told.append(found.get("weights_swapped", 0))
        assert kept(state.shared) == first
        for key, mask in under(state.shared, "mask/").items():
            w, old = state.shared["w/" + key[5:]], before[key]
            assert not w[~mask].any()
            assert not w[mask & ~old].any()
            assert int((mask & ~old).sum()) == int((~mask & old).sum())
    due = [r for r, moves in enumerate(told) if moves]
    assert due == list(range(2, 20, 2)) if "blocks" not in options else set(due) < set(range(2, 20, 2))


@pytest.mark.parametrize("drop", ["marked", "smallest"])
def test_what_leaves_is_what_was_marked_or_what_is_smallest(drop) -> None:
    """At this rate the marked weights do not stay the smallest."""
    one = made(replace(SGD, lr=2.0))
    method = replace(ALWAYS, drop_rule=drop, penalty=0.0)
    state = method.init(one.setting, None)
    after, _ = method.round(one.setting, state, one.fleet, 1)
    extrusion = method.extrusion(one.setting.net, state.shared, 1)
    outside = 0
    for key, index in marked(state.shared, extrusion.moves).items():
        name = f"mask/{key.removeprefix(MARKED)}.weight"
        gone = (state.shared[name] & ~after.shared[name]).flatten().nonzero().flatten()
        outside += len(set(gone.tolist()) - set(index.tolist()))
    assert (outside == 0) == (drop == "marked")


# ---- 13: where weights are kept at first


def test_check_13_the_same_seed_keeps_the_same_and_another_does_not() -> None:
    one = made()
    first, second = (ALWAYS.masks_of(one.setting) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = ALWAYS.masks_of(replace(one.setting, seed=1))
    assert {key: int(mask.sum()) for key, mask in other.items()} == {key: int(mask.sum()) for key, mask in first.items()}
    assert any(not torch.equal(first[key], other[key]) for key in first)
    largest = replace(ALWAYS, start="erk_magnitude").masks_of(one.setting)
    for key, mask in largest.items():
        w = one.setting.net.initial["w/" + key[5:]].abs()
        assert bool(mask.all()) or float(w[mask].min()) >= float(w[~mask].max())


@pytest.mark.parametrize("sharing", ["erk", "er", "uniform"])
def test_layers_share_the_density_as_the_job_says(sharing) -> None:
    one = made()
    net = one.setting.net
    held = replace(ALWAYS, sharing=sharing).masks_of(one.setting)
    expected = layer_densities.kept_counts(net, net.maskable, ALWAYS.density, sharing)
    assert {key[5:].removesuffix(".weight"): int(mask.sum()) for key, mask in held.items()} == expected


def test_a_classifier_that_is_not_masked_counts_as_kept() -> None:
    one = made()
    state = replace(ALWAYS, mask_classifier=False).init(one.setting, None)
    assert set(kept(state.shared)) == {"conv2", "fc1"}
    assert sum(kept(state.shared).values()) == int(0.45 * 522) - 36 - 30


# ---- 14: bytes


def test_check_14_bytes_are_those_of_the_tensors_that_are_encoded() -> None:
    one = world(stored(*drawn([6])), small(), training=LocalTraining(batch=4), cohort=1)
    method, before, told = FedMef(density=0.45, adjust_every=2, stop_round=20), {}, []
    state = method.init(one.setting, None)
    for r in range(4):
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        told.append({k: (bill.bytes_down, bill.bytes_up) for k, bill in one.fleet.account.bills.items()})
    free = 4 + 6 + 10 + 3 + 4 + 6  # biases and gains
    for seen in one.seen:
        broadcast = {key: value.float() if value.is_floating_point() else value for key, value in seen.shared.items()}
        payload, _ = communication.encode(broadcast, last=before)
        report = {key: value.float() for key, value in seen.reply.total.items()} | {key: value[0] for key, value in seen.reply.each.items()}
        sent, _ = communication.encode(report, held=under(seen.shared, "mask/"))
        assert told[seen.r] == {0: (len(payload), len(sent))}
        before = under(seen.shared, "mask/")
        moves = getattr(seen.work, "moves", {})
        assert len(sent) == 4 * (36 + sum(kept(seen.shared).values()) + free) + 8 * sum(moves.values())
    assert [bool(seen.reply.each) for seen in one.seen] == [False, True, False] or len(one.seen) == 3


# ---- options


def test_the_last_steps_are_the_budget() -> None:
    """With T = 2 of 4 steps the first two are plain ones."""
    one = made(replace(SGD, epochs=0, steps=4))
    state = ALWAYS.init(one.setting, None)
    work = ExtrudeAndProbe((SGD.feed(),), 0.01, budget=2, lr0=0.1, marks={"fc1": 3})
    t = [work._spent(_at(step, 4)) for step in range(4)]
    assert [(int(a), int(b)) for a, b in t] == [(-2, 2), (-1, 2), (0, 2), (1, 2)]
    over = replace(work, budget=None, before=1, rounds=3)
    assert [tuple(map(int, over._spent(_at(step, 4)))) for step in range(4)] == [(4, 12), (5, 12), (6, 12), (7, 12)]
    assert state.shared


def _at(step: int, steps: int):  # type: ignore[no-untyped-def]
    from fedsim.core.types import Batch

    return Batch(torch.zeros(1), torch.zeros(1), None, torch.tensor(step), torch.tensor(steps))


def test_a_transfer_presses_in_the_rounds_before_and_moves_in_the_last() -> None:
    one = made()
    method = FedMef(density=0.45, adjust_every=4, stop_round=8, extrusion_rounds=2)
    state = method.init(one.setting, None)
    found = [method.extrusion(one.setting.net, state.shared, r) for r in range(1, 9)]
    assert [bool(one.marks) for one in found] == [False, True, True, True, False, False, False, False]  # K_l = 0 at R_stop
    assert [bool(one.moves) for one in found] == [False, False, False, True, False, False, False, False]
    assert [(one.before, one.rounds) for one in found[1:4]] == [(0, 3), (1, 3), (2, 3)]
    assert found[1].marks == found[3].moves


def test_a_growing_penalty() -> None:
    work = ExtrudeAndProbe((SGD.feed(),), 0.1, penalty=1e-4, ramp=True)
    assert [float(work._penalty(torch.tensor(t))) for t in (0, 9, 98, 99, 500)] == pytest.approx([1e-4, 1e-3, 9.9e-3, 1e-2, 1e-2])


def test_a_plain_round_is_plain_training() -> None:
    one = made()
    method = FedMef(density=0.45, adjust_every=2, stop_round=8)
    state = method.init(one.setting, None)
    method.round(one.setting, state, one.fleet, 1)
    assert type(one.seen[-1].work) is TrainAndScore
    assert not one.seen[-1].work.moves


# ---- what cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget = 0: should be at least 1"),
        ({"penalty": -1.0}, "penalty = -1.0"),
        ({"extrusion_rounds": 10}, "extrusion_rounds = 10: should be below adjust_every = 10"),
        ({"adjust_fraction": 0.6}, "adjust_fraction = 0.6: should be from 0 to 0.5"),
        ({"density": 0.0}, "density"),
        ({"adjust_every": 0}, "adjust_every = 0"),
        ({"drop_rule": "all"}, "drop"),
    ],
)
def test_fields_outside_of_their_ranges(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check({"method": {"name": "fedmef"} | fields})


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.01, "some"])
def test_a_kept_share_outside_of_0_to_1(keep) -> None:
    with pytest.raises(BadInput, match="activation_keep"):
        check({"method": {"name": "fedmef"}, "train": {"activation_keep": keep}})


def test_models_that_cannot_prune_their_activations_are_reported() -> None:
    from fedsim.simulation.experiment import build_experiment

    table = {"method": {"name": "fedavg"}, "model": {"factory": "reflecting_model:reflecting"}, "train": {"activation_keep": 0.3}}
    with pytest.raises(BadInput, match=r"activation_keep = 0.3: activations cannot be pruned: 1 pads by padding_mode = 'reflect'"):
        build_experiment(check(table))


def test_a_density_that_leaves_a_layer_without_a_weight() -> None:
    with pytest.raises(BadInput, match="conv1 stays dense"):
        FedMef(density=0.07).init(made().setting, None)
