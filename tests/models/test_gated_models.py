"""Which gated channels can be cut for a client, in models of all kinds, and what is said of those that cannot."""

from __future__ import annotations

import pytest
import torch
from gated_federation import SGD, gated
from input_gate_models import CIFAR, built, drawn, images
from torch import Tensor, nn

from fedsim import models
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE
from fedsim.errors import BadInput
from fedsim.methods.adp import ADP
from fedsim.methods.fedmef import FedMef
from fedsim.methods.structured import Structured
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.dynamic_inference import Skipping
from fedsim.nn.layers import gate_insertion, input_gate
from fedsim.nn.net import Net
from fedsim.nn.subnetwork import optimised_for_inference
from fedsim.pruning import mask_adjustment


class Branches(nn.Module):
    """A stem, two convolutions of it, joined by `join`, and a classifier."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.stem, self.relu, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 10)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.relu(self.stem(x))
        one = self.norm1(self.one(stream))
        if self.join == "stream":
            return self.fc((self.relu(one + stream) + stream).mean((2, 3)))
        if self.join == "alias":  # what is added to is read again under another name
            return self.fc((self.relu(one + stream.contiguous()) + stream).mean((2, 3)))
        if self.join == "alpha":
            return self.fc(self.relu(torch.add(stream, one, alpha=0.3)).mean((2, 3)))
        if self.join == "number":
            return self.fc(self.relu(one + 1.0).mean((2, 3)))
        if self.join == "twice":  # the ReLU is not the only one that reads its input
            return self.fc((self.relu(one) - one + stream).mean((2, 3)))
        return self.fc(self.relu(one + self.norm2(self.two(stream))).mean((2, 3)))


FREE = {"stream": ["gates.one"], "alias": ["gates.one"], "alpha": [], "number": [], "two": [], "twice": []}


def net_of(join: str) -> Net:
    torch.manual_seed(0)
    return Net(gate_insertion.insert_gates(Branches(join), input_gate.Gating(0.5, sigmoid=False, bias=1.0))).to("cpu", torch.float64)


@pytest.mark.parametrize("join", FREE)
def test_channels_are_free_where_a_stream_takes_them_or_nothing_does(join) -> None:
    net = net_of(join)
    try:
        found = [group.gate for group in net.channels.groups if group.gate]
    except ValueError:
        found = []
    assert [gate for gate in found if gate != "gates.stem"] == FREE[join]


@pytest.mark.parametrize("join", FREE)
def test_what_is_cut_and_what_is_skipped_stays_the_same(join) -> None:
    net = net_of(join)
    tree, x = drawn(net), images(3)
    with torch.no_grad():
        for one in x.split(1):
            assert torch.allclose(Skipping(net.plain(tree).double())(one), net(tree, one)[0], atol=1e-10)
        if FREE[join]:
            gate = torch.tensor([True, False] * (net.channels.n // 2))
            kept = net.channels.kept(gate)
            small = net.cut(kept).plain(net.compact(tree, kept)).double()
            assert torch.allclose(small(x), net(tree | {GATE: gate}, x)[0], atol=1e-10)


@pytest.mark.parametrize("join", FREE)
def test_a_lean_network_is_the_same_one(join) -> None:
    net = net_of(join)
    tree, x = drawn(net), images(3)
    found = optimised_for_inference(net.plain(tree).double())
    with torch.no_grad():
        assert torch.allclose(found(x), net(tree, x)[0], atol=1e-10)
        assert torch.allclose(found(x), net(tree, x)[0], atol=1e-10)
    assert torch.allclose(found(x), net(tree, x)[0], atol=1e-10)


def test_networks_that_cannot_be_cut_are_refused_before_anything_is_trained() -> None:
    for module in (built("cnn", norm="nsconv", shape=(1, 4, 4), width=4), built("resnet8", norm="nsconv", shape=(1, 4, 4), width=4)):
        made = gated(module=module, training=SGD)
        with pytest.raises(BadInput, match=r'channels behind gates.*cannot be cut: model\.norm = "nsconv" normalises a filter'):
            ADP().init(made.setting, None)


def test_methods_that_cut_by_themselves_refuse_gates() -> None:
    made = gated(module=built("cnn", shape=(1, 4, 4), width=4))
    with pytest.raises(BadInput, match="leave gate_keep out"):
        Structured().init(made.setting, None)
    with pytest.raises(ValueError, match=r"gates.conv1 is a dynamic gate \(model.gate_keep\)"):
        made.setting.net.set_activation_pruning(ActivationPruning(0.5, "all", "bitmap"))


def test_what_does_not_go_together_is_reported() -> None:
    with pytest.raises(BadInput, match=r"give model\.width instead"):
        settings.ModelSettings("cnn", gate_keep=0.5, match="params", match_density=0.5)
    with pytest.raises(BadInput, match="align = 8"):
        ADP(align=8, export="none")
    with pytest.raises(BadInput, match="own means"):
        ADP(export="global", export_gate="folded")


def test_an_image_of_any_size_has_gates() -> None:
    assert built("resnet20", 0.3, 4)(torch.zeros(2, *CIFAR)).shape == (2, 10)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "vgg11"])
def test_gates_stand_beside_their_convolutions_and_the_classifier_last(name) -> None:
    plain, gated = (Net(models.build(settings.ModelSettings(name, gate_keep=keep), (3, 32, 32), 10, 0)) for keep in (None, 0.5))
    order = [layer for layer in gated.maskable if not layer.startswith("gates.")]
    assert (*list(gated.sizes)[:1], *order) == tuple(plain.sizes)
    assert FedMef(mask_classifier=False)._masked(gated) == gated.maskable[:-1]
    assert gated.maskable[-1] == plain.maskable[-1]
    places = list(gated.sizes)
    assert all(places[places.index(layer) - 1] == layer.removeprefix("gates.") for layer in places if layer.startswith("gates."))
    if name == "resnet8":
        stages = mask_adjustment.stages(gated.maskable)
        assert [{layer.removeprefix("gates.").split(".")[0] for layer in stage} for stage in stages] == [
            {"layer1"},
            {"layer2"},
            {"layer3", "fc"},
        ]


def test_layers_stand_in_the_order_of_the_forward_pass() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.norm = nn.Linear(8, 3), nn.Linear(4, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x.flatten(1))).relu())

    keep = ActivationPruning(0.5)
    net, found = Net(Turned()), profiler.profile(Turned(), (4, 1, 1), keep)
    net.set_activation_pruning(keep)
    assert list(net.sizes) == [layer.name for layer in found.layers] == ["first", "last"]
    assert found.caches == (8,)  # the input of the last layer, not the images
    assert [net.module.get_submodule(name).may_prune for name in net.sizes] == [False, True]
