"""HeteroFL: nested widths, means over owners, scaler, static norms and masked classes, against sub-networks written out in plain torch."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, small, stored, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.keys import COUNT, COVER, GATE, OWNED_CLASSES, WIDTH_RATE
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.federated.protocol import ClientInput
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.baselines.heterofl import HeteroFL
from fedsim.methods.fedavg import FedAvg
from fedsim.nn.layers.standardized_conv import StandardisedConv2d
from fedsim.nn.net import Net
from fedsim.pruning.nested_widths import TrainNested, mean_over_owners, nested

SIZES = [6, 9, 5]
RATES = (0.5, 1.0, 0.3)  # a whole network after a narrow one, in the same pack
MISSING = 1  # the class that the last client has no image of


def made(kind: type = SerialFleet, sizes: list[int] = SIZES) -> World:
    x, y, owners = drawn(sizes)
    y[owners == len(sizes) - 1] = torch.tensor([0, 2, 2, 0, 0])[: sizes[-1]]
    y[:3], y[sizes[0] : sizes[0] + 3] = torch.arange(3), torch.arange(3)  # the others have all three
    return world(stored(x, y, owners), kind=kind)


class Given(HeteroFL):
    """Every client has the rate of its number, in the place of a drawn one."""

    def rates_of(self, setting: Any, clients: Any, r: int) -> Tensor:
        return torch.tensor([RATES[client] for client in clients], dtype=torch.float64)


# ---- a sub-network by hand


def part(tree: Tree, rate: float) -> dict[str, Tensor]:
    """The first channels of the small network: of 4, 6 and 10."""
    c, d, h = (ceil(rate * width) for width in (4, 6, 10))
    w = {key[2:]: value for key, value in under(tree, "w/").items()}
    cut = {"conv1.weight": w["conv1.weight"][:c], "conv2.weight": w["conv2.weight"][:d, :c]}
    cut |= {f"norm1.{slot}": w[f"norm1.{slot}"][:c] for slot in ("weight", "bias")}
    cut |= {f"norm2.{slot}": w[f"norm2.{slot}"][:d] for slot in ("weight", "bias")}
    cut |= {"fc1.weight": w["fc1.weight"][:h, : 4 * d], "fc1.bias": w["fc1.bias"][:h]}
    return cut | {"fc2.weight": w["fc2.weight"][:, :h], "fc2.bias": w["fc2.bias"]}


def logits(w: dict[str, Tensor], x: Tensor, by: float, seen: list[tuple[Tensor, Tensor]] | None = None, held: Any = None) -> Tensor:
    """In training mode; `seen` collects mean and variance of what the norms see, `held` gives those that they use."""
    for i, stride in ((1, 1), (2, 2)):
        x = F.conv2d(x, w[f"conv{i}.weight"], None, stride, 1) / by
        mean, var = held[i - 1] if held else (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        if seen is not None:
            seen.append((mean.detach(), x.var((0, 2, 3)).detach()))
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        x = (x * w[f"norm{i}.weight"].view(-1, 1, 1) + w[f"norm{i}.bias"].view(-1, 1, 1)).relu()
    x = (F.linear(x.flatten(1), w["fc1.weight"], w["fc1.bias"]) / by).relu()
    return F.linear(x, w["fc2.weight"], w["fc2.bias"])


def trained(one: World, tree: Tree, k: int, r: int, by: float, owned: list[int], mu: float = 0.0) -> dict[str, Tensor]:
    """What client `k` ends with, by torch.optim.SGD."""
    begin = part(tree, RATES[k])
    w = {key: value.clone().requires_grad_() for key, value in begin.items()}
    optimiser = torch.optim.SGD(w.values(), SLOW.lr, SLOW.momentum, weight_decay=SLOW.decay)
    for x, y in batches(one, SLOW.feed(), k, r, 0):
        optimiser.zero_grad()
        out = logits(w, x, by)
        absent = torch.tensor([place not in owned for place in range(3)])
        loss = F.cross_entropy(out.masked_fill(absent, 0.0), y)
        (loss + mu / 2 * sum((w[key] - begin[key]).square().sum() for key in w)).backward()
        optimiser.step()
    return {key: value.detach() for key, value in w.items()}


def averaged(tree: Tree, clients: list[dict[str, Tensor]], weights: list[int], owned: list[list[int]]) -> Tree:
    """Coordinate after coordinate."""
    found = {}
    for key, old in under(tree, "w/").items():
        new = old.clone()
        for place in torch.cartesian_prod(*(torch.arange(size) for size in old.shape)).view(-1, old.dim()).tolist():
            has = [
                (float(w[key[2:]][tuple(place)]), n)
                for w, n, mine in zip(clients, weights, owned, strict=True)
                if all(at < size for at, size in zip(place, w[key[2:]].shape, strict=True)) and (key[2:5] != "fc2" or place[0] in mine)
            ]
            if has:
                new[tuple(place)] = sum(value * n for value, n in has) / sum(n for _, n in has)
        found[key] = new
    return found


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("options", [{}, {"scaler": False, "mask_classes": False, "weights": "samples"}, {"mu": 0.5}], ids=str)
def test_two_rounds_by_hand(kind, options) -> None:
    mu, fields = options.get("mu", 0.0), {key: value for key, value in options.items() if key != "mu"}
    one, method = made(kind), Given(rates=RATES, **fields)
    one = replace(one, setting=replace(one.setting, aggregate=FedProx(mu))) if mu else one
    owned = [[0, 1, 2], [0, 1, 2], [0, 2] if method.mask_classes else [0, 1, 2]]
    state, tree = method.init(one.setting, None), one.setting.net.initial
    one.fleet.open(0)
    state, _ = method.round(one.setting, state, one.fleet, 0)
    for r in (1, 2):
        one.fleet.open(r)
        state, found = method.round(one.setting, state, one.fleet, r)
        clients = [trained(one, tree, k, r, RATES[k] if method.scaler else 1.0, owned[k], mu) for k in range(3)]
        tree = averaged(tree, clients, SIZES if method.weights == "samples" else [1, 1, 1], owned)
        for key, value in tree.items():
            torch.testing.assert_close(state.shared[key], value, rtol=1e-6, atol=1e-7)
    assert found["mean_width_rate"] == pytest.approx(0.6)
    assert found["untouched_share"] == 0  # one client has the whole network
    assert under(state.shared, "buf/") == {}


@pytest.mark.parametrize("kind", FLEETS)
def test_full_widths_are_fedavg_with_equal_weights(kind) -> None:
    one, other = made(kind, [5, 5, 5]), made(kind, [5, 5, 5])
    mine, _ = one.play(HeteroFL(rates=(1.0,), mask_classes=False), 2)
    theirs, _ = other.play(FedAvg(), 2)
    for key, value in under(theirs.shared, "w/").items():
        torch.testing.assert_close(mine.shared[key], value)


# ---- means over owners


def test_three_clients_of_constant_values() -> None:
    """Rates 1, 1/2 and 1/4, values 1, 2 and 3; the third has no image of the second class."""
    net = Net(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    total: Tree = {}
    for rate, value in ((1.0, 1.0), (0.5, 2.0), (0.25, 3.0)):
        own = {WIDTH_RATE: torch.tensor(rate, dtype=torch.float64), OWNED_CLASSES: torch.tensor([True, value < 3])}
        sent = ClientInput(net.initial, own, {}, torch.tensor(7), torch.tensor([1]), torch.tensor(0))
        work = TrainNested((Feed(epochs=1),), 0.1, classifier="3")
        state = {key: torch.full_like(w, value) if key[:2] == "w/" else w for key, w in work.init_state(net, sent).items()}
        for key, part_of in work.finish(net, sent, state).total.items():
            total[key] = total.get(key, 0) + part_of
    found = mean_over_owners(total, net.initial)
    assert found["w/1.bias"].tolist() == [2, 1.5, 1, 1]
    assert found["w/3.bias"].tolist() == [2, 1.5]
    assert found["w/3.weight"].tolist() == [[2, 1.5, 1, 1], [1.5, 1.5, 1, 1]]
    assert float(total[COUNT]) == 21


def test_what_no_client_has_keeps_its_value() -> None:
    like = {"w/a": torch.tensor([5.0, 6.0])}
    total = {"w/a": torch.tensor([8.0, 0.0], dtype=torch.float64), COVER + "w/a": torch.tensor([2.0, 0.0], dtype=torch.float64)}
    assert mean_over_owners(total, like)["w/a"].tolist() == [4, 6]


@pytest.mark.parametrize(
    ("width", "rate", "count"), [(4, 0.5, 2), (10, 0.3, 3), (6, 0.3, 2), (8, 0.0625, 1), (7, 0.5, 4), (100, 0.29, 29), (8, 1e-11, 1)]
)
def test_the_first_channels_rounded_up(width, rate, count) -> None:
    assert nested([3, width], torch.tensor([1.0, rate], dtype=torch.float64))[1, 3:].tolist() == [True] * count + [False] * (width - count)


def test_a_sub_network_is_the_whole_one_with_zeros_elsewhere() -> None:
    net = Net(small())
    gate, x = nested([4, 6, 10], torch.tensor(0.5)), torch.rand(5, 1, 4, 4)
    alone, _ = net(net.initial | {GATE: gate}, x)
    embedded = {key: torch.zeros_like(value) for key, value in under(net.initial, "w/").items()}
    for key, value in part(net.initial, 0.5).items():
        embedded[f"w/{key}"][tuple(slice(size) for size in value.shape)] = value
    torch.testing.assert_close(alone, net(net.initial | embedded, x)[0])
    for key, covered in net.channels.cover(under(net.initial, "w/"), gate).items():
        assert torch.equal(covered & (net.initial[key] != 0), embedded[key] != 0), key


# ---- rates


def test_fixed_rates_stay_and_dynamic_ones_change() -> None:
    setting, clients = made().setting, list(range(200))
    fixed, dynamic = HeteroFL(), HeteroFL(assignment="dynamic")
    assert torch.equal(fixed.rates_of(setting, clients, 1), fixed.rates_of(setting, clients, 2))
    assert not torch.equal(dynamic.rates_of(setting, clients, 1), dynamic.rates_of(setting, clients, 2))
    for method in (fixed, dynamic):
        drawn_rates = method.rates_of(setting, clients, 3)
        assert set(drawn_rates.tolist()) == set(method.rates)
        assert float(drawn_rates[17]) == float(method.rates_of(setting, [17], 3)[0])
        assert all(20 < int((drawn_rates == rate).sum()) < 60 for rate in method.rates)


# ---- what clients use in the end


@pytest.mark.parametrize("kind", FLEETS)
def test_the_clients_own_networks_by_hand(kind) -> None:
    """Statistics of all clients' batches by images at the client's width, under the scaler; absent classes have logits of 0."""
    one, method = made(kind), Given(rates=RATES)
    state, _ = one.play(method, 1)
    shared, own, net = method.deploy(one.setting, state, one.fleet, [0, 1, 2])
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    feed = Feed("probe", epochs=1, batch=SLOW.batch, augment=False)
    for k, rate in [*enumerate(RATES), (None, 1.0)]:
        w, sums, n = part(state.shared, rate), [0, 0, 0, 0], 0
        for client in range(3):
            for images, _ in batches(one, feed, client, 1, 0):
                seen: list[tuple[Tensor, Tensor]] = []
                logits(w, images, rate, seen)
                sums, n = [old + len(images) * new for old, new in zip(sums, [*seen[0], *seen[1]], strict=True)], n + len(images)
        mean1, var1, mean2, var2 = (value / n for value in sums)
        expected = logits(w, x, rate, held=[(mean1, var1), (mean2, var2)])
        mine = {} if k is None else {key: value[k] for key, value in own.items()}
        if k == 2:
            expected[:, MISSING] = 0
        sent = ClientInput(shared, mine, {}, torch.tensor(1), torch.tensor([1]), torch.tensor(0))
        torch.testing.assert_close(one.setting.net(method.model_of(one.setting.net, sent), x)[0], expected)
    assert net is None
    assert n == sum(SIZES)


def test_statistics_are_gathered_as_often_as_asked_and_after_the_last_round() -> None:
    one = made()
    _, method = one.play(Given(rates=RATES), 0), Given(rates=RATES, statistics_every=4)
    state, when = method.init(one.setting, None), []
    for r in range(one.setting.rounds + 1):
        one.seen.clear()
        one.fleet.open(r)
        state, _ = method.round(one.setting, state, one.fleet, r)
        when += [r] if any(type(each.work).__name__ == "GatherStatistics" for each in one.seen) else []
    assert when == [4, 8, 10]
    assert len(state.statistics) == 3


# ---- costs


def test_only_the_sub_network_travels() -> None:
    """Four bytes for each of its parameters, in both directions; neither gates nor positions."""
    one, method = made(), Given(rates=RATES)
    one.play(method, 1)
    for k, rate in enumerate(RATES):
        c, d, h = (ceil(rate * width) for width in (4, 6, 10))
        parameters = 9 * c + 2 * c + 9 * c * d + 2 * d + 4 * d * h + h + 3 * h + 3
        bill = one.fleet.account.bills[k]
        assert bill.bytes_up == bill.bytes_down == 4 * parameters
    one.play(Given(rates=RATES, static_norm=False, scaler=False), 1)
    for k, rate in enumerate(RATES):
        c, d, h = (ceil(rate * width) for width in (4, 6, 10))
        bill, both = one.fleet.account.bills[k], 9 * c + 4 * c + 9 * c * d + 4 * d + 4 * d * h + h + 3 * h + 3
        assert bill.bytes_up == bill.bytes_down == 4 * both


def test_a_narrow_client_computes_and_holds_less() -> None:
    one = made(sizes=[5, 5, 5])
    one.play(Given(rates=RATES), 1)
    half, whole, least = (one.fleet.account.bills[k] for k in range(3))
    assert whole.train_flops > half.train_flops > least.train_flops
    for term in ("weights", "gradients", "optimiser", "activations"):
        assert whole.memory_terms[term] > half.memory_terms[term] > least.memory_terms[term], term
    for bill, (c, d, h) in ((whole, (4, 6, 10)), (half, (2, 3, 5)), (least, (2, 2, 3))):  # nothing of a closed channel, its scale neither
        trained = 9 * c + 2 * c + 9 * c * d + 2 * d + 4 * d * h + h + 3 * h + 3
        assert bill.memory_terms["gradients"] == bill.memory_terms["optimiser"] == 4 * trained
        assert bill.memory_terms["weights"] == 4 * (trained + 2 * c + 2 * d)  # and statistics
        image = 16 + 2 * 16 * c + 2 * 4 * d + h + 3  # inputs of layers and norms, logarithms of probabilities
        batch = 4 * (4 * image + 2 * c + 2 * d) + 4 * 8  # means and deviations of norms, labels
        assert bill.memory_terms["activations"] == batch


# ---- what cannot be


@pytest.mark.parametrize("aggregate", [FedNova(0.9), Scaffold(0.1)], ids=["fednova", "scaffold"])
def test_an_aggregation_without_a_mean_over_owners_is_refused(aggregate) -> None:
    setting = replace(made().setting, aggregate=aggregate)
    with pytest.raises(BadInput, match='use aggregate = "fedavg" or "fedprox"'):
        HeteroFL().init(setting, None)


def test_models_that_cannot_be_narrowed_or_scaled_are_refused() -> None:
    data = stored(*drawn(SIZES))
    with pytest.raises(BadInput, match=r"^\[model\]"):
        HeteroFL().init(world(data, nn.Sequential(nn.Flatten(), nn.Linear(16, 3))).setting, None)
    standardised = nn.Sequential(
        StandardisedConv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    setting = world(data, standardised).setting
    with pytest.raises(BadInput, match=r"0 standardises its filters.*scaler = false"):
        HeteroFL().init(setting, None)
    HeteroFL(scaler=False).init(setting, None)
    with pytest.raises(BadInput, match="take static_norm = true, or scaler = false"):
        HeteroFL(static_norm=False).init(made().setting, None)


@pytest.mark.parametrize("rates", [(), (1.0, 0.0), (1.5,), (0.5, float("nan"))])
def test_rates_are_shares(rates) -> None:
    with pytest.raises(BadInput, match="each should be above 0 and at most 1"):
        HeteroFL(rates=rates)


def test_a_client_has_more_of_its_own_than_a_run_file_holds() -> None:
    assert HeteroFL().stays == "batch norms and scaled weights and classes"
    assert HeteroFL(static_norm=False, scaler=False, mask_classes=False).stays == ""
