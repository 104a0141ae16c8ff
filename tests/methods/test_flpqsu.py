"""FL-PQSU: the quantiser, the cut, selective uploads and their bytes, against plain torch and hand numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, small, stored, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config.job import check
from fedsim.core.keys import BYTES, SCALES, SELECTED
from fedsim.core.tree import Tree, under
from fedsim.costs import communication
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, Scaffold
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.baselines.flpqsu import FLPQSU, quantised, restored
from fedsim.simulation import estimate
from fedsim.simulation.experiment import build_experiment

SIZES = [6, 9, 5]


def made(kind: type = SerialFleet) -> World:
    return world(stored(*drawn(SIZES)), kind=kind)


def by_hand(x: Tensor) -> Tensor:
    """To 8 bits and back, entry after entry."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    unit = float(torch.tensor((high - low) / 255).float()) if high > low else 1.0
    zero = round(-low / unit)
    values = [(min(max(round(float(v) / unit) + zero, 0), 255) - zero) * unit for v in x.flatten()]
    return torch.tensor(values, dtype=x.dtype).view(x.shape)


# ---- Q


CASES = {
    "positive": torch.linspace(0.5, 1.0, 50),
    "negative": -torch.linspace(0.1, 3.0, 50),
    "mixed": torch.linspace(-1.3, 2.1, 77),
    "constant": torch.full((5,), 0.7),
    "zero": torch.zeros(4),
}


@pytest.mark.parametrize("x", CASES.values(), ids=CASES)
def test_a_round_trip_errs_by_half_a_unit_at_most(x) -> None:
    bits = quantised({"w/a": x})
    back = restored(bits, {"w/a": x})["w/a"]
    assert bits[BYTES + "w/a"].dtype == torch.uint8
    assert float((back - x).abs().max()) <= float(bits[SCALES + "w/a"][0]) / 2 * (1 + 1e-4)
    assert torch.equal(back, by_hand(x))


def test_zero_stays_zero_and_rows_of_clients_are_restored_as_one() -> None:
    rows = [torch.tensor([[0.0, 1.0], [-2.0, 0.3]]), torch.tensor([[0.0, 5.0], [4.0, 1.0]])]
    each = [quantised({"w/a": row}) for row in rows]
    stacked = {key: torch.stack([one[key] for one in each]) for key in each[0]}
    back = restored(stacked, {"w/a": rows[0]})["w/a"]
    assert (back[:, 0, 0] == 0).all()
    assert torch.equal(back, torch.stack([by_hand(row) for row in rows]))


def test_a_tensor_in_8_bits_costs_a_byte_an_entry_and_8_more() -> None:
    bits = quantised({"w/a": torch.rand(3, 5)})
    payload, header = communication.encode(bits)
    assert len(payload) == communication.length(bits) == 15 + 8
    back = communication.decode(payload, header)
    assert back.keys() == bits.keys()
    assert all(torch.equal(back[key], value) for key, value in bits.items())


# ---- P


def test_filters_of_smallest_norm_are_cut_and_the_rest_is_the_masked_network() -> None:
    one, method = made(), FLPQSU(keep=0.5)
    state = method.init(one.setting, None)
    whole = dict(one.setting.net.initial)
    for layer, width, follower, each in (("conv1", 4, "conv2", 1), ("conv2", 6, "fc1", 4), ("fc1", 10, "fc2", 1)):
        norms = one.setting.net.initial[f"w/{layer}.weight"].abs().flatten(1).sum(1).tolist()
        stay = sorted(sorted(range(width), key=lambda place, norms=norms: -norms[place])[: width // 2])
        assert state.kept[layer].tolist() == stay
        columns = [place * each + position for place in range(width) if place not in stay for position in range(each)]
        whole[f"w/{follower}.weight"] = whole[f"w/{follower}.weight"].index_fill(1, torch.tensor(columns), 0.0)
    shared, _, net = method.deploy(one.setting, state, one.fleet, [])
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    assert net is not None
    torch.testing.assert_close(net(shared, x)[0], one.setting.net(whole, x)[0])
    assert shared["w/fc1.weight"].shape == (5, 12)


# ---- rounds


def narrow() -> nn.Module:
    """The small network with half of the channels."""
    layers: list[nn.Module] = [nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU()]
    layers += [nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).double()


PLACES = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4", "fc1": "7", "fc2": "9"}


def trained(one: World, tree: Tree, k: int, r: int) -> tuple[Tree, float]:
    """What client `k` ends with, and the loss of its last batch, by torch's own module and optimiser."""
    module, names = narrow().train(), {}
    for key in under(tree, "w/", "buf/"):
        layer, _, slot = key.partition("/")[2].partition(".")
        names[key] = f"{PLACES[layer]}.{slot}"
    module.load_state_dict({names[key]: value for key, value in tree.items()}, strict=False)
    optimiser, loss = torch.optim.SGD(module.parameters(), SLOW.lr, SLOW.momentum, weight_decay=SLOW.decay), torch.tensor(0.0)
    for x, y in batches(one, SLOW.feed(), k, r, 0):
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
    return {key: module.state_dict()[name] for key, name in names.items()}, loss.item()


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("options", [{}, {"quantise": False}, {"select": False}], ids=str)
def test_rounds_by_hand(kind, options) -> None:
    """Clients upload where the last batch's loss fell below that of their last upload; bytes are those of 8 bits, up for these alone."""
    one, method = made(kind), FLPQSU(**options)
    code: Any = by_hand if method.quantise else lambda x: x
    state = method.init(one.setting, None)
    tree, threshold, seen = dict(state.shared), [100.0] * 3, Counter()
    values, tensors = sum(value.numel() for value in tree.values()), len(tree)
    size = values + 8 * tensors if method.quantise else 4 * values
    for r in range(1, 7):
        one.fleet.open(r)
        state, found = method.round(one.setting, state, one.fleet, r)
        sent, uploaded = {key: code(value) for key, value in tree.items()}, []
        for k in range(3):
            after, loss = trained(one, sent, k, r)
            bill = one.fleet.account.bills[k]
            assert bill.bytes_down == size
            if not method.select or loss < threshold[k]:
                uploaded.append({key: code(value) for key, value in after.items()})
                threshold[k] = loss
                assert bill.bytes_up == size
            else:
                assert bill.bytes_up == 0
        seen[len(uploaded)] += 1
        assert found["uploads"] == len(uploaded)
        if uploaded:
            tree = {key: sum(each[key] for each in uploaded) / len(uploaded) for key in tree}
        for key, value in tree.items():
            torch.testing.assert_close(state.shared[key], value, rtol=1e-5, atol=1e-6)
    assert (len(seen) > 1) == method.select  # else nothing was selected


@pytest.mark.parametrize("kind", FLEETS)
def test_where_nobody_uploads_the_server_keeps_its_model(kind) -> None:
    one, method = made(kind), FLPQSU(first_threshold=1e-9)
    state = method.init(one.setting, None)
    one.fleet.open(1)
    after, found = method.round(one.setting, state, one.fleet, 1)
    assert found["uploads"] == 0
    assert not one.seen[-1].reply.each[SELECTED].any()
    assert all(torch.equal(value, after.shared[key]) for key, value in state.shared.items())
    assert {bill.bytes_up for bill in one.fleet.account.bills.values()} == {0}


def test_an_estimate_has_every_client_upload_in_every_round() -> None:
    """Bytes of the cut network, and 8 more for each of its 4 weights and 2 biases."""
    data = {"name": "fake", "channels": 1, "image_size": 8, "classes": 4, "train_images": 160, "test_images": 40}
    model = {"name": "cnn", "width": 4, "norm": "none"}
    job = {"rounds": 3, "data": data, "partition": {"clients": 4}, "model": model, "method": {"name": "flpqsu"}}
    small = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.Linear(16, 64), nn.Linear(64, 4)])
    entries = [value.numel() for value in small.parameters()]
    rows = list(estimate.rows(build_experiment(check(job))))
    assert [row.values["bytes_up"] for row in rows] == [0] + 3 * [4 * (sum(entries) + 8 * len(entries))]


# ---- what cannot be


@pytest.mark.parametrize("aggregate", [FedNova(0.9), Scaffold(0.1)], ids=["fednova", "scaffold"])
def test_an_aggregation_that_is_no_plain_mean_is_refused(aggregate) -> None:
    with pytest.raises(BadInput, match='use aggregate = "fedavg" or "fedprox"'):
        FLPQSU().init(replace(made().setting, aggregate=aggregate), None)


def test_a_model_without_channels_and_a_share_of_nothing_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^\[model\]"):
        FLPQSU().init(world(stored(*drawn(SIZES)), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))).setting, None)
    with pytest.raises(ValueError, match=r"keep = 0\.0: should be above 0"):
        FLPQSU(keep=0.0)
    assert [len(index) for index in FLPQSU(keep=0.01).init(world(stored(*drawn(SIZES)), small()).setting, None).kept.values()] == [1, 1, 1]
