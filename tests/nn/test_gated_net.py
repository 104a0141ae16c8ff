"""Net under gates: masked, compacted, cut and exported networks are one function, with one gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from channel_models import CLASSES, ZOO, alike, batch, close, drawn, hard, lively
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from fedsim.core import tree
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch
from fedsim.nn.loss import cross_entropy
from fedsim.nn.net import Net


def ids(entry: Any) -> str:
    name, norm, standardise = entry
    return f"{name}-{norm}{'-standardised' if standardise else ''}"


def hidden(net: Net, gate: Tensor) -> Tree:
    """Where a closed channel's own weights stand: its rows, and the columns that read it, by one comparison an entry."""
    found = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in net.initial.items() if key.startswith("w/")}
    for group, part in zip(net.channels.groups, gate.split(net.channels.widths), strict=True):
        for row in group.rows:
            if f"w/{row}" in found:
                found[f"w/{row}"][~part] = True
        for column in group.columns:
            entry = found[f"w/{column}"]
            each = entry.shape[1] // group.size
            for c in range(group.size):
                entry[:, c * each : (c + 1) * each] |= not part[c]
    return found


# ---- one function


@pytest.mark.parametrize("entry", ZOO, ids=ids)
def test_masked_compacted_cut_and_plain_are_one_function(entry) -> None:
    _, net, values = drawn(*entry)
    gate, x = hard(net), batch(entry[0]).x
    kept = net.channels.kept(gate)
    gated = values | {GATE: gate}
    small, compact = net.cut(kept), net.compact(values, kept)
    masked = net.under_vmap()(gated, x)[0]
    assert close(net(gated, x)[0], masked)
    assert close(small(compact, x)[0], masked)
    assert close(small.plain(compact).double()(x), masked)
    assert not close(net(values, x)[0], masked, 1e-3)


@pytest.mark.parametrize("entry", ZOO, ids=ids)
def test_so_are_their_gradients_and_running_statistics(entry) -> None:
    _, net, values = drawn(*entry)
    gate, one = hard(net), batch(entry[0])
    kept = net.channels.kept(gate)
    gated = values | {GATE: gate}
    loss, gradient, buffers, _ = net.gradient(gated, one)
    masked = net.under_vmap().gradient(gated, one)
    cut = net.cut(kept).gradient(net.compact(values, kept), one)
    assert close(loss, masked[0])
    assert close(loss, cut[0])
    alike(gradient, masked[1])
    alike(net.compact(gradient, kept, removed=False), cut[1])
    assert buffers.keys() == masked[2].keys() == cut[2].keys()
    for key, value in buffers.items():
        assert close(value, masked[2][key])
    for key, value in net.channels.cut(buffers, kept).items():
        assert close(value, cut[2][key])


@pytest.mark.parametrize("pure", [False, True], ids=["compacted", "masked"])
@pytest.mark.parametrize("entry", ZOO, ids=ids)
def test_hidden_weights_have_no_gradient_and_live_on_by_decay(entry, pure) -> None:
    """But for what a standardised filter that is cut goes on counting: its own columns."""
    _, net, values = drawn(*entry)
    gate = hard(net)
    standardised = {f"w/{name}.weight" for name in net.channels.standardised}
    gradient = (net.under_vmap() if pure else net).gradient(values | {GATE: gate}, batch(entry[0]))[1]
    after = net.descend(tree.clone(values), gradient, 0.1, 0.0, 0.5)
    places = hidden(net, gate)
    assert any(place.any() for place in places.values())
    for key, place in places.items():
        quiet = place.flatten(1).all(1) if key in standardised else place
        assert bool((gradient[key][quiet] == 0).all()), key
        assert torch.allclose(after[key][quiet], 0.95 * values[key][quiet], rtol=1e-12), key


@pytest.mark.parametrize("pure", [False, True], ids=["compacted", "masked"])
@pytest.mark.parametrize("name", ["cnn", "resnet8", "mobilenet_v2", "mobilenet_v2_cifar"])
def test_running_statistics_of_closed_channels_stay_as_they_were(name, pure) -> None:
    _, net, values = drawn(name)
    gate = hard(net)
    _, buffers = (net.under_vmap() if pure else net)(values | {GATE: gate}, batch(name).x, True)
    own = {row: part for g, part in zip(net.channels.groups, gate.split(net.channels.widths), strict=True) for row in g.rows}
    gated = [key for key in buffers if key[4:] in own]
    assert len(gated) == 2 * len(net.channels.norms)
    for key in gated:
        assert torch.equal(buffers[key] == values[key], ~own[key[4:]]), key


def test_a_norm_over_all_channels_sees_the_kept_ones_alone() -> None:
    """By hand: the mean and variance of the two open channels, whatever the closed one holds."""
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 1, 1), nn.Flatten())
    net = Net(module).to("cpu", torch.float64)
    values, x = lively(net) | {"w/1.weight": torch.tensor([2.0, 3.0, 5.0]).double()}, batch("cnn").x
    h = F.conv2d(x, values["w/0.weight"], values["w/0.bias"])[:, [0, 2]]
    centred = h - h.mean((1, 2, 3), keepdim=True)
    scale, shift = (values[f"w/1.{slot}"][[0, 2]].view(1, 2, 1, 1) for slot in ("weight", "bias"))
    normed = centred / (h.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt() * scale + shift
    out = F.conv2d(normed.relu(), values["w/3.weight"][:, [0, 2]], values["w/3.bias"]).flatten(1)
    gate = torch.tensor([True, False, True])
    assert close(net(values | {GATE: gate}, x)[0], out, 1e-12)
    assert close(net.under_vmap()(values | {GATE: gate}, x)[0], out, 1e-12)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_padding_enters_nothing_under_a_hard_gate(norm) -> None:
    _, net, values = drawn("resnet8", norm)
    gated, whole = values | {GATE: hard(net)}, batch("resnet8")
    padded = replace(whole, real=torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    bare = replace(whole, x=whole.x[:3], y=whole.y[:3])
    for each in (net, net.under_vmap()):
        alike(each.gradient(gated, padded)[1], net.gradient(gated, bare)[1])


def test_masks_act_under_gates_too() -> None:
    _, net, values = drawn("cnn", "group")
    mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    gated, one = values | {GATE: hard(net), "mask/conv2.weight": mask}, batch("cnn")
    compacted, masked = net.gradient(gated, one)[1], net.under_vmap().gradient(gated, one)[1]
    alike(compacted, masked)
    assert not compacted["w/conv2.weight"][~mask].any()
    zeroed = values | {"w/conv2.weight": values["w/conv2.weight"] * mask, GATE: gated[GATE]}
    assert close(net(gated, one.x)[0], net(zeroed, one.x)[0], 1e-12)


def test_weights_in_use_are_those_that_neither_mask_nor_gate_takes() -> None:
    _, net, values = drawn("cnn")
    gate = hard(net)
    mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    unseen = hidden(net, gate)
    expected = {name: int((~unseen[f"w/{name}.weight"]).sum()) for name in net.sizes}
    assert net.used(values | {GATE: gate}) == expected
    both = int((mask & ~unseen["w/conv2.weight"]).sum())
    assert net.used(values | {GATE: gate, "mask/conv2.weight": mask}) == expected | {"conv2": both}
    assert net.used(values | {GATE: gate.double()}) == {}


# ---- permanent cuts


CUTS = [
    ("resnet8", "group", True),
    ("resnet8", "batch", False),
    ("cnn", "batch", True),
    ("mobilenet_v2", "group", False),
    ("mobilenet_v2_cifar", "batch", False),
]


@pytest.mark.parametrize("entry", CUTS, ids=ids)
def test_two_cuts_are_one(entry) -> None:
    """What a standardised filter lost in both is counted as if it were lost at once; gates of the cut net reach inside."""
    _, net, values = drawn(*entry)
    first = net.channels.kept(hard(net, 0, 0.8))
    middle, half = net.cut(first), net.compact(values, first)
    gate = hard(middle, 1) if entry[0] == "resnet8" else hard(middle, 1, 0.7)
    second = middle.channels.kept(gate)
    both = {name: first[name][index] for name, index in second.items()}
    twice, once = middle.compact(half, second), net.compact(values, both)
    alike(twice, once)
    x = batch(entry[0]).x
    found = net.cut(both)(once, x)[0]
    assert close(middle.cut(second)(twice, x)[0], found)
    assert close(middle(half | {GATE: gate}, x)[0], found)
    assert close(middle.under_vmap()(half | {GATE: gate}, x)[0], found)
    assert close(middle.cut(second).plain(twice).double()(x), found)


@pytest.mark.parametrize("entry", CUTS, ids=ids)
def test_a_cut_net_is_a_smaller_one_with_what_is_kept_of_the_initial_values(entry) -> None:
    _, net, _ = drawn(*entry)
    kept = net.channels.kept(hard(net))
    small = net.cut(kept)
    assert small.initial.keys() == net.compact(net.initial, kept).keys()
    for key, value in net.compact(net.initial, kept).items():
        assert torch.allclose(small.initial[key], value, atol=1e-12), key
    assert small.channels.widths == [len(index) for index in kept.values()]
    assert small.channels.groups == tuple(replace(g, size=len(kept[g.name]), rows=s.rows) for g, s in zip(*pair(net, small), strict=True))


def pair(net: Net, small: Net) -> tuple[Any, Any]:
    """Groups of both: a cut standardised filter has one row more, of what it lost."""
    for whole, part in zip(net.channels.groups, small.channels.groups, strict=True):
        assert [row for row in part.rows if not row.endswith(".removed")] == list(whole.rows)
    return net.channels.groups, small.channels.groups


def test_momenta_and_masks_are_cut_like_their_weights() -> None:
    _, net, values = drawn("cnn")
    gate = hard(net)
    kept, seen = net.channels.kept(gate), {key: ~place for key, place in hidden(net, gate).items()}
    state = tree.renamed(values, "w/", "opt/momentum/") | {"mask/conv2.weight": values["w/conv2.weight"] > 0}
    for key, value in net.channels.cut(state, kept).items():
        weight = "w/" + key.removeprefix("opt/momentum/").removeprefix("mask/")
        assert torch.equal(value.flatten(), state[key][seen[weight]] if weight in seen else state[key].flatten()), key


def test_a_cut_net_is_remembered() -> None:
    _, net, _ = drawn("cnn")
    one, other = (net.channels.kept(hard(net, seed, share)) for seed, share in ((0, 0.5), (1, 0.8)))
    assert net.cut(one) is net.cut({name: index.clone() for name, index in one.items()})
    assert net.cut(other) is not net.cut(one)


def test_a_cut_net_has_the_dtype_of_the_net_that_was_asked() -> None:
    _, net, _ = drawn("cnn")
    single, kept = net.to("cpu", torch.float32), net.channels.kept(hard(net))
    for asked, dtype in ((net, torch.float64), (single, torch.float32), (net, torch.float64)):
        assert next(iter(asked.cut(kept).initial.values())).dtype == dtype


def test_an_emptied_group_is_named() -> None:
    _, net, values = drawn("cnn")
    gate = torch.ones(net.channels.n, dtype=torch.bool)
    gate[4:12] = False
    with pytest.raises(ValueError, match="the gate keeps no channel of conv2"):
        net(values | {GATE: gate}, batch("cnn").x)
    whole = {group.name: torch.arange(group.size) for group in net.channels.groups}
    with pytest.raises(ValueError, match="the gate keeps no channel of fc1"):
        net.cut(whole | {"fc1": torch.arange(0)})


def test_a_model_with_tied_layers_is_exported() -> None:
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    module = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), one, nn.ReLU(), other, nn.ReLU(), nn.Linear(6, CLASSES))
    net, x = Net(module).to("cpu", torch.float64), batch("cnn").x
    assert close(net.plain(lively(net)).double()(x), net(lively(net), x)[0])


# ---- soft gates


def expanding() -> nn.Module:
    """An inverted residual with its stem and head: the gate of its inner channels stands at two places."""
    inner = nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(1, 6), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Tanh())
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), inner, nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(256, CLASSES))


MODELS = {
    "resnet8": lambda: drawn("resnet8", "group", True)[0],
    "expanding": expanding,
    "mobilenet_v2": lambda: drawn("mobilenet_v2")[0],
    "mobilenet_v2_cifar": lambda: drawn("mobilenet_v2_cifar", "group")[0],
}


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(name, pure) -> None:
    net, one = Net(MODELS[name]()).to("cpu", torch.float64), batch("cnn")
    net = net.under_vmap() if pure else net
    gate = torch.rand(net.channels.n, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.8 + 0.1
    values = lively(net)
    d = net.gradient(values | {GATE: gate}, one, "gate")[1][GATE]
    ahead = torch.randperm(net.channels.n, generator=torch.Generator().manual_seed(5))[:12]

    def loss(channel: int, step: float) -> Tensor:
        moved = gate.clone()
        moved[channel] += step
        return cross_entropy(net(values | {GATE: moved}, one.x, True)[0], one.y, None)

    slopes = torch.stack([(loss(c, 1e-6) - loss(c, -1e-6)) / 2e-6 for c in ahead.tolist()])
    assert torch.allclose(d[ahead], slopes, rtol=1e-4, atol=1e-7)
    assert d.abs().max() > 1e-4


def test_a_gate_multiplies_after_the_activation_wherever_its_channels_are() -> None:
    module = expanding().double()
    net, x = Net(module).to("cpu", torch.float64), batch("cnn").x
    gate = torch.rand(10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    stem, (wide, norm, act, filters, _), head = module[:2], module[2], module[3:]
    first, both = gate[:4].view(1, -1, 1, 1), gate[4:].view(1, -1, 1, 1)
    h = torch.tanh(filters(act(norm(wide(first * stem(x)))) * both)) * both
    assert net.channels.widths == [4, 6]
    assert close(net(net.initial | {GATE: gate}, x)[0], head(h), 1e-12)


def test_weights_and_gates_are_differentiated_in_one_pass() -> None:
    _, net, values = drawn("resnet8", "group")
    gated, one = values | {GATE: torch.full((net.channels.n,), 0.7, dtype=torch.float64)}, batch("resnet8")
    both = net.gradient(gated, one, ("w", "gate"))[1]
    alike(both, net.gradient(gated, one, "w")[1] | net.gradient(gated, one, "gate")[1])
    with pytest.raises(ValueError, match="a hard one has no gradient"):
        net.gradient(values | {GATE: hard(net)}, one, "gate")


def test_open_soft_gates_change_nothing() -> None:
    _, net, values = drawn("mobilenet_v2")
    gated, one = values | {GATE: torch.ones(net.channels.n, dtype=torch.float64)}, batch("mobilenet_v2")
    assert torch.equal(net(gated, one.x)[0], net(values, one.x)[0])
    alike(net.gradient(gated, one)[1], net.gradient(values, one)[1])


# ---- packs, energy


PACKED = [
    ("resnet8", "batch", True),
    ("mobilenet_v2", "group", False),
    ("mobilenet_v2_cifar", "group", False),
    ("cnn", "group", False),
]


@pytest.mark.parametrize("entry", PACKED, ids=ids)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_clients_with_gates_of_their_own_in_a_pack_are_the_serial_ones(entry, kind) -> None:
    _, net, values = drawn(*entry)
    gates = torch.stack([hard(net, k) for k in range(3)])
    gates = gates if kind == "hard" else torch.where(gates, 0.9, 0.2).double()
    own = tree.stack([{key: value * (1 + k / 10) for key, value in values.items()} | {GATE: gates[k]} for k in range(3)])
    several = [batch(entry[0], seed=k) for k in range(3)]
    wrt = "w" if kind == "hard" else ("w", "gate")
    pack = net.under_vmap()

    def of_one(state: Tree, x: Tensor, y: Tensor) -> tuple[Tensor, Tree, Tree]:
        return pack.gradient(state, Batch(x, y, None, torch.tensor(0), torch.tensor(1)), wrt)[:3]

    loss, gradient, buffers = vmap(of_one)(own, torch.stack([b.x for b in several]), torch.stack([b.y for b in several]))
    for k, one in enumerate(several):
        alone = net.gradient(tree.row(own, k), one, wrt)
        assert close(loss[k], alone[0])
        alike(tree.row(gradient, k), alone[1])
        assert all(close(buffers[key][k], value) for key, value in alone[2].items())


@pytest.mark.parametrize(("name", "kinds"), [("resnet8", nn.ReLU), ("mobilenet_v2", nn.ReLU6), ("mobilenet_v2_cifar", nn.ReLU)])
def test_energy_is_the_sum_of_squared_activations(name, kinds) -> None:
    module, net, values = drawn(name)
    module.load_state_dict({key.partition("/")[2]: value for key, value in under(values, "w/", "buf/").items()}, strict=False)
    x, real = batch(name).x, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for place, layer in module.named_modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(lambda _, __, out, place=place: seen.update({place: out.square()}))
    module.eval()(x)
    places = {g.name: activations(name, g.name) for g in net.channels.groups}
    for images, given in ((5, None), (3, real)):
        expected = [sum(seen[place][:images].sum((0, 2, 3)) for place in places[g]) for g in places]
        assert close(net.energy(values, x, given), torch.cat(expected), 1e-10)


def activations(name: str, group: str) -> list[str]:
    """Where a group's channels are active: after the first convolution of a block, or after its expansion and its filters."""
    block = group.removesuffix(".conv1").removesuffix(".0.0").removesuffix(".expand")
    own = {"resnet8": ["relu1"], "mobilenet_v2": ["0.2", "1.2"], "mobilenet_v2_cifar": ["relu1", "relu2"]}
    return [f"{block}.{slot}" for slot in own[name]]


def test_a_net_cut_twice_knows_what_is_left_of_the_first() -> None:
    _, net, _ = drawn("cnn", "group")
    first = net.channels.kept(hard(net))
    small = net.cut(first)
    second = {name: torch.arange(0, len(index), 2) for name, index in first.items()}
    left = small.cut(second).kept
    assert all(torch.equal(left[name], index[::2]) for name, index in first.items())
    assert net.cut(left).initial.keys() == small.cut(second).initial.keys()
    assert all(torch.equal(value, small.cut(second).initial[key]) for key, value in net.cut(left).initial.items())
