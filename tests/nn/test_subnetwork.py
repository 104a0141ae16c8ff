"""The smaller networks made of gated ones (ADP, 3.4): which channels they keep, what they compute, and channels skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from input_gate_models import CIFAR, FAMILIES, built, chosen, drawn, images, precise
from torch import Tensor, nn

from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.nn import profiler
from fedsim.nn.dynamic_inference import Skipping
from fedsim.nn.layers import gate_insertion, input_gate
from fedsim.nn.layers.input_gate import InputGate
from fedsim.nn.layers.shortcut import Shortcut
from fedsim.nn.net import Net
from fedsim.nn.subnetwork import Added, folded
from fedsim.pruning import dynamic_channels

# ---- 10: which channels a client keeps


def test_kept_channels_are_the_first_of_a_full_sort() -> None:
    source, widths, counts = np.random.default_rng(0), (6, 9), (2, 5)
    for _ in range(50):
        f, g = (torch.tensor(source.integers(0, 3, 15) / 4) for _ in range(2))
        expected = []
        for part, mean, count in zip(f.split(widths), g.split(widths), counts, strict=True):
            order = sorted(range(len(part)), key=lambda c, part=part, mean=mean: (-float(part[c]), -float(mean[c]), c))
            expected += [c in order[:count] for c in range(len(part))]
        assert dynamic_channels.kept(f, g, widths, counts).tolist() == expected


def test_kept_numbers_can_be_multiples() -> None:
    assert dynamic_channels.aligned((1, 8, 11, 15), (16, 16, 16, 15), 8) == (8, 8, 16, 15)
    assert dynamic_channels.aligned((1, 8, 11), (16, 16, 16), 1) == (1, 8, 11)


# ---- 11, 12, 13: smaller networks

WAYS = [(name, norm, {}) for name in FAMILIES for norm in ("batch", "group")]
WAYS += [
    ("cnn", "none", {}),
    ("vgg11", "none", {}),
    ("resnet8", "batch", {"gate_sigmoid": True}),
    ("cnn", "batch", {"gate_sigmoid": False}),
]
WAYS += [(name, norm, {"gate_place": "affine"}) for name in ("cnn", "resnet8") for norm in ("batch", "group")]


@pytest.mark.parametrize(("name", "norm", "fields"), WAYS)
def test_the_sliced_network_is_the_masked_one(name, norm, fields) -> None:
    net, tree = precise(name, norm=norm, **fields)
    gate = chosen(net)
    kept, x = net.channels.kept(gate), images()
    masked = net(tree | {GATE: gate}, x)[0]
    small = net.cut(kept).plain(net.compact(tree, kept)).double()
    with torch.no_grad():
        assert torch.allclose(small(x), masked, atol=1e-10)
        assert torch.allclose(small(x), masked, atol=1e-10)  # nothing was changed in place that is needed again
    assert torch.allclose(small(x), masked, atol=1e-10)  # with gradients
    assert torch.allclose(net.cut(kept)(net.compact(tree, kept), x)[0], masked, atol=1e-10)
    assert torch.allclose(net.under_vmap()(tree | {GATE: gate}, x)[0], masked, atol=1e-10)
    assert not torch.allclose(net(tree, x)[0], masked, atol=1e-4)


def test_without_the_half_of_closed_channels_it_is_not() -> None:
    net, tree = precise("vgg11")
    gate = chosen(net)
    kept, x = net.channels.kept(gate), images()
    small_values = net.compact(tree, kept)
    for group in net.channels.groups:
        small_values[f"w/{group.gate}.bias"] = tree[f"w/{group.gate}.bias"][kept[group.name]]
    wrong = net.cut(kept).plain(small_values).double()(x)
    assert not torch.allclose(wrong, net(tree | {GATE: gate}, x)[0], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sliced_network_is_as_small_as_its_channels(name) -> None:
    net, tree = precise(name)
    gate = chosen(net)
    kept = net.channels.kept(gate)
    small = net.cut(kept).plain(net.compact(tree, kept))
    for group in net.channels.groups:
        conv, gates = small.get_submodule(group.name), small.get_submodule(group.gate)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(gates, InputGate)
        assert (conv.out_channels, conv.weight.shape[0]) == (len(kept[group.name]),) * 2
        assert gates.weight.shape == (conv.out_channels, conv.in_channels)
        assert gates.keep is None
    model_profile, counts = profiler.profile(built(name), CIFAR), [len(kept[group.name]) for group in net.channels.groups]
    found = profiler.profile(small.float(), CIFAR)
    assert dynamic_channels.exported(net.channels, model_profile, counts, False) == sum(
        layer.weights * layer.positions for layer in found.layers
    )
    without = folded(small, {name: torch.ones(len(index)) for name, index in kept.items()})
    assert not any(isinstance(layer, InputGate) for layer in without.modules())
    found = profiler.profile(without, CIFAR)
    assert dynamic_channels.exported(net.channels, model_profile, counts, True) == sum(
        layer.weights * layer.positions for layer in found.layers
    )
    assert sum(isinstance(layer, Added) for layer in without.modules()) == sum(
        isinstance(layer, Shortcut) for layer in built(name, None).modules()
    )


@pytest.mark.parametrize(("name", "norm", "fields"), WAYS)
def test_the_folded_network_is_the_masked_one_whose_gates_are_constants(name, norm, fields) -> None:
    net, tree = precise(name, norm=norm, **fields)
    gate = chosen(net)
    kept, x = net.channels.kept(gate), images()
    small = net.cut(kept).plain(net.compact(tree, kept)).double()
    values = torch.rand(net.channels.n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mine = {name: part[kept[name]] for name, part in net.channels.split(values).items()}
    found = folded(small, mine).double().eval()(x)
    assert torch.allclose(found, net(tree | {GATE: gate, GATE_VALUES: values}, x)[0], atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_is_live_where_gates_do_not_see_the_image(name) -> None:
    net, tree = precise(name, gate_bias=1.0)
    for key in tree:
        if key.startswith("w/gates.") and key.endswith("weight"):
            tree[key] = torch.zeros_like(tree[key])
    gate = chosen(net)
    kept, x = net.channels.kept(gate), images()
    live = net.cut(kept).plain(net.compact(tree, kept)).double()
    biases = {group.name: tree[f"w/{group.gate}.bias"][kept[group.name]].relu() for group in net.channels.groups}
    assert torch.allclose(folded(live, biases).double()(x), live(x), atol=1e-12)


# ---- channels skipped


@pytest.mark.parametrize(("name", "norm", "fields"), [way for way in WAYS if way[1] != "group"])
def test_skipping_channels_gives_what_multiplying_by_0_gives(name, norm, fields) -> None:
    net, tree = precise(name, norm=norm, **fields)
    module = net.plain(tree).double()
    skipping = Skipping(module)
    for x in images(4).split(1):
        assert torch.allclose(skipping(x), net(tree, x)[0], atol=1e-10)


def test_channels_are_skipped_of_one_image_under_norms_of_one_channel() -> None:
    skipping = Skipping(built("cnn"))
    with pytest.raises(ValueError, match="one image at a time; this batch has 2"):
        skipping(torch.zeros(2, *CIFAR))
    with pytest.raises(ValueError, match="before a GroupNorm, which reads them all"):
        Skipping(built("cnn", norm="group"))
    with pytest.raises(ValueError, match="gate_keep"):
        Skipping(built("cnn", None))


class Dense(nn.Module):
    """A stream that is read once more after something was added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.relu = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.flatten, self.fc = nn.Flatten(), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.relu(self.stem(x))
        out = self.relu(self.norm(self.conv(stream)) + stream)
        return self.fc(self.flatten((out + stream).mean((2, 3), keepdim=True)))


def test_a_stream_that_is_read_again_is_not_written_over() -> None:
    net = Net(gate_insertion.insert_gates(Dense(), input_gate.Gating(1.0))).to("cpu", torch.float64)
    tree, gate = drawn(net), torch.tensor([True, False, True, True])
    kept = net.channels.kept(gate)
    small = net.cut(kept).plain(net.compact(tree, kept)).double()
    with torch.no_grad():
        assert torch.allclose(small(images()), net(tree | {GATE: gate}, images())[0], atol=1e-12)
