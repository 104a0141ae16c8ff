"""Modules of a stranger: frozen parameters, a batch norm that is used twice, axes that are not channels."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from two_clients import SIZES, population

from fedsim.core import keys
from fedsim.core.tree import clone, under
from fedsim.core.types import Batch, Feed
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Train, TrainAndScore
from fedsim.fleet import packed, serial
from fedsim.fleet.cuda_graph import fleet as cuda_graph
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder
from fedsim.methods.feddp import FedDP, TrainZeroing
from fedsim.nn import optim
from fedsim.nn.channel_groups import find_groups
from fedsim.nn.net import Net
from fedsim.pruning.extrusion import ExtrudeAndProbe

FLEETS = {"serial": serial, "packed": packed, "cuda_graph": cuda_graph}


class TwiceNormed(nn.Module):
    """One batch norm, used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.out(F.relu(self.norm(self.second(x))).mean((2, 3)))


def plain() -> nn.Sequential:
    """A plain sequence of layers, which packs run as one program."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def total(net: Net, engine, work: Train, shared=None):
    site = WorkerContext(net, population(8), 0)
    order = WorkOrder(work, net, shared or net.initial, 1, sum(SIZES))
    with torch.no_grad():
        return engine.carry_out(order, Pack([0, 1], {}, [None] * 2, [[0, 0]] * 2), site).total.value()


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize(
    "own",
    [
        {"momentum": 0.9, "decay": 0.1},
        {"decay": 0.1, "optimiser": "adam"},
        {"aggregate": FedProx(0.5)},
        {"aggregate": FedNova(0.0)},
        {"aggregate": Scaffold(0.1)},
    ],
    ids=["sgd", "adam", "fedprox", "fednova", "scaffold"],
)
@pytest.mark.parametrize("make", [plain, TwiceNormed])
def test_a_frozen_parameter_is_neither_trained_nor_sent_back(make, own, fleet) -> None:
    torch.manual_seed(0)
    module = frozen(make(), *(("0.weight", "3.bias") if make is plain else ("first.weight", "norm.weight")))
    net = Net(module)
    work = Train((Feed("train", epochs=2, batch=2, augment=False),), lr=0.1, **own)
    shared = work.aggregate.shared(work.aggregate.init_memory(net.trained(net.initial)), net.initial)
    found = total(net, FLEETS[fleet], work, shared)
    told = {keys.name_of(key) for key in found if not key.startswith((keys.BUFFERS, keys.COUNTS)) and key != keys.FEDNOVA_PATH}
    assert told == {name for name, value in module.named_parameters() if value.requires_grad}


def test_training_with_frozen_parameters_is_torchs() -> None:
    torch.manual_seed(0)
    module = frozen(plain(), "0.weight", "3.bias").double()
    net, x, y = Net(module).to("cpu", torch.float64), torch.randn(5, 3, 8, 8).double(), torch.arange(5) % 4
    rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimiser = torch.optim.SGD([value for value in module.parameters() if value.requires_grad], **rates)

    state = clone(net.initial)
    state |= optim.fresh(net.trained(under(state, keys.WEIGHTS)), 0.9)
    for step in range(3):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
        _, gradient, _, _ = net.gradient(state, Batch(x, y, None, torch.tensor(step), torch.tensor(3)))
        state = net.descend(state, gradient, 0.1, 0.9, 0.1)
    for name, value in module.named_parameters():
        assert torch.allclose(state[keys.WEIGHTS + name], value), name


def test_frozen_channels_stay_as_they_are_where_closed_ones_are_cut() -> None:
    net = Net(frozen(plain(), "0.weight", "0.bias", "3.weight"))
    gate = torch.arange(net.channels.n) % 2 == 0
    state = {key: value.clone() for key, value in net.initial.items()}
    batch = Batch(torch.randn(4, 3, 8, 8), torch.arange(4), None, torch.tensor(0), torch.tensor(1))
    _, gradient, _, _ = net.gradient(state | {keys.GATE: gate}, batch, compact=True)
    after = net.descend(state, gradient, 0.1, decay=0.1)
    moved = {key for key in net.initial if not torch.equal(after[key], net.initial[key])}
    assert moved == {"w/3.bias", "w/5.weight", "w/5.bias"}
    assert net.cut(net.channels.kept(gate)).frozen == net.frozen


def test_a_frozen_layer_can_be_scored() -> None:
    net = Net(frozen(plain(), "3.weight"))
    mask = {"mask/3.weight": torch.arange(8 * 144).view(8, 144) % 2 == 0}
    feed = Feed("train", epochs=1, batch=4, augment=False, dense_gradient_layers=("3",), dense_gradient_steps=1)
    found = total(net, serial, TrainAndScore((feed,), 0.1, moves={"3": 5}), net.initial | mask)
    assert "w/3.weight" not in found


@pytest.mark.parametrize("fleet", FLEETS)
def test_a_frozen_layer_is_neither_pressed_by_the_penalty_nor_zeroed(fleet) -> None:
    """FedMef's extrusion marks a frozen layer's weights; FedDP leaves it alone."""
    net, feed = Net(frozen(plain(), "3.weight")), Feed("train", epochs=1, batch=4, augment=False)
    masks = {keys.mask(layer): torch.ones(net.shapes[layer], dtype=torch.bool) for layer in ("3", "5")}
    work = ExtrudeAndProbe((feed,), 0.1, penalty=1.0, lr0=0.2, marks={"3": 5, "5": 3})
    extruded = total(net, FLEETS[fleet], work, net.initial | masks)
    assert "w/3.weight" not in extruded
    assert {"w/0.weight", "w/5.weight"} <= extruded.keys()
    net = Net(frozen(TwiceNormed(), "first.weight"))
    zeroed = total(net, FLEETS[fleet], TrainZeroing((feed,), 0.1, theta=10.0))
    assert "w/first.weight" not in zeroed
    assert not zeroed["w/second.weight"].any()


def test_feddp_refuses_a_model_whose_convolutions_are_all_frozen() -> None:
    setting: Any = SimpleNamespace(net=Net(frozen(plain(), "0.weight")), train=SimpleNamespace(steps=0), aggregate=FedAvg())
    with pytest.raises(BadInput, match="none that is trained"):
        FedDP().init(setting, None)


def test_a_norm_over_other_rows_than_images_is_refused_by_name_in_a_padded_batch() -> None:
    net = Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0, 1), nn.Flatten(), nn.BatchNorm1d(36), nn.Unflatten(0, (4, 4)), nn.Flatten()))
    x = torch.randn(4, 3, 8, 8)
    net(net.initial, x, True)
    with pytest.raises(ValueError, match="3: a batch of 4 images, some of which do not count, reaches it as 16 rows"):
        net(net.initial, x, True, torch.tensor([1.0, 1, 1, 0]))


@pytest.mark.parametrize("real", [None, torch.tensor([1.0, 1, 1, 0])])
def test_a_batch_norm_that_is_used_twice_moves_twice(real) -> None:
    torch.manual_seed(0)
    module, x = TwiceNormed(), torch.randn(4, 3, 6, 6)
    net = Net(module)
    _, found = net(net.initial, x, True, real)
    once = copy.deepcopy(module).train()
    once(x if real is None else x[:3])
    for slot in ("running_mean", "running_var"):
        assert torch.allclose(found[f"buf/norm.{slot}"], once.norm.get_buffer(slot), atol=1e-6)
    pure = net.under_vmap()(net.initial, x, True, real)[1]
    assert all(torch.allclose(value, pure[key], atol=1e-6) for key, value in found.items())


class Viewed(nn.Module):
    """A layer reads rows of images times channels, or of images."""

    def __init__(self, rows: str) -> None:
        super().__init__()
        self.conv, self.fc, self.out, self.rows = nn.Conv2d(3, 4, 3), nn.Linear(36, 6), nn.Linear(6, 4), rows
        self.whole = nn.Linear(144, 6)

    def forward(self, x: Tensor) -> Tensor:
        images = x
        x = F.relu(self.conv(x))
        b, c = x.shape[0], x.shape[1]
        if self.rows == "channels":
            return self.out(F.relu(self.fc(x.view(b * c, -1))).view(images.shape[0], c, -1).mean(1))
        if self.rows == "number":
            return self.out(F.relu(self.fc(x.view(16, -1))).view(images.shape[0], c, -1).mean(1))
        sizes = {"size": x.size(0), "shape": b, "sizes": x.size()[0], "image": images.size(0)}
        return self.out(F.relu(self.whole(x.view(sizes[self.rows], -1))))


@pytest.mark.parametrize(
    ("rows", "groups"),
    [("channels", 0), ("number", 0), ("size", 2), ("shape", 2), ("sizes", 2), ("image", 2)],
)
def test_channels_are_only_read_where_the_images_stay_apart(rows, groups) -> None:
    module = Viewed(rows)
    assert module(torch.zeros(4, 3, 8, 8)).shape == (4, 4)
    if groups:
        assert len(find_groups(module)[1]) == groups
    else:
        with pytest.raises(ValueError, match="no channels that can be cut alone"):
            find_groups(module)
