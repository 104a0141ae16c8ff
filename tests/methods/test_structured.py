"""Structured baselines: which channels stay, by brute force from the rules, and the one cut that they make."""

from __future__ import annotations

import re
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from gated_federation import FULL, SGD, SHAPE, WIDTHS, batches, by_hand, cost, gated, module_of, same
from small_federation import FLEETS, World
from torch import Tensor

import fedsim
from fedsim.core.keys import COUNT
from fedsim.core.tree import under
from fedsim.core.types import Feed
from fedsim.errors import BadInput
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.structured import State, Structured

SIZES = (9, 11, 5)  # with batches of 4 their last ones hold 1, 3 and 1


def small(kind: type = SerialFleet, rounds: int = 4, **options: Any) -> World:
    return gated(SIZES, kind=kind, holdout=0.0, rounds=rounds, **options)


def share(gate: Tensor) -> float:
    return float(cost(gate)) / FULL


def of_counts(counts: list[int]) -> float:
    return share(torch.cat([torch.arange(width) < count for width, count in zip(WIDTHS, counts, strict=True)]))


def chosen(method: Structured, made: World, shared: Any = None) -> Tensor:
    """(28,)"""
    return method.chosen(made.setting, shared or made.setting.net.initial, made.fleet, 2)


def counts_of(gate: Tensor) -> list[int]:
    return [int(part.sum()) for part in gate.split(WIDTHS)]


def importance(made: World, shared: Any, power: int, over: str = "sum") -> Tensor:
    """(28,) on one machine, over all clients' training images in one batch: the mean of sums (or means) over positions."""
    feed = Feed("train", epochs=1, batch=100, augment=False)
    x = torch.cat([x for k in range(len(SIZES)) for x, _ in batches(made, feed, k, 0)])
    module, found = by_hand(module_of(), shared).eval(), []
    for stage in (1, 2, 3):
        relu = module.get_submodule(f"layer{stage}.0.relu1")
        relu.register_forward_hook(lambda _, __, out: found.append(getattr(out.abs() ** power, over)((2, 3)).mean(0)))
    module(x)
    return torch.cat(found).detach()


# ---- uniform and random


@pytest.mark.parametrize("keep", [0.19, 0.3, 0.45, 0.5, 0.77, 0.99, 1.0])
def test_uniform_keeps_the_largest_share_of_every_layer_that_fits(keep) -> None:
    """Of all shares on a fine grid: none that fits costs more."""
    made = small()
    counts = counts_of(chosen(Structured(flops_share=keep), made))
    grid = [[max(1, round(i / 960 * width)) for width in WIDTHS] for i in range(961)]
    fitting = [of_counts(one) for one in grid if of_counts(one) <= keep + 1e-12]
    assert of_counts(counts) == max(fitting)
    assert counts in grid
    larger = [one for one in grid if all(a >= b for a, b in zip(one, counts, strict=True)) and one != counts]
    assert all(of_counts(one) > keep for one in larger)


def test_uniform_keeps_the_filters_of_largest_l1_norm_and_random_as_many() -> None:
    made = small()
    gate, other = chosen(Structured(flops_share=0.5), made), chosen(Structured(flops_share=0.5, choice="random"), made)
    for stage, part in zip((1, 2, 3), (part.tolist() for part in gate.split(WIDTHS)), strict=True):
        norms = [float(row.abs().sum()) for row in made.setting.net.initial[f"w/layer{stage}.0.conv1.weight"]]
        stay, go = ([n for n, kept in zip(norms, part, strict=True) if kept is which] for which in (True, False))
        assert min(stay) > max(go)
    assert counts_of(gate) == counts_of(other)
    assert not torch.equal(gate, other)
    assert torch.equal(other, chosen(Structured(flops_share=0.5, choice="random"), small()))
    seeded = small()
    seeded.setting = replace(seeded.setting, seed=7)
    assert not torch.equal(other, chosen(Structured(flops_share=0.5, choice="random"), seeded))


# ---- by features


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize(("norm", "power", "over"), [("l2", 2, "sum"), ("l1", 1, "sum"), ("l2", 2, "mean")])
def test_importance_is_that_of_one_machine_on_the_pooled_images(kind, norm, power, over) -> None:
    made = small(kind)
    found = Structured(choice="fl1", norm=norm, over=over)._importance(made.setting, made.setting.net.initial, made.fleet, 2)
    assert torch.allclose(found, importance(made, made.setting.net.initial, power, over), atol=1e-9)
    (seen,) = made.seen
    assert float(seen.reply.total[COUNT]) == sum(SIZES)
    assert not any(feed.augment for feed in seen.work.feeds)
    assert {bill.bytes_up for bill in made.fleet.account.bills.values()} == {4 * 28}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("keep", "size"), [(0.5, 1), (0.5, 3), (0.7, 2), (0.3, 5), (0.25, 10)])
def test_the_smallest_features_go_so_many_at_a_time_until_the_target_holds(keep, size, strict) -> None:
    """By brute force: channels in rising order, the best of a layer left out of it; one step less would not hold."""
    made = small()
    gate = chosen(Structured(choice="fl1", flops_share=keep, prune_size=size, strict=strict), made)
    score = importance(made, made.setting.net.initial, 2)
    best = {place + int(part.argmax()) for place, part in zip((0, 4, 12), score.split(WIDTHS), strict=True)}
    order = sorted((i for i in range(28) if i not in best), key=lambda i: float(score[i]))

    def holds(gate: Tensor) -> bool:
        return share(gate) <= keep if strict else 2 * log(share(gate) / keep) <= 0.05

    left, steps = torch.ones(28, dtype=torch.bool), 0
    while not holds(left):
        left[order[steps * size : (steps + 1) * size]] = False
        steps += 1
    assert torch.equal(gate, left)
    assert holds(gate)
    gate[order[(steps - 1) * size : steps * size]] = True
    assert not holds(gate)
    assert not left[order[0]]  # the very smallest goes
    assert all(left[i] for i in best)


def test_a_layer_whose_channels_are_all_dead_keeps_one() -> None:
    """Equal importances are no reason to keep all of them."""
    made = small()
    shared = dict(made.setting.net.initial)
    shared["w/layer3.0.norm1.weight"] = torch.zeros(16, dtype=torch.float64)
    shared["w/layer3.0.norm1.bias"] = torch.full((16,), -1.0, dtype=torch.float64)
    gate = chosen(Structured(choice="fl1", flops_share=0.25, prune_size=1), made, shared)
    assert share(gate) <= 1.026 * 0.25


# ---- the one cut


@pytest.mark.parametrize("choice", ["uniform", "random", "fl1"])
def test_dense_rounds_one_cut_and_fine_tuning_of_what_is_left(choice) -> None:
    made = small(training=replace(SGD, batch=3))
    method = Structured(choice=choice, flops_share=0.5, prune_size=1)
    state, told = made.play(method, 4)
    assert [type(seen.work).__name__ for seen in made.seen if seen.r == 2] == ["TrainGated", *["Energy"] * (choice == "fl1")]
    training = [seen for seen in made.seen if type(seen.work).__name__ == "TrainGated"]
    assert [bool(seen.own) for seen in training] == [False] * 4
    small_net = made.setting.net.cut(state.kept)
    assert [seen.net for seen in training] == [None, None, small_net, small_net]
    assert method.deploy(made.setting, state, made.fleet, [0])[2] is small_net
    assert under(training[1].shared, "opt/")
    assert not under(training[2].shared, "opt/")  # an optimiser that has taken no step
    gate = made.setting.net.channels.gate(state.kept)
    assert told[2]["base_flops_share"] == pytest.approx(share(gate))
    assert share(gate) <= 0.5 * (1.026 if choice == "fl1" else 1)
    total = training[1].reply.total
    dense = {key: value / total[COUNT] for key, value in under(total, "w/").items()}
    assert same(under(training[2].shared, "w/"), made.setting.net.channels.cut(dense, state.kept))
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gated_net = by_hand(module_of(), dense, gate, gate)
    assert torch.allclose(small_net(training[2].shared, x)[0], gated_net(x), atol=1e-5)


def test_before_the_cut_every_choice_trains_alike() -> None:
    ends = [small().play(Structured(choice=choice), 1)[0] for choice in ("uniform", "random", "fl1")]
    assert all(same(ends[0].shared, other.shared) for other in ends[1:])
    assert isinstance(ends[0], State)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"flops_share": 0.1},
            f"[method] flops_share = 0.1 cannot be reached: with one channel left in every group the model still has"
            f" {of_counts([1, 1, 1]):.4f}",
        ),
        ({"cotrain": 5}, "cotrain = 5: the cut comes after the last of 4 rounds"),
    ],
)
def test_what_is_refused(fields, said) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        Structured(**fields).init(small().setting, None)


def test_epochs_will_do() -> None:
    made = small(training=replace(SGD, steps=0, epochs=1, batch=3))
    assert made.play(Structured(), 4)[0].kept


def test_the_share_that_a_refusal_names_can_be_reached() -> None:
    """cnn of width 4 on 8x8 images: 0.07522 of the FLOPs is the least, so that 0.0752 would be refused again."""
    data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 40, "test_images": 10}
    job = {"rounds": 2, "data": data, "partition": {"clients": 2}, "model": {"width": 4}, "method": {"name": "structured"}}
    with pytest.raises(BadInput) as refused:
        fedsim.estimate(job, set={"method.flops_share": 0.001}, progress=False)
    (least,) = re.findall(r"choose (\S+) to 1", str(refused.value))
    assert fedsim.estimate(job, set={"method.flops_share": float(least)}, progress=False)
