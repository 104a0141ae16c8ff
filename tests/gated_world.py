"""A small world of gates: a few clients, a narrow resnet8, a fleet that notes its orders; and both kinds of networks by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from small_world import Seen, World, drawn, noting, stored
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsim import models
from fedsim.core import rng
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import divide
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.protocol import Setting
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.dwfnp import DWFNP, State
from fedsim.models import settings
from fedsim.nn import optim, profiler
from fedsim.nn.net import Net
from fedsim.pruning import gates
from fedsim.pruning.gate_controller import GateController
from fedsim.pruning.hypernet_training import HypernetTraining

SHAPE, CLASSES = (1, 4, 4), 3
WIDTHS = (4, 8, 16)  # of resnet8's three gated layers at width 4
SGD = LocalTraining(epochs=0, steps=3, batch=4, lr=0.1, momentum=0.9, decay=1e-3)
QUICK = {"warmup": 0, "hyper_interval": 1, "hyper_lr": 0.02, "bias": 0.5}  # masks that learn at once, and close channels from the start


def module_of(model: str = "resnet8", norm: str = "group", standardise: bool = False) -> nn.Module:
    return models.build(settings.ModelSettings(model, width=4, norm=norm, standardise=standardise), SHAPE, CLASSES, 0)


def gated(
    sizes: tuple[int, ...] = (12, 9, 10, 7),
    module: nn.Module | None = None,
    kind: type = SerialFleet,
    training: LocalTraining = SGD,
    dtype: torch.dtype = torch.float64,
    rounds: int = 4,
    cohort: int | None = None,
    holdout: float = 0.3,
) -> World:
    """Clients with so many images of their own, some of them held out."""
    data, module = stored(*drawn(list(sizes))), module or module_of()
    population = divide(data, data, PartitionSettings(name="natural", clients=0, min_images=1, test="global", holdout=holdout), 0)
    anatomy, net = profiler.profile(module, SHAPE), Net(module).to("cpu", dtype)
    seen: list[Seen] = []
    account = CostAccount(anatomy, population, training.feed(), optim.values_per_parameter(training.momentum, training.optimiser))
    fleet = noting(kind, seen)(WorkerContext(net, population, 0, dtype=dtype), account, 2, lambda: 0.0)
    clients = population.clients
    setting = Setting(net, training, FedAvg(), rounds, cohort or clients, clients, 0, anatomy, holdout)
    return World(setting, fleet, population, seen)


def theta(state: State, part: str) -> Tree:
    return under(state.masks.hyper, f"w/{part}/")


def states(made: World, method: DWFNP, rounds: int) -> list[State]:
    """After round 0, 1, …"""
    state, found = method.init(made.setting, None), []
    for r in range(rounds + 1):
        made.fleet.open(r)
        state, _ = method.round(made.setting, state, made.fleet, r)
        found.append(state)
    return found


def batches(made: World, feed: Any, k: int, r: int, call: int = 0) -> list[tuple[Tensor, Tensor]]:
    site = made.fleet.site
    return [(step.x[0], step.y[0]) for step in Batches(made.population, feed, [k], [call], Round(0, r), "cpu", site.dtype)]


def same(one: Tree, other: Tree) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def near(one: Tree, other: Tree, within: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert torch.allclose(one[key].double(), value.double(), rtol=within, atol=within), key


# ---- in float64


class PreciseRule(HypernetTraining):
    """Hypernetworks in float64."""

    def fresh(self, seed: int, personal: bool = True) -> Tree:
        return {key: value.double() for key, value in super().fresh(seed, personal).items()}

    def z(self, seed: int) -> Tensor:
        return super().z(seed).double()

    def embeddings(self, seed: int, clients: Tensor) -> Tree:
        return {key: value.double() for key, value in super().embeddings(seed, clients).items()}


class Precise(DWFNP):
    """The method, its hypernetworks in float64."""

    def choosing(self, setting: Setting) -> GateController:
        made = super().choosing(setting)
        return replace(made, rule=PreciseRule(**{field.name: getattr(made.rule, field.name) for field in fields(HypernetTraining)}))


# ---- the network by hand


class Kept(nn.Module):
    """A group norm over the kept channels alone."""

    def __init__(self, norm: nn.GroupNorm, gate: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.gate = norm.weight, norm.bias, norm.eps, gate

    def forward(self, x: Tensor) -> Tensor:
        inside = x[:, self.gate]
        mean, var = inside.mean((1, 2, 3), keepdim=True), inside.var((1, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def by_hand(module: nn.Module, values: Tree, gate: Tensor | None = None, over: Tensor | None = None) -> nn.Module:
    """The resnet8 with the values of a tree; `gate` (28,) multiplies behind the inner ReLUs, norms see the channels in `over` only."""
    module = module.to(next(iter(values.values())).dtype).train()
    module.load_state_dict({key.partition("/")[2]: value.clone() for key, value in under(values, "w/", "buf/").items()}, strict=False)

    def hooked(part: Tensor) -> Callable[..., Tensor]:
        return lambda _, __, out: out * part.view(-1, 1, 1).to(out.dtype)

    for stage in (1, 2, 3):
        block = module.get_submodule(f"layer{stage}.0")
        if over is not None:
            block.norm1 = Kept(block.norm1, over.split(WIDTHS)[stage - 1])
        if gate is not None:
            block.relu1.register_forward_hook(hooked(gate.split(WIDTHS)[stage - 1]))
    return module


def descended(made: World, module: nn.Module, momentum: Tree, steps: list[tuple[Tensor, Tensor]], lr: float) -> tuple[Tree, Tree]:
    """Weights and momentum after torch's own SGD, which goes on from the given momentum."""
    train = made.setting.train
    optimiser = torch.optim.SGD(module.parameters(), lr, train.momentum, weight_decay=train.decay)
    for name, value in module.named_parameters():
        if f"opt/momentum/{name}" in momentum:
            optimiser.state[value]["momentum_buffer"] = momentum[f"opt/momentum/{name}"].to(value.dtype).clone()
    for x, y in steps:
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
    named = dict(module.named_parameters())
    after = {f"w/{name}": value.detach() for name, value in named.items()}
    after |= {f"buf/{name}": value for name, value in module.named_buffers() if value.is_floating_point()}
    return after, {f"opt/momentum/{name}": optimiser.state[value]["momentum_buffer"] for name, value in named.items()}


def mean_of(trees: list[Tree], shares: list[float] | None = None) -> Tree:
    shares = shares or [1 / len(trees)] * len(trees)
    return {key: sum(share * tree[key].double() for share, tree in zip(shares, trees, strict=True)) for key in trees[0]}


# ---- the hypernetworks by hand

GRU = nn.GRU(64, 128, bidirectional=True, batch_first=True).double()


def logits(net: Tree, x: Tensor) -> Tensor:
    """(K, n) of torch's own layers; x (K, 64 · 3)."""
    names = {"ih": "weight_ih", "hh": "weight_hh", "ih_bias": "bias_ih", "hh_bias": "bias_hh"}
    slots = {f"{t}_l0{s}": net[o][d] for o, t in names.items() for d, s in enumerate(("", "_reverse"))}
    h = functional_call(GRU, slots, (x.view(-1, 3, 64),))[0]
    h = F.layer_norm(h, (256,), net["norm"], net["shift"]).relu()
    maps = F.normalize(net["map"], dim=1) * net["length"].unsqueeze(1) if "length" in net else net["map"]
    return torch.cat([h[:, layer] @ rows.T for layer, rows in enumerate(maps.split(WIDTHS))], 1)


def soft(o: Tensor, key: Tensor, kind: str, bias: float) -> Tensor:
    """sigmoid((o + g + b) / 0.4)."""
    return torch.sigmoid((o + gates.gumbel(rng.fold(key, kind), 28).double() + bias) / 0.4)


def hard(y: Tensor, within: Tensor | None = None) -> Tensor:
    """(n,) 1 where y >= 0.5 (inside of `within`), and in an empty layer at the largest."""
    inside = torch.ones_like(y) if within is None else within
    kept = (y.detach() >= 0.5).double() * inside
    for part, score, held in zip(kept.split(WIDTHS), y.detach().split(WIDTHS), inside.split(WIDTHS), strict=True):
        if not part.any():
            part[(score - 10 * (1 - held)).argmax()] = 1
    return kept


def straight(y: Tensor, within: Tensor | None = None) -> Tensor:
    return hard(y, within) + y - y.detach()


def cost(gate: Tensor) -> Tensor:
    """T of resnet8 at width 4 on 4x4 images."""
    total = torch.zeros((), dtype=torch.float64)
    for c, enter, leave, positions in zip((part.sum() for part in gate.double().split(WIDTHS)), (4, 4, 8), WIDTHS, (16, 4, 1), strict=True):
        total = total + (9 * enter * c + 3 * c + 9 * c * leave + 3 * leave) * positions
    return total


FULL = float(cost(torch.ones(28)))


def penalty(gate: Tensor, target: float) -> Tensor:
    """2 R."""
    r = cost(gate) / FULL
    if r > target:
        return 4 * torch.log(r.clamp(min=target + 0.005) / target)
    return 4 * torch.log(target / r.clamp(max=target - 0.005))


def leaves(tree: Tree) -> Tree:
    return {key: value.detach().clone().requires_grad_() for key, value in tree.items()}


Loss = Callable[[int, Tensor], Tensor]  # client's place, its soft gate


def chain(w: Tree, e: Tensor, z: Tensor, key: Tensor, keys: Tensor, targets: list[float], keep: float, bias: float, loss: Loss) -> Tensor:
    """(1/K) sum CE(net(x; m_i)) + 2 R(T(v'), p) + (1/K) sum 2 R(T(sg(v'') * merge(v'', u'')), p_i), from the formulas at once."""
    o = logits({name.removeprefix("w/base/"): value for name, value in under(w, "w/base/").items()}, z)[0]
    choice = logits({name.removeprefix("w/client/"): value for name, value in under(w, "w/client/").items()}, e)
    total = penalty(straight(soft(o, key, "base", bias)), keep)
    for i, mine in enumerate(keys):
        v, u = soft(o, mine, "v", bias), soft(choice[i], mine, "u", bias)
        total = total + loss(i, v * torch.where(v >= 0.5, u, torch.ones_like(u))) / len(keys)
        held = hard(soft(o, mine, "base of client", bias))
        total = total + penalty(held * straight(soft(choice[i], mine, "client", bias), held), targets[i]) / len(keys)
    return total
