"""FedDIP: its penalty and schedules, a round by hand, the dense weights that the server holds, what is charged, and what cannot be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from math import floor

import pytest
import torch
from plain_training import FREE, SIZES, WEIGHTS, by_hand, plain
from small_federation import FLEETS, World, drawn, kept, stored, world
from torch import Tensor, nn

from fedsim.config.job import check
from fedsim.core.tree import under
from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.methods.baselines.feddip import FedDIP, TrainWithNorms
from fedsim.methods.fedavg import FedAvg
from fedsim.simulation.experiment import build_experiment

SGD = LocalTraining(batch=4, epochs=2, lr=0.1)
METHOD = FedDIP(density=0.3, first_density=0.6, reconfigure_every=2, penalty=0.2, segments=3)
LAYERS = ("conv2", "fc1", "fc2")


def made(sizes: list[int], kind: type = FLEETS[0], rounds: int = 5, module: nn.Module | None = None) -> World:
    one = world(stored(*drawn(sizes)), module or plain(), kind, SGD)
    return replace(one, setting=replace(one.setting, rounds=rounds))


# ---- the penalty


def test_the_gradient_of_the_penalty_is_that_of_the_norms_and_0_at_0() -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"w/{layer}.weight": torch.randn(4, 3, generator=generator, dtype=torch.float64) for layer in "ab"}
    state |= {"w/c.weight": torch.zeros(2, 2), "w/a.bias": torch.ones(4)}
    found = TrainWithNorms((SGD.feed(),), 0.1, strength=0.3, layers=("a", "b", "c", "frozen")).pulls(state)
    leaves = {key: state[key].clone().requires_grad_() for key in ("w/a.weight", "w/b.weight")}
    (0.3 * sum(torch.linalg.vector_norm(leaf) for leaf in leaves.values())).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(found[key], leaf.grad)
    assert found.keys() == {"w/a.weight", "w/b.weight", "w/c.weight"}
    assert torch.equal(found["w/c.weight"], torch.zeros(2, 2))


def test_the_penalty_grows_over_equal_parts_of_the_rounds() -> None:
    method = FedDIP()
    found = [method.penalty_at(r, 40) for r in range(1, 41)]
    assert found[:2] == [0, 0]
    assert found[2:4] == [5e-4, 5e-4]
    assert found[-2:] == pytest.approx([1e-3, 1e-3])
    steps = [later - one for one, later in zip(found[2::2], found[4::2], strict=False)]
    assert steps == pytest.approx([5e-4 / 18] * 18)
    assert [replace(method, segments=1).penalty_at(r, 3) for r in (1, 2, 3)] == [0, 0, 0]
    assert [replace(method, segments=2).penalty_at(r, 2) for r in (1, 2)] == [0, 5e-4]
    assert {method.penalty_at(r, 10) for r in (1, 2)} == {0, 5e-4 * (1 + 1 / 18)}  # fewer rounds than segments pass some over


# ---- rounds


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_rounds_by_hand(kind, mu) -> None:
    """Masked training with the penalty; the server's dense weights; every second round a ranking of them all."""
    sizes = [6, 9, 5]
    one = made(sizes, kind)
    one = replace(one, setting=replace(one.setting, aggregate=FedProx(mu)))
    state, came_back = METHOD.init(one.setting, None), 0
    dense = {f"{layer}.weight": one.setting.net.initial[f"w/{layer}.weight"].clone() for layer in LAYERS}
    for r, strength in ((1, 0.0), (2, 0.0), (3, 0.1), (4, 0.1), (5, 0.2)):
        one.fleet.open(r)
        before = state.shared
        start = {key[2:]: value for key, value in under(before, "w/").items()}

        def penalty(used: dict[str, Tensor], strength=strength, start=start) -> Tensor:
            near = sum((value - start[name]).square().sum() for name, value in used.items())
            return strength * sum(used[f"{layer}.weight"].norm() for layer in LAYERS) + mu / 2 * near

        mean, _ = by_hand(one, before, r, sizes, penalty)
        state, told = METHOD.round(one.setting, state, one.fleet, r)
        assert told["norm_penalty"] == pytest.approx(strength)
        hidden = {name: before[f"mask/{name}"] for name in dense}
        dense = {name: torch.where(hidden[name], mean[name], value) for name, value in dense.items()}
        if r in (2, 4, 5):
            density = 0.3 + 0.3 * (1 - r / 5) ** 3
            left = floor(density * WEIGHTS + 1e-9) - SIZES["conv1"]
            least = torch.cat([value.abs().flatten() for value in dense.values()]).sort(descending=True).values[left - 1 : left + 1].mean()
            came_back += sum(int(((value.abs() > least) & ~hidden[name]).sum()) for name, value in dense.items())
            hidden = {name: value.abs() > least for name, value in dense.items()}
            assert sum(int(mask.sum()) for mask in hidden.values()) == left
        for name, value in dense.items():
            assert torch.equal(state.shared[f"mask/{name}"], hidden[name]), (name, r)
            torch.testing.assert_close(state.shared[f"w/{name}"], value * hidden[name], rtol=0, atol=2e-7)
        torch.testing.assert_close(state.shared["w/conv1.weight"], mean["conv1.weight"], rtol=0, atol=2e-7)
    assert came_back > 10
    assert sum(kept(state.shared).values()) + SIZES["conv1"] == floor(0.3 * WEIGHTS)


def test_a_weight_that_returns_has_the_value_it_had_when_it_was_pruned() -> None:
    one, method = made([6, 9, 5]), replace(METHOD, penalty=0.0)
    first = method.init(one.setting, None)
    state, _ = one.play(method, 2)
    back = 0
    for layer in LAYERS:
        key = f"{layer}.weight"
        new = state.shared[f"mask/{key}"] & ~first.shared[f"mask/{key}"]
        assert torch.equal(state.shared[f"w/{key}"][new], one.setting.net.initial[f"w/{key}"][new])
        back += int(new.sum())
    assert back > 10


def test_the_first_mask_is_drawn_in_the_layer_densities_of_the_first_density() -> None:
    one = made([6])
    masks, other = (under(METHOD.init(replace(one.setting, seed=seed), None).shared, "mask/") for seed in (0, 1))
    assert sum(int(mask.sum()) for mask in masks.values()) + SIZES["conv1"] == floor(0.6 * WEIGHTS)
    raw = {"conv2": 4 + 6 + 3 + 3, "fc1": 24 + 10}  # kept weights of layers that are not dense are in proportion to these
    assert int(masks["mask/conv2.weight"].sum()) / int(masks["mask/fc1.weight"].sum()) == pytest.approx(raw["conv2"] / raw["fc1"], abs=0.02)
    assert bool(masks["mask/fc2.weight"].all())
    assert not torch.equal(masks["mask/conv2.weight"], other["mask/conv2.weight"])


@pytest.mark.parametrize("kind", FLEETS)
def test_without_penalty_and_pruning_it_is_federated_averaging_to_the_bit(kind) -> None:
    """Also where layers draw: the draws of local training are the same."""
    *first, last = plain().named_children()
    module, ends = nn.Sequential(OrderedDict([*first, ("drop", nn.Dropout(0.3)), last])), []
    for method in (FedDIP(density=1.0, first_density=1.0, reconfigure_every=1, penalty=0.0), FedAvg()):
        state, _ = made([6, 9, 5], kind, module=module).play(method, 3)
        ends.append(under(state.shared, "w/"))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("aggregate", [FedNova(0.0), Scaffold(0.1)])
def test_every_aggregation_trains_under_new_masks(aggregate) -> None:
    one = made([6, 9, 5])
    one = replace(one, setting=replace(one.setting, aggregate=aggregate))
    state, _ = one.play(METHOD, 5)
    for key, mask in under(state.shared, "mask/").items():
        assert bool(state.dense["w/" + key[5:]].isfinite().all())
        assert torch.equal(state.shared["w/" + key[5:]], state.dense["w/" + key[5:]] * mask)


# ---- costs


def test_bytes_and_flops_by_hand() -> None:
    """Kept and free values both ways, positions once; 2 f_S + f_D, or 3 f_S, for the same weights."""
    ends, bills = [], []
    for dense in (True, False):
        one, method = made([6]), replace(METHOD, dense_gradients=dense)
        state = method.init(one.setting, None)
        one.fleet.open(1)
        after, _ = method.round(one.setting, state, one.fleet, 1)
        ends.append(after.shared)
        bills.append(one.fleet.account.bills[0])
    held = kept(ends[0])
    nnz = sum(held.values()) + SIZES["conv1"]
    positions = sum(min(4 * k, -(-SIZES[layer] // 8), 4 * (SIZES[layer] - k)) for layer, k in held.items())
    assert [bill.bytes_up for bill in bills] == [4 * (nnz + FREE)] * 2
    assert [bill.bytes_down for bill in bills] == [4 * (nnz + FREE) + positions] * 2
    places = {"conv1": 16, "conv2": 4, "fc1": 1, "fc2": 1}  # outputs of a filter, of 4 × 4 images
    spent = {layer: 2 * places[layer] * size for layer, size in SIZES.items()}
    sparse = sum(2 * places[layer] * held.get(layer, size) for layer, size in SIZES.items())
    images = 2 * 6
    assert bills[1].train_flops == images * 3 * sparse
    assert bills[0].train_flops == images * (2 * sparse + sum(spent.values()))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# ---- what cannot be


def small(method: dict) -> dict:
    data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 80, "test_images": 20}
    return {"data": data, "partition": {"clients": 4}, "method": {"name": "feddip"} | method}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_density": 0.05}, "first_density = 0.05: should be at least density = 0.1"),
        ({"first_density": 1.5}, "first_density = 1.5: should be above 0 and at most 1"),
        ({"reconfigure_every": 0}, "reconfigure_every = 0: should be at least 1"),
        ({"penalty": -1.0}, "penalty = -1.0: should be at least 0"),
        ({"segments": 0}, "segments = 0: should be at least 1"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        check(small(fields))


def test_a_final_density_below_a_weight_a_layer_is_refused_at_the_start() -> None:
    parts = build_experiment(check(small({"density": 1e-4})))
    with pytest.raises(BadInput, match=r"\[method\] density = 0.0001 leaves 0 of .* Take at least"):
        parts.method.init(parts.setting, None)
