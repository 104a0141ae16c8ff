"""A small world: a few clients with images of their own, a small net, and a fleet that notes what passes through it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed, LocalTraining
from fedsim.data.image_sets import Stored
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import Population, divide
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.protocol import Setting
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.fedtiny import FedTiny, State
from fedsim.nn import optim, profiler
from fedsim.nn.net import Net

FLEETS = [SerialFleet, PackedFleet]
SLOW = LocalTraining(batch=4, epochs=2, lr=0.1, momentum=0.9, decay=1e-3)


@dataclass
class Seen:
    """One order that the method gave, and what came back."""

    r: int
    work: Any
    clients: list[int]
    shared: Tree
    own: Tree
    net: Net | None
    reply: Any


@dataclass
class World:
    """A few clients, and a fleet that notes what passes through it."""

    setting: Setting
    fleet: Any
    population: Population
    seen: list[Seen] = field(default_factory=list)

    def play(self, method: FedTiny, rounds: int, public: Stored | None = None, state: State | None = None) -> tuple[State, list[dict]]:
        """The state after round `rounds`, and what each round recorded: from round 0, or from round 1 of a given state."""
        found: list[dict] = []
        begin = 1 if state else 0
        state = state or method.init(self.setting, public)
        for r in range(begin, rounds + 1):
            self.fleet.open(r)
            state, told = method.round(self.setting, state, self.fleet, r)
            found.append(told)
        return state, found


def noting(kind: type, seen: list[Seen]) -> type:
    """The fleet, which notes its orders."""

    class Noting(kind):  # type: ignore[misc, valid-type]
        def run(self, work, cohort, shared, own=None, net=None):  # type: ignore[no-untyped-def]
            reply = super().run(work, cohort, shared, own, net)
            seen.append(Seen(self.r, work, sorted(cohort), shared, own or {}, net, reply))
            return reply

    return Noting


def small() -> nn.Module:
    """36 weights in the first layer, then 216, 240 and 30."""
    torch.manual_seed(1)
    layers = {"conv1": nn.Conv2d(1, 4, 3, padding=1, bias=False), "norm1": nn.BatchNorm2d(4), "relu1": nn.ReLU()}
    layers |= {"conv2": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), "norm2": nn.BatchNorm2d(6), "relu2": nn.ReLU()}
    layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(24, 10), "relu3": nn.ReLU(), "fc2": nn.Linear(10, 3)}
    return nn.Sequential(OrderedDict(layers))


def drawn(sizes: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and owners."""
    generator, n = torch.Generator().manual_seed(seed), sum(sizes)
    x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return x, torch.randint(0, 3, (n,), generator=generator), owners


def stored(x: Tensor, y: Tensor, owners: Tensor | None = None, mean: float = 0.5, std: float = 0.25) -> Stored:
    return Stored("own", x, y, 3, (mean,), (std,), owners)


def world(
    data: Stored, module: nn.Module | None = None, kind: type = SerialFleet, training: LocalTraining = SLOW, cohort: int | None = None
) -> World:
    """Clients with the images of their own, in float64."""
    module = module or small()
    population = divide(data, data, PartitionSettings(name="natural", clients=0, min_images=1, test="global"), 0)
    anatomy = profiler.profile(module, data.shape)
    net = Net(module).to("cpu", torch.float64)
    seen: list[Seen] = []
    account = CostAccount(anatomy, population, training.feed(), optim.values_per_parameter(training.momentum, training.optimiser))
    fleet = noting(kind, seen)(WorkerContext(net, population, 0, dtype=torch.float64), account, 2, lambda: 0.0)
    setting = Setting(net, training, FedAvg(), 10, cohort or population.clients, population.clients, 0, None)
    return World(setting, fleet, population, seen)


def masked(setting: Setting, share: float = 0.4, seed: int = 3) -> State:
    """A sparse model with random masks, random weights and random running statistics."""
    generator = torch.Generator().manual_seed(seed)
    shared = dict(setting.net.initial)
    for key, value in under(shared, "buf/").items():
        shared[key] = value + torch.rand(value.shape, generator=generator)
    for layer in setting.net.maskable:
        name = f"{layer}.weight"
        shared["mask/" + name] = torch.rand(shared["w/" + name].shape, generator=generator) < share
        shared["w/" + name] = shared["w/" + name] * shared["mask/" + name]
    return State(shared, {})


def loaded(module: nn.Module, tree: Tree) -> nn.Module:
    """The module with the values of a tree, in float64."""
    values = {key.partition("/")[2]: value for key, value in under(tree, "w/", "buf/").items()}
    module = module.double()
    module.load_state_dict(values, strict=False)
    return module


def batches(made: World, feed: Feed, k: int, r: int, call: int) -> list[tuple[Tensor, Tensor]]:
    steps = Batches(made.population, feed, [k], [call], Round(0, r), "cpu", torch.float64)
    return [(step.x[0], step.y[0]) for step in steps]


def kept(shared: Tree) -> dict[str, int]:
    return {key[5:].removesuffix(".weight"): int(mask.sum()) for key, mask in under(shared, "mask/").items()}
