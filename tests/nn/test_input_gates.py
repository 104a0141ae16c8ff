"""Dynamic gates (ADP, 3.1, 3.4, 5): selection, order, gradients, counts, FLOPs, and the smaller networks made of them."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from input_gate_models import CIFAR, FAMILIES, batch_of, built, by_sorting, drawn, images, precise
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from fedsim.core.tree import Tree
from fedsim.errors import BadInput
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.layers import gate_insertion, input_gate
from fedsim.nn.layers.input_gate import InputGate, gates_of, largest
from fedsim.nn.net import Net
from fedsim.pruning.dynamic_channels import Costs
from fedsim.simulation.exported.network import Final, traced

# ---- 1: selection


@pytest.mark.parametrize("k", [1, 3, 7, 10])
def test_the_largest_of_a_row_stay_as_they_are_and_of_ties_the_lower_channel(k) -> None:
    source = torch.Generator().manual_seed(0)
    g = torch.randint(0, 4, (50, 10), generator=source).double() / 4  # many ties
    found = largest(g, k)
    assert torch.equal(found, by_sorting(g, k))
    assert torch.equal(found, vmap(lambda row: largest(row, k))(g))
    assert ((found > 0).sum(1) <= k).all()
    assert len({tuple(row) for row in (found > 0).tolist()}) > 1 or k == 10


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 40), (300, 16)])
def test_the_largest_are_the_same_in_few_and_in_many_values(shape: tuple[int, ...]) -> None:
    """Both ways, on values with many ties, zeros and negative zeros, against Python's stable sort."""
    draw = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-1, 3, shape, generator=draw).float() * torch.rand(shape, generator=draw).round()
    for k in (1, shape[-1] // 2, shape[-1]):
        rows = [sorted(range(shape[-1]), key=lambda c, row=row: -row[c])[:k] for row in values.reshape(-1, shape[-1]).tolist()]
        expected = torch.tensor([[c in row for c in range(shape[-1])] for row in rows]).view(shape)
        assert torch.equal(input_gate._by_sorting(values, k), expected)
        assert torch.equal(input_gate._by_threshold(values, k), expected)
        assert torch.equal(vmap(lambda row, k=k: input_gate._by_threshold(row, k))(values[None])[0], expected)


def exported(name: str, **fields: object) -> nn.Module:
    """A model with live gates as fedsim exports it."""
    net = Net(built(name, width=4, shape=(1, 8, 8), **fields))
    return traced(Final(net, net.initial, profiler.profile(net.original, (1, 8, 8))).module)[0]


@pytest.mark.parametrize("fields", [{}, {"gate_place": "affine"}, {"gate_choice": "random"}], ids=str)
@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_live_gates_can_be_recorded_by_torch_jit(name: str, fields: dict[str, object]) -> None:
    module, few, more = exported(name, **fields), images(3, (1, 8, 8)).float(), images(70, (1, 8, 8)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        recorded = torch.jit.trace(module, few)
    with torch.no_grad():
        assert torch.equal(recorded(more), module(more))


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_live_gates_can_be_written_as_onnx(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(exported(name), (images(3, (1, 8, 8)).float(),), written, dynamo=False)
    onnx.checker.check_model(onnx.load_from_string(written.getvalue()))


def test_seven_of_ten_channels_are_open_at_most_and_all_that_are_positive_where_d_is_1() -> None:
    gates = {keep: InputGate(3, 10, input_gate.Gating(keep), False) for keep in (0.7, 1.0)}
    x, y = torch.randn(20, 3, 4, 4), torch.ones(20, 10, 4, 4)
    gates[1.0].load_state_dict(gates[0.7].state_dict())
    some, every = (gate(x, y)[:, :, 0, 0] for gate in gates.values())
    assert gates[0.7].keep == 7
    assert ((some > 0).sum(1) <= 7).all()
    assert torch.equal(some[some > 0], every[some > 0])
    s = x.mean((2, 3)).sigmoid()
    assert torch.allclose(every, (s @ gates[1.0].weight.T + 1).relu())


def test_the_number_kept_is_rounded_half_to_even() -> None:
    assert [InputGate(1, size, input_gate.Gating(0.5), False).keep for size in (1, 3, 5, 7, 8)] == [1, 2, 2, 4, 4]


def test_random_channels_are_drawn_for_each_image_by_what_it_shows() -> None:
    net, tree = precise("cnn", keep=0.25, gate_choice="random", gate_bias=5.0)
    x = images(300)
    g = net.saliency(tree, x) > 0
    assert (g.split(net.channels.widths, 1)[0].sum(1) == 2).all()
    assert torch.equal(net.saliency(tree, x[7:9]) > 0, g[7:9])
    assert (g.double().mean(0) - 0.25).abs().max() < 0.1  # four deviations of a share of 300
    assert len({tuple(row) for row in g.tolist()}) > 290
    pure = net.under_vmap()
    both = vmap(lambda part: pure(tree, part)[0])(x[:8].view(2, 4, *CIFAR))
    assert torch.allclose(both.flatten(0, 1), net(tree, x[:8])[0], atol=1e-12)


# ---- 2: order


class ByHand(nn.Module):
    """A gated sequence or resnet, written out: every convolution followed by its norm, its gate and its ReLU."""

    def __init__(self, dense: nn.Module, tree: Tree, counts: dict[str, int | None], sigmoid: bool) -> None:
        super().__init__()
        self.dense, self.tree, self.counts, self.sigmoid = dense, tree, counts, sigmoid

    def gated(self, x: Tensor, conv: str, norm: str) -> Tensor:
        t = self.tree
        y = F.conv2d(x, t[f"w/{conv}.weight"], padding=1, stride=self.dense.get_submodule(conv).stride)
        y = F.batch_norm(y, t[f"buf/{norm}.running_mean"], t[f"buf/{norm}.running_var"], t[f"w/{norm}.weight"], t[f"w/{norm}.bias"])
        if conv not in self.counts:
            return y
        s = x.mean((2, 3))
        s = 1 / (1 + torch.exp(-s)) if self.sigmoid else s
        g = (s @ t[f"w/gates.{conv}.weight"].T + t[f"w/gates.{conv}.bias"]).clamp(min=0)
        count = self.counts[conv]
        return y * (g if count is None else by_sorting(g, count))[:, :, None, None]

    def resnet(self, x: Tensor) -> Tensor:
        x = self.gated(x, "conv1", "norm1").relu()
        for name, block in self.dense.named_modules():
            if hasattr(block, "shortcut"):
                inner = self.gated(x, f"{name}.conv1", f"{name}.norm1").relu()
                x = (self.gated(inner, f"{name}.conv2", f"{name}.norm2") + block.shortcut(x)).relu()
        return x.mean((2, 3)) @ self.tree["w/fc.weight"].T + self.tree["w/fc.bias"]

    def cnn(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.gated(x, "conv1", "norm1").relu(), 2)
        x = F.max_pool2d(self.gated(x, "conv2", "norm2").relu(), 2).flatten(1)
        x = (x @ self.tree["w/fc1.weight"].T + self.tree["w/fc1.bias"]).relu()
        return x @ self.tree["w/fc2.weight"].T + self.tree["w/fc2.bias"]


@pytest.mark.parametrize(("name", "sigmoid"), [("cnn", True), ("cnn", False), ("resnet8", True), ("resnet8", False), ("resnet20", True)])
def test_the_gate_stands_between_norm_and_activation(name, sigmoid) -> None:
    net, tree = precise(name, gate_sigmoid=sigmoid)
    counts = {group.name: count for group, count in zip(net.channels.groups, net.selected, strict=True)}
    dense = built(name, None).double().eval()
    hand = ByHand(dense, tree, counts, sigmoid)
    assert torch.allclose(net(tree, images())[0], (hand.cnn if name == "cnn" else hand.resnet)(images()), atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("train", [True, False])
def test_gates_that_are_1_are_no_gates(name, norm, train) -> None:
    gated, plain = (Net(built(name, keep, norm=norm)).to("cpu", torch.float64) for keep in (1.0, None))
    tree = drawn(gated)
    for key in tree:
        if key.startswith("w/gates."):
            tree[key] = torch.full_like(tree[key], float(key.endswith("bias")))
    one, other = (net(tree, images(), train) for net in (gated, plain))
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][key]) for key, value in one[1].items())


def test_a_gated_model_begins_as_the_plain_one_and_has_its_gates_where_they_belong() -> None:
    for name in FAMILIES:
        gated, plain = (Net(built(name, keep)) for keep in (0.5, None))
        assert all(torch.equal(value, gated.initial[key]) for key, value in plain.initial.items())
        more = gated.initial.keys() - plain.initial.keys()
        convs = [layer for layer, shape in plain.shapes.items() if len(shape) == 4]
        first = [] if name.startswith("resnet") else convs[:1]
        assert {key.split(".", 1)[1].rpartition(".")[0] for key in more} == {*first, *convs[1:]}
        bias = float(not name.startswith("resnet"))
        assert all((gated.initial[key] == bias).all() for key in more if key.endswith("bias"))
        assert next(iter(gated.sizes)) == next(iter(plain.sizes))  # the first layer is still the first


def test_gates_may_start_otherwise() -> None:
    gates = gates_of(built("resnet8", gate_sigmoid=True, gate_bias=0.3)).values()
    assert all(gate.sigmoid and torch.allclose(gate.bias, torch.tensor(0.3)) for gate in gates)
    wide = gates_of(built("vgg11", width=64))["gates.features.8"]
    assert float(wide.weight.detach().std()) == pytest.approx((2 / wide.weight.shape[1]) ** 0.5, rel=0.05)  # Kaiming normal


# ---- 3: gradients


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_channels_that_no_image_opens_learn_nothing(name) -> None:
    net, tree = precise(name, keep=1.0, width=4)
    tree = {key: value.clone() for key, value in tree.items()}
    group = net.channels.groups[-1].name
    tree[f"w/gates.{group}.weight"][1] = 0.0
    tree[f"w/gates.{group}.bias"][1] = -1.0  # closed, whatever the image
    _, gradient, _, _ = net.gradient(tree, batch_of(images()))
    norm = net.channels.groups[-1].norms[0]
    for key in (f"w/{group}.weight", f"w/{norm}.weight", f"w/{norm}.bias", f"w/gates.{group}.weight", f"w/gates.{group}.bias"):
        assert (gradient[key][1] == 0).all(), key
        assert (gradient[key][0] != 0).any(), key


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
@pytest.mark.parametrize("place", ["norm", "affine"])
def test_gradients_are_those_of_finite_differences(name, place) -> None:
    net, tree = precise(name, width=3, shape=(1, 8, 8), keep=0.7, gate_place=place)
    batch = batch_of(images(6, (1, 8, 8)))
    _, gradient, _, _ = net.gradient(tree, batch)
    source, step = torch.Generator().manual_seed(3), 1e-6
    for key in [key for key in net.weights if key.startswith(("w/gates.", "w/conv", "w/layer2", "w/shifts"))]:
        way = torch.randn(tree[key].shape, generator=source, dtype=torch.float64)
        ends = [net.gradient(tree | {key: tree[key] + sign * step * way}, batch, None)[0] for sign in (1, -1)]
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float((gradient[key] * way).sum()), rel=2e-4, abs=1e-7), key


def test_the_sum_of_gates_can_be_kept_low() -> None:
    plain, (net, tree) = precise("cnn", width=4)[0], precise("cnn", width=4, gate_l1=0.01)
    x, real = images(6), torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.float64)
    for weight in (None, real):
        loss, gradient, _, _ = net.gradient(tree, batch_of(x, real=weight))
        without, other, _, _ = plain.gradient(tree, batch_of(x, real=weight))
        with torch.no_grad():
            train = sums(net, tree, x, weight)
        assert float(loss - without) == pytest.approx(0.01 * train, rel=1e-9)
        assert any(not torch.equal(value, other[key]) for key, value in gradient.items() if "gates" in key)
    assert float(plain.gradient(tree, batch_of(x))[0]) == pytest.approx(float(F.cross_entropy(net(tree, x, True)[0], batch_of(x).y)))


def sums(net: Net, tree: Tree, x: Tensor, real: Tensor | None) -> float:
    """The mean over real images of the sum of their gates, in training mode."""
    net.context.saliency = {}
    net(tree, x, True, real)
    g, net.context.saliency = torch.cat(list(net.context.saliency.values()), 1).sum(1), None
    return float(g.mean() if real is None else (g * real).sum() / real.sum())


def test_a_pack_gives_what_its_clients_give() -> None:
    net, tree = precise("resnet8", width=4)
    x = images(8).view(2, 4, *CIFAR)
    pure = net.under_vmap()

    def one(part: Tensor) -> Tree:
        return pure.gradient(tree, batch_of(part))[1]

    both = vmap(one)(x)
    for i in range(2):
        alone = net.gradient(tree, batch_of(x[i]))[1]
        assert all(torch.allclose(value[i], alone[key], atol=1e-12) for key, value in both.items())


# ---- 4, 5: counts and FLOPs

TABLE = {
    0.9: (0.8111, 0.8268),
    0.8: (0.6401, 0.6655),
    0.7: (0.4919, 0.5258),
    0.6: (0.3609, 0.4022),
    0.5: (0.2514, 0.2990),
    0.3: (0.0909, 0.1476),
}


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize(("name", "every", "of_gates"), [("vgg16", 35_281_162, 1_638_720), ("resnet32", 516_474, 52_320)])
def test_parameters_are_as_published(name, every, of_gates) -> None:
    with torch.device("meta"):
        module = built(name, 0.7, None)
    assert parameters(module) == every
    assert sum(parameters(gate) for gate in gates_of(module).values()) == of_gates


@pytest.fixture(scope="module")
def vgg16() -> tuple[Net, Costs]:
    module = built("vgg16", 0.7, None)
    return (net := Net(module)), Costs.of(net.channels, profiler.profile(module, CIFAR))


@pytest.mark.parametrize("keep", TABLE)
def test_nominal_costs_are_as_published(vgg16, keep) -> None:
    net, costs = vgg16
    assert (costs.dense["convs"], costs.gates, costs.others) == (313_196_544, 1_634_496, 18_915_328)
    found = costs.nominal([max(1, round(keep * width)) for width in net.channels.widths])
    assert tuple(round(value, 4) for value in found.values()) == TABLE[keep]


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_actual_costs_count_open_channels_and_are_never_above_nominal(name) -> None:
    net, tree = precise(name)
    g = net.saliency(tree, images(7))
    costs = Costs.of(net.channels, profiler.profile(built(name), CIFAR))
    found = costs.convs(g > 0)
    assert (found <= costs.nominal(net.selected)["nominal_convs_share"] * costs.dense["convs"] + 1e-6).all()
    opened = {layer: (part > 0).sum(1) for layer, part in net.channels.split(g).items()}
    for i in range(7):
        assert int(found[i]) == counted(name, {layer: int(part[i]) for layer, part in opened.items()})
    assert (g > 0).sum(1).unique().numel() > 0


def counted(name: str, c: dict[str, int]) -> int:
    """k^2 inputs outputs H W of every convolution at width 8, written out."""
    if name == "cnn":
        return 9 * (3 * c["conv1"] * 32**2 + c["conv1"] * c["conv2"] * 16**2)
    total = 9 * 3 * 8 * 32**2
    for stage, (inside, size) in {1: (8, 32), 2: (8, 16), 3: (16, 8)}.items():
        one, two = c[f"layer{stage}.0.conv1"], c[f"layer{stage}.0.conv2"]
        total += 9 * size**2 * (inside * one + one * two)
    return total


# ---- what is told of wrong settings

WRONG: list[tuple[dict[str, object], str]] = [
    ({"gate_keep": 0.0}, "above 0 and at most 1"),
    ({"gate_keep": 1.5}, "above 0 and at most 1"),
    ({"gate_l1": 1e-4}, "need model.gate_keep; it is not given"),
    ({"gate_place": "before"}, "There are: norm, affine"),
    ({"gate_keep": 0.5, "gate_l1": -1.0}, "at least 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_settings_that_cannot_be_are_reported(fields, message) -> None:
    with pytest.raises(BadInput, match=message):
        settings.ModelSettings("cnn", **fields)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Fixed(nn.Sequential):
    """Always in evaluation mode."""

    def train(self, mode: bool = True) -> Fixed:
        return super().train(False)


def test_models_that_cannot_be_gated_are_reported() -> None:
    with pytest.raises(BadInput, match="gate_keep: 1 stays in evaluation mode"):
        gate_insertion.insert_gates(nn.Sequential(nn.Conv2d(3, 4, 3), Fixed(nn.BatchNorm2d(4)), nn.ReLU()), input_gate.Gating(0.5))
    with pytest.raises(BadInput, match="cannot trace"):
        gate_insertion.insert_gates(Branching(), input_gate.Gating(0.5))
    with pytest.raises(BadInput, match="no convolution to gate"):
        gate_insertion.insert_gates(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_gate.Gating(0.5))
