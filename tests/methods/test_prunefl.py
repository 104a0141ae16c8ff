"""PruneFL: importance, choice and costs by hand, the stage at one client, the library's form, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import cos, floor, pi

import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, kept, loaded, small, stored, world
from torch.nn import functional as F

import fedsim
from fedsim.config.job import check
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Loss, Train
from fedsim.methods.baselines.prunefl import PruneFL
from fedsim.pruning.sparsity.reconfiguration import REST, TrainAndSquare

SIZES = (6, 9, 5)
MASKED = ("conv2", "fc1", "fc2")  # 216, 240 and 30 weights, beside 36 of the first layer
FREE = 2 * 4 + 2 * 6 + 10 + 3  # gains, shifts and biases
BUFFERS = 2 * 4 + 2 * 6  # running statistics
EACH = (1e-3, 3e-3, 2e-3)
PAPER = PruneFL(adjust_every=2, initial_iterations=0, seconds_per_weight=EACH, constant_seconds=0.5, prunable=0.4)


def made(kind: type = FLEETS[0], cohort: int | None = None) -> World:
    return world(stored(*drawn(list(SIZES))), kind=kind, cohort=cohort)


def measured(shared: Tree, steps: list, mu: float = 0.0) -> tuple[dict, dict, dict]:
    """A client's weights after plain masked SGD, and of each parameter the sums of its dense gradients and of their squares."""
    module = loaded(small(), shared).train()
    hidden = {key[5:]: mask for key, mask in under(shared, "mask/").items()}
    named = dict(module.named_parameters())
    optimiser = torch.optim.SGD(named.values(), SLOW.lr, SLOW.momentum, weight_decay=SLOW.decay)
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    for x, y in steps:
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        for name, p in named.items():
            sums[name] += p.grad
            squares[name] += p.grad**2
            p.grad += mu * (p.detach() - shared["w/" + name])
            p.grad *= hidden.get(name, 1)
        optimiser.step()
    return {name: p.detach() for name, p in named.items()}, sums, squares


def best(z: list[float], seconds: list[float], must: list[bool], constant: float, rest: float) -> list[bool]:
    """The greedy choice with plain loops."""
    mask, top, below = list(must), rest, constant
    for zj, tj, stays in zip(z, seconds, must, strict=True):
        top, below = top + zj * stays, below + tj * stays
    for j in sorted((j for j, stays in enumerate(must) if not stays), key=lambda j: (-z[j] / seconds[j], j)):
        if z[j] / seconds[j] <= top / below:
            break
        mask[j], top, below = True, top + z[j], below + seconds[j]
    return mask


def stay(w: torch.Tensor, mask: torch.Tensor, share: float) -> list[bool]:
    places = [i for i, kept in enumerate(mask.flatten().tolist()) if kept]
    gone = sorted(places, key=lambda i: (abs(float(w.flatten()[i])), -i))[: floor(share * len(places))]
    return [i in places and i not in gone for i in range(w.numel())]


# ---- rounds of the paper's form by hand


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_four_rounds_by_hand(kind, mu) -> None:
    """Two reconfigurations. A client that misses one begins anew, and does not send what it measured before."""
    one = made(kind, cohort=2)
    one = replace(one, setting=replace(one.setting, aggregate=FedProx(mu)))
    state = PAPER.init(one.setting, None)
    own: dict[int, dict] = {}
    missed = 0
    for r in range(1, 7):
        one.fleet.open(r)
        before, cohort = state.shared, one.fleet.pick(2, r)
        state, told = PAPER.round(one.setting, state, one.fleet, r)
        if r % 2 == 1:
            missed, own = missed + len(set(own) - set(cohort)), {}
        mean: dict = {}
        for k in cohort:
            w, sums, _ = measured(before, batches(one, SLOW.feed(), k, r, 0), mu)
            found = {name: SIZES[k] * g**2 for name, g in sums.items()}
            own[k] = {name: own.get(k, {}).get(name, 0) + z for name, z in found.items()}
            for name, value in w.items():
                mean[name] = mean.get(name, 0) + SIZES[k] / sum(SIZES[j] for j in cohort) * value
        if r % 2 == 1:
            assert not [key for key in one.seen[-1].reply.total if key.startswith(("grad/", "loss/"))]
            assert all(torch.allclose(state.shared["w/" + name], value, atol=1e-6) for name, value in mean.items())
            continue
        z = {name: sum(own[k][name] for k in cohort) for name in mean}
        total = one.seen[-1].reply.total
        for layer in MASKED:
            torch.testing.assert_close(total[f"grad/{layer}.weight"] * 2**20, z[f"{layer}.weight"], rtol=1e-5, atol=1e-9)
        rest = sum(float(value.sum()) for name, value in z.items() if name.removesuffix(".weight") not in MASKED)
        assert float(total[REST]) * 2**20 == pytest.approx(rest, rel=1e-6)
        flat, must, seconds = [], [], []
        for layer, t in zip(MASKED, EACH, strict=True):
            flat += (total[f"grad/{layer}.weight"] * 2**20).flatten().tolist()
            must += stay(mean[f"{layer}.weight"], before[f"mask/{layer}.weight"], 0.4 * 0.5 ** (r / 10000))
            seconds += [t] * mean[f"{layer}.weight"].numel()
        mask = best(flat, seconds, must, 0.5, rest)
        new = torch.cat([state.shared[f"mask/{layer}.weight"].flatten() for layer in MASKED])
        assert new.tolist() == mask
        assert must < mask
        spent = 0.5 + sum(t for t, keeps in zip(seconds, mask, strict=True) if keeps)
        assert told["modelled_seconds"] == pytest.approx(spent)
        gain = rest + sum(zj for zj, keeps in zip(flat, mask, strict=True) if keeps)
        assert told["importance_per_second"] == pytest.approx(gain / spent / sum(SIZES[k] for k in cohort))
        for layer in MASKED:
            w, held = state.shared[f"w/{layer}.weight"], state.shared[f"mask/{layer}.weight"]
            torch.testing.assert_close(w, (mean[f"{layer}.weight"] * held), atol=1e-6, rtol=0)
            assert not w[~held].any()
            assert not w[held & ~before[f"mask/{layer}.weight"]].any()
    assert missed
    assert bool((~new).any())


def test_the_squared_gradients_of_the_reconfiguration_round_alone() -> None:
    one = made()
    method = replace(PAPER, importance="reconfiguration_round")
    one.play(method, 1)
    assert type(one.seen[-1].work) is Train
    one.play(method, 2)
    last = one.seen[-1]
    z = sum(n * measured(last.shared, batches(one, SLOW.feed(), k, 2, 0))[1]["fc1.weight"] ** 2 for k, n in enumerate(SIZES))
    torch.testing.assert_close(last.reply.total["grad/fc1.weight"] * 2**20, z, rtol=1e-5, atol=1e-9)
    assert not any("own/" in key for client in one.fleet.kept.values() for key in client)


def test_less_may_leave_at_once_as_rounds_go_by() -> None:
    """Under a cap that lets nothing in, what must stay is all that stays: 1 - 0.4 / 2^(2/2), then 1 - 0.4 / 2^(4/2)."""
    one = made()
    state, _ = one.play(replace(PAPER, half_life=2, max_density=0.08, density=0.08), 4)
    second = {layer: size - floor(0.2 * size) for layer, size in (("conv2", 216), ("fc1", 240), ("fc2", 30))}
    assert kept(state.shared) == {layer: count - floor(0.1 * count) for layer, count in second.items()}


def test_a_cap_falls_linearly_to_the_density() -> None:
    """Rounds 2, 4 … of 10; 522 weights in all, 36 of them never masked. What must stay stays: so at first more than the cap."""
    one = made()
    method = replace(PAPER, max_density=0.9, density=0.5, constant_seconds=1e9, prunable=0.3)
    state, found = method.init(one.setting, None), []
    for r in range(11):
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        found.append(sum(kept(state.shared).values()) + 36)
    assert found[2::2] == [floor((0.9 - 0.04 * r) * 522) for r in (2, 4, 6, 8, 10)]


def test_the_time_model_counts_images_and_bytes() -> None:
    one = made()
    method = replace(PAPER, seconds_per_weight=None, flops_per_second=1e4, bytes_per_second=100.0, constant_seconds=7.0)
    state, told = one.play(method, 2)
    images = SLOW.epochs * sum(SIZES) / 3
    each = {layer: images * 6 * places / 1e4 + 8 / 100 for layer, places in (("conv2", 4), ("fc1", 1), ("fc2", 1))}
    assert told[2]["modelled_seconds"] == pytest.approx(7 + sum(each[layer] * count for layer, count in kept(state.shared).items()))


@pytest.mark.parametrize("importance", ["every_round", "reconfiguration_round"])
def test_bytes_and_memory(importance) -> None:
    """Dense importance goes up in reconfiguration rounds alone, with one number for all that has no mask."""
    one = made()
    method = replace(PAPER, importance=importance)
    state = method.init(one.setting, None)
    for r in range(5):
        one.fleet.open(r)
        sent = sum(kept(state.shared).values()) + 36 + FREE + BUFFERS
        state, _ = method.round(one.setting, state, one.fleet, r)
        for bill in one.fleet.account.bills.values():
            assert bill.bytes_up == 4 * (sent + (486 + 1 if r in (2, 4) else 0))
            sums = 522 + FREE if importance == "every_round" or r in (2, 4) else 0
            assert bill.memory_terms.get("beside", 0) == 4 * (sums + (487 if importance == "every_round" else 0))


@pytest.mark.parametrize("aggregate", [FedProx(0.1), FedNova(0.9), Scaffold(0.1)])
@pytest.mark.parametrize("form", ["paper", "library"])
def test_every_aggregation(aggregate, form) -> None:
    one = made(cohort=2)
    one = replace(one, setting=replace(one.setting, aggregate=aggregate))
    state, _ = one.play(replace(PAPER, form=form, density=0.45, initial_iterations=4, initial_every=2, start_accuracy=0), 5)
    for key, mask in under(state.shared, "mask/").items():
        assert not state.shared["w/" + key[5:]][~mask].any()
        assert bool(state.shared["w/" + key[5:]].isfinite().all())


# ---- the stage at one client

STAGE = replace(PAPER, initial_iterations=12, initial_every=4, initial_batch=2, initial_batches=2, start_accuracy=0)


@pytest.mark.parametrize("kind", FLEETS)
def test_iterations_at_one_client_by_hand(kind) -> None:
    one = made(kind)
    _, told = one.play(STAGE, 0)
    (client,) = one.fleet.pick(1, 0)
    assert {tuple(seen.clients) for seen in one.seen} == {(client,)}
    assert [type(seen.work) for seen in one.seen] == [Loss, TrainAndSquare, TrainAndSquare, TrainAndSquare]
    assert told[0]["initial_iterations"] == 12
    n, first = SIZES[client], one.seen[1]
    feed = Feed("probe", steps=4, batch=2, share=4 / n)
    w, _, squares = measured(first.shared, batches(one, feed, client, 0, 0))
    torch.testing.assert_close(first.reply.total["grad/fc1.weight"] * 2**20, n * squares["fc1.weight"] / 4, rtol=1e-5, atol=1e-9)
    flat, must, seconds = [], [], []
    for layer, t in zip(MASKED, EACH, strict=True):
        flat += (first.reply.total[f"grad/{layer}.weight"]).flatten().tolist()
        must += stay(w[f"{layer}.weight"], torch.ones_like(w[f"{layer}.weight"], dtype=torch.bool), 0.4)
        seconds += [t] * w[f"{layer}.weight"].numel()
    mask = best(flat, seconds, must, 0.5, float(first.reply.total[REST]))
    assert torch.cat([one.seen[2].shared[f"mask/{layer}.weight"].flatten() for layer in MASKED]).tolist() == mask
    bill = one.fleet.account.bills[client]
    assert set(one.fleet.account.bills) == {client}
    assert bill.samples == 3 * 4 * 2
    assert bill.bytes_up > 3 * 4 * 486


def test_the_stage_waits_for_the_accuracy_and_ends_when_the_density_has_settled() -> None:
    one = made()
    _, told = one.play(replace(STAGE, start_accuracy=4.0), 0)  # more than all are right
    assert [type(seen.work) for seen in one.seen] == [Loss, Train] * 3
    assert "modelled_seconds" not in told[0]
    one = made()
    _, told = one.play(replace(STAGE, initial_iterations=1000, settled=2, settled_change=10.0), 0)
    assert told[0]["initial_iterations"] == 8
    one = made()
    _, told = one.play(replace(STAGE, initial_iterations=10, settled=9), 0)
    assert told[0]["initial_iterations"] == 10
    assert one.seen[-1].work.feeds[0].steps == 2


def test_the_accuracy_that_starts_it_is_in_units_of_a_guess() -> None:
    """Three classes: half of the images right are 1.5 guesses."""
    one = made()
    one.play(replace(STAGE, start_accuracy=0, initial_iterations=4), 0)
    seen = one.seen[0].reply.total
    share = float(seen["n/correct"] / seen["n/images"])
    for start, kind in ((3 * share - 1e-9, TrainAndSquare), (3 * share + 1e-9, Train)):
        one = made()
        one.play(replace(STAGE, start_accuracy=start, initial_iterations=4), 0)
        assert type(one.seen[1].work) is kind


# ---- the library's form


@pytest.mark.parametrize("kind", FLEETS)
def test_the_librarys_exchange_by_hand(kind) -> None:
    one = made(kind)
    method = PruneFL(form="library", density=0.45, adjust_every=2, stop_round=8, regrow=False)
    state = method.init(one.setting, None)
    assert sum(kept(state.shared).values()) + 36 == floor(0.45 * 522)
    one.fleet.open(1)
    state, _ = method.round(one.setting, state, one.fleet, 1)
    assert type(one.seen[-1].work) is Train
    one.fleet.open(2)
    after, told = method.round(one.setting, state, one.fleet, 2)
    mean, z = {}, {}
    for k, n in enumerate(SIZES):
        steps = batches(one, SLOW.feed(), k, 2, 0)
        w, _, squares = measured(state.shared, steps)
        for name in w:
            mean[name] = mean.get(name, 0) + n / 20 * w[name]
            z[name] = z.get(name, 0) + n * squares[name] / len(steps)
    moved = 0
    for layer in MASKED:
        name = f"{layer}.weight"
        mask = state.shared["mask/" + name].flatten().tolist()
        k = min(floor(0.1 * (1 + cos(pi * 2 / 8)) * sum(mask)), len(mask) - sum(mask))
        size, grown = z[name].flatten().tolist(), mean[name].flatten().tolist()
        enter = sorted((i for i, keeps in enumerate(mask) if not keeps), key=lambda i: -size[i])[:k]
        leave = sorted((i for i, keeps in enumerate(mask) if keeps), key=lambda i: abs(grown[i]))[:k]
        wanted = [(keeps and i not in leave) or i in enter for i, keeps in enumerate(mask)]
        assert after.shared["mask/" + name].flatten().tolist() == wanted
        moved += k
    assert told["weights_swapped"] == moved > 0
    assert kept(after.shared) == kept(state.shared)


def test_the_librarys_form_has_no_first_stage_and_rests_after_its_last_round() -> None:
    one = made()
    method = PruneFL(form="library", density=0.45, adjust_every=1, stop_round=3)
    first = kept(method.init(one.setting, None).shared)
    state, told = one.play(method, 6)
    assert told[0] == {}
    assert [bool(row.get("weights_swapped")) for row in told] == [False, True, True, False, False, False, False]
    assert kept(state.shared) == first


def test_where_no_gradient_is_measured_the_masks_stay() -> None:
    """All masks have the rate 0. Under a cap the largest share of what was kept stays; what must stay does in any case."""
    one = made()
    shared, _ = one.play(replace(PAPER, density=0.45, form="library"), 0)
    nothing = {f"grad/{layer}.weight": torch.zeros_like(shared.shared[f"w/{layer}.weight"]).double() for layer in MASKED}
    nothing |= {REST: torch.tensor(0.0), "n/images": torch.tensor(20.0)}
    after, _ = PAPER.reconfigured(one.setting, shared.shared, nothing, 2, 10.0)
    assert all(torch.equal(after[f"mask/{layer}.weight"], shared.shared[f"mask/{layer}.weight"]) for layer in MASKED)
    capped = replace(PAPER, max_density=0.4, density=0.4)
    fewer, _ = capped.reconfigured(one.setting, shared.shared, nothing, 2, 10.0)
    assert sum(kept(fewer).values()) + 36 == floor(0.4 * 522)
    assert all(bool((after[key] | ~mask).all()) for key, mask in under(fewer, "mask/").items())


# ---- what cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "other"}, "form"),
        ({"adjust_every": 0}, "adjust_every = 0: should be at least 1"),
        ({"prunable": 1.5}, "prunable = 1.5: should be from 0 to 1"),
        ({"constant_seconds": 0}, "constant_seconds = 0"),
        ({"max_density": 0.05}, "max_density = 0.05: should be at least density = 0.1"),
        ({"seconds_per_weight": [0.1, 0.0]}, r"seconds_per_weight = \[0.1, 0.0\]: each should be above 0"),
        ({"initial_every": 0}, "initial_every = 0"),
    ],
)
def test_fields_outside_of_their_ranges(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check({"method": {"name": "prunefl"} | fields})


def test_a_time_for_each_layer_and_a_weight_for_each_layer() -> None:
    setting = made().setting
    with pytest.raises(BadInput, match=r"seconds_per_weight has 2 numbers; 3 layers have masks \(conv2, fc1, fc2\)"):
        PruneFL(seconds_per_weight=(1.0, 2.0)).init(setting, None)
    for method in (PruneFL(max_density=0.5, density=0.07), PruneFL(form="library", density=0.07)):
        with pytest.raises(BadInput, match="conv1 stays dense"):
            method.init(setting, None)


ESTIMATED = {
    "rounds": 4,
    "data": {"name": "fake", "channels": 1, "image_size": 8, "classes": 4, "train_images": 120, "test_images": 40},
    "partition": {"clients": 4},
    "model": {"name": "cnn"},
    "train": {"batch": 16},
    "method": {"name": "prunefl", "adjust_every": 2},
}


def test_an_estimate_predicts_the_dense_model() -> None:
    """Its clients take no step, so that no gradient tells what to prune; what they would send is counted all the same."""
    rows = fedsim.estimate(ESTIMATED, progress=False)
    assert [row["density"] for row in rows] == [1.0] * 5
    assert rows[2]["bytes_up"] > 1.5 * rows[1]["bytes_up"]
