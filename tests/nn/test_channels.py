"""Which channels have gates: the groups found in every model, in users' own, and why others have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_models import CLASSES, alike, batch, close, drawn, hard, lively
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.keys import GATE
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn import channel_groups
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.net import Net

# ---- the groups of every model


def thin_groups(blocks: int) -> dict[str, int]:
    return {f"layer{s + 1}.{b}.conv1": 16 << s for s in range(3) for b in range(blocks)}


def cifar_mobile_groups() -> dict[str, int]:
    """As many as blocks: the first has the stem's 32, each other six times the channels that enter it."""
    blocks = (1, 2, 3, 4, 3, 3, 1)
    enter = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3
    names = [f"layer{stage}.{block}.expand" for stage, number in enumerate(blocks, 1) for block in range(number)]
    return dict(zip(names, [32] + [6 * width for width in enter], strict=True))


def mobile_groups() -> dict[str, int]:
    """Six times the channels that enter each block but the first, which expands nothing."""
    enter = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3
    return {f"features.{i}.conv.0.0": 6 * width for i, width in enumerate(enter, 2)}


VGG = {0: 64, 3: 128, 6: 256, 8: 256, 11: 512, 13: 512, 16: 512, 18: 512}
STRUCTURES = {
    "cnn": {"conv1": 32, "conv2": 64, "fc1": 128},
    "lenet5": {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84},
    **{f"resnet{6 * blocks + 2}": thin_groups(blocks) for blocks in (1, 3, 5, 9)},
    "resnet18": {f"layer{s + 1}.{b}.conv1": 64 << s for s in range(4) for b in range(2)},
    "vgg11": {f"features.{i}": width for i, width in VGG.items()} | {"classifier.0": 512, "classifier.2": 512},
    "mobilenet_v2": mobile_groups(),
    "mobilenet_v2_cifar": cifar_mobile_groups(),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_groups_are_those_of_the_papers(name) -> None:
    """In plain nets every layer but the last; in residual ones the inner widths, never the stream, its stem or its head."""
    module = build(ModelSettings(name, norm="none"), (3, 32, 32), 10, 0)
    assert [(group.name, group.size) for group in channel_groups.find_groups(module)[1]] == list(STRUCTURES[name].items())


def test_resnet56_has_27_layers_and_1008_gates() -> None:
    module = build(ModelSettings("resnet56", norm="group", standardise=True), (3, 32, 32), 10, 0)
    channels = Net(module).channels
    assert channels.widths == [16] * 9 + [32] * 9 + [64] * 9
    assert channels.n == 1008
    assert sum(value.numel() for value in module.parameters()) == 853_018


def test_a_block_is_cut_in_its_first_convolution_its_norm_and_the_columns_of_the_second() -> None:
    group = drawn("resnet8")[1].channels.groups[1]
    statistics = [f"layer2.0.norm1.{slot}" for slot in ("weight", "bias", "running_mean", "running_var")]
    assert set(group.rows) == {"layer2.0.conv1.weight", *statistics}
    assert (group.columns, group.norms, group.depthwise) == (("layer2.0.conv2.weight",), ("layer2.0.norm1",), ())
    assert len(group.points) == 1


def test_an_inverted_residual_has_one_gate_at_two_places() -> None:
    group = drawn("mobilenet_v2", "group")[1].channels.groups[0]
    block = "features.2.conv"
    layers = (f"{block}.0.0", f"{block}.0.1", f"{block}.1.0", f"{block}.1.1")
    assert {row.rpartition(".")[0] for row in group.rows} == set(layers)
    assert (group.columns, group.depthwise, len(group.points)) == ((f"{block}.2.weight",), (f"{block}.1.0",), 2)


# ---- users' models


class Model(nn.Module):
    """Layers by name, and a forward pass."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.work = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self, x)


def conv(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


def user(flat: Any) -> Model:
    """conv, relu, pool, flatten, linear, relu, linear: all but the layers by functions."""
    return Model(
        lambda m, x: m.fc2(F.relu(m.fc1(flat(F.max_pool2d(F.relu(m.conv(x)), 2))))),
        conv=conv(2, 4),
        fc1=nn.Linear(4 * 16, 6),
        fc2=nn.Linear(6, CLASSES),
    )


def same_in_every_way(module: nn.Module) -> None:
    """A random hard gate: masked = compacted = cut."""
    net = Net(module).to("cpu", torch.float64)
    values, gate, x = lively(net), hard(net), batch("cnn").x
    kept = net.channels.kept(gate)
    masked = net.under_vmap()(values | {GATE: gate}, x)[0]
    assert close(net(values | {GATE: gate}, x)[0], masked)
    assert close(net.cut(kept)(net.compact(values, kept), x)[0], masked)
    assert not close(masked, net(values, x)[0])


FLATTENINGS = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "flatten": lambda x: x.flatten(start_dim=1),
    "view": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape((x.size(0), -1)),
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
}


@pytest.mark.parametrize("flat", FLATTENINGS.values(), ids=FLATTENINGS)
def test_functional_models_are_gated(flat) -> None:
    module = user(flat)
    assert {group.name: group.size for group in channel_groups.find_groups(module)[1]} == {"conv": 4, "fc1": 6}
    same_in_every_way(module)


def test_a_mean_over_positions_and_two_readers_are_followed() -> None:
    module = Model(
        lambda m, x: m.out(torch.tanh(m.a(h := F.relu(m.conv(x)))).mean((2, 3)) * torch.relu(m.b(h)).mean([2, 3])),
        conv=conv(2, 4),
        a=conv(4, 5),
        b=conv(4, 5),
        out=nn.Linear(5, CLASSES),
    )
    (group,) = channel_groups.find_groups(module)[1]
    assert (group.name, group.columns) == ("conv", ("a.weight", "b.weight"))
    same_in_every_way(module)


def two_branches(**layers: nn.Module) -> Model:
    """Products, not sums: nothing but the layers themselves holds channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.norm_a(m.mid_a(F.relu(m.a(x))))).flatten(1)
        b = F.relu(m.norm_b(m.mid_b(F.relu(m.b(x))))).flatten(1)
        return m.fc_a(a) * m.fc_b(b)

    own = {"a": conv(2, 4), "b": conv(2, 4), "mid_a": conv(4, 4), "mid_b": conv(4, 4), "norm_a": nn.Identity(), "norm_b": nn.Identity()}
    return Model(forward, **own | layers, fc_a=nn.Linear(256, CLASSES), fc_b=nn.Linear(256, CLASSES))


def tied(kind: Any) -> tuple[nn.Module, nn.Module]:
    """Two layers with one weight."""
    one, other = kind(), kind()
    other.weight = one.weight
    return one, other


SHARED = {
    "no sharing": (conv(4, 4), conv(4, 4), nn.Identity(), nn.Identity(), {"a", "b", "mid_a", "mid_b"}),
    "one layer twice": (*[conv(4, 4)] * 2, nn.Identity(), nn.Identity(), set()),
    "tied layers": (*tied(lambda: conv(4, 4)), nn.Identity(), nn.Identity(), set()),
    "one norm twice": (conv(4, 4), conv(4, 4), *[nn.BatchNorm2d(4)] * 2, {"a", "b"}),
    "one norm without parameters twice": (conv(4, 4), conv(4, 4), *[nn.BatchNorm2d(4, affine=False)] * 2, {"a", "b"}),
    "tied norms": (conv(4, 4), conv(4, 4), *tied(lambda: nn.GroupNorm(1, 4)), {"a", "b"}),
}


@pytest.mark.parametrize(("mid_a", "mid_b", "norm_a", "norm_b", "free"), SHARED.values(), ids=SHARED)
def test_layers_used_twice_are_never_cut(mid_a, mid_b, norm_a, norm_b, free) -> None:
    module = two_branches(mid_a=mid_a, mid_b=mid_b, norm_a=norm_a, norm_b=norm_b)
    try:
        found = {group.name for group in channel_groups.find_groups(module)[1]}
    except ValueError:
        found = set()
    assert found - {"a", "b"} <= free - {"a", "b"}, "what is used twice must stay whole"
    if free:
        assert found == free
        same_in_every_way(module)


class Centred(nn.Conv2d):
    """A user's convolution whose filter depends on all its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def line(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(conv(2, 4), *layers)


HEAD = (nn.Flatten(), nn.Linear(256, CLASSES))
UNCUTTABLE = {
    "grouped norm": (line(nn.GroupNorm(2, 4), nn.ReLU(), *HEAD), "1 needs them all"),
    "norm after the activation": (line(nn.ReLU(), nn.BatchNorm2d(4), *HEAD), "2 needs them all"),
    "no activation": (line(nn.MaxPool2d(1), *HEAD), "3 reads them before any activation"),
    "unknown layer": (line(nn.ReLU(), nn.Softmax(1), *HEAD), "2 needs them all"),
    "a user's convolution": (line(nn.ReLU(), Centred(4, 4, 1), nn.Sigmoid(), *HEAD), "2 needs them all"),
    "grouped convolution": (line(nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), *HEAD), "2 needs them all"),
    "flattened with the images": (user(lambda x: x.flatten().view(-1, 64)), "flatten needs them all"),
    "flattened in part": (
        Model(
            lambda m, x: m.out(F.relu(m.fc(F.relu(m.conv(x)).flatten(1, 2))).sum(1)),
            conv=conv(2, 4),
            fc=nn.Linear(8, 6),
            out=nn.Linear(6, CLASSES),
        ),
        "needs them all",
    ),
    "mean over channels": (
        Model(lambda m, x: m.fc(F.relu(m.conv(x)).mean(1).flatten(1)), conv=conv(2, 4), fc=nn.Linear(64, 3)),
        "mean needs them all",
    ),
    "concatenation": (
        Model(
            lambda m, x: m.fc(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1).flatten(1)), a=conv(2, 2), b=conv(2, 2), fc=nn.Linear(256, 3)
        ),
        "cat needs them all",
    ),
    "activation behind flattening": (line(nn.Flatten(), nn.ReLU(), nn.Linear(256, CLASSES)), "2 needs them all"),
    "normalised filters": (
        line(NormalisedConv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        'model.norm = "nsconv"',
    ),
    "a layer that is not known": (
        line(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)),
        "1 (Conv1d) cannot be cut by gates",
    ),
    "norm behind flattening": (line(nn.Flatten(), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, CLASSES)), "2 needs them all"),
    "control flow": (Model(lambda m, x: m.fc(x.flatten(1) if x.sum() > 0 else -x.flatten(1)), fc=nn.Linear(128, 3)), "cannot trace"),
}


@pytest.mark.parametrize(("module", "why"), UNCUTTABLE.values(), ids=UNCUTTABLE)
def test_models_without_gates_say_why(module, why) -> None:
    with pytest.raises(ValueError, match="the model has no gates") as error:
        _ = Net(module).channels
    assert why in str(error.value)


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.scale = conv(2, 4), nn.Linear(256, CLASSES), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(F.relu(self.conv(x)).flatten(1))


def test_a_parameter_of_the_models_own_comes_from_the_tree_at_every_call() -> None:
    net, one = Net(Scaled()).to("cpu", torch.float64), batch("cnn")
    values, gate = lively(net), {GATE: torch.ones(4, dtype=torch.float64)}
    first = net(values | gate, one.x)[0]
    twice = values | {"w/scale": 2 * values["w/scale"]}
    assert close(net(twice | gate, one.x)[0], 2 * first)
    alike(net.gradient(twice | gate, one)[1], net.gradient(twice, one)[1])


def test_a_model_that_does_not_do_the_same_in_training_has_no_gates() -> None:
    module = Model(lambda m, x: m.fc(F.relu(m.conv(x)).flatten(1)) * (1 if m.training else 2), conv=conv(2, 4), fc=nn.Linear(256, 3))
    with pytest.raises(ValueError, match="takes different steps in training and in evaluation"):
        channel_groups.find_groups(module)
