"""A small world whose network has gates by the image: clients of unequal sizes, a client's visit and its network by hand, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gating_world import by_sorting
from small_world import FLEETS, SLOW, World, batches, loaded, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import models
from fedsim.core.tree import Tree, under
from fedsim.data.image_sets import Stored
from fedsim.federated.aggregation import FedAvg
from fedsim.federated.protocol import ClientInput
from fedsim.methods.adp import ADP, State
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.layers.input_gate import gates_of

SHAPE, CLASSES = (2, 4, 4), 3
SIZES = [5, 11, 8, 3]  # images; in batches of 4 and two epochs 4, 6, 4 and 2 steps
WIDTHS, KEPT = (4, 8), (2, 4)  # of the cnn's two gated layers at width 4, of which half stay
GATES = [f"w/gates.{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")]


def shades(sizes: list[int], seed: int = 0) -> Stored:
    """Noise of a brightness of its own in each channel of each image, which gates see; clients have the images of their own."""
    source, n = torch.Generator().manual_seed(seed), sum(sizes)
    level = torch.randint(0, 216, (n, 2, 1, 1), generator=source)
    x = (level + torch.randint(0, 40, (n, *SHAPE), generator=source)).to(torch.uint8)
    return owned(
        x, torch.randint(0, CLASSES, (n,), generator=source), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    )


def owned(x: Tensor, y: Tensor, owners: Tensor) -> Stored:
    return Stored("own", x, y, CLASSES, (0.5, 0.5), (0.25, 0.25), owners)


def module_of(keep: float | None = 0.5, **fields: Any) -> nn.Module:
    return models.build(settings.ModelSettings("cnn", width=4, gate_keep=keep, **fields), SHAPE, CLASSES, 0)


def lively(module: nn.Module) -> nn.Module:
    """Its gates open for some images and close for others from the start."""
    with torch.no_grad():
        for gate in gates_of(module).values():
            gate.weight *= 3
            gate.bias.copy_(0.3 - 0.5 * gate.weight.sum(1))
    return module


def having(
    sizes: list[int] = SIZES,
    aggregate: Any = None,
    kind: type = FLEETS[0],
    module: nn.Module | None = None,
    rounds: int = 2,
    cohort: int | None = None,
    **train: Any,
) -> World:
    module = module or lively(module_of())
    made = world(shades(sizes), module, kind, replace(SLOW, **train), cohort)
    anatomy = profiler.profile(module, SHAPE)
    made.setting = replace(made.setting, aggregate=aggregate or FedAvg(), rounds=rounds, anatomy=anatomy)
    return made


def states(made: World, method: ADP) -> tuple[list[State], list[dict[str, float]]]:
    """After round 0, 1, …, and what each of them records."""
    state, found, told = method.init(made.setting, None), [], []
    for r in range(made.setting.rounds + 1):
        made.fleet.open(r)
        state, row = method.round(made.setting, state, made.fleet, r)
        found.append(state)
        told.append(row)
    return found, told


def values_of(module: nn.Module) -> Tree:
    after = {f"w/{name}": value.detach().clone() for name, value in module.named_parameters()}
    return after | {f"buf/{name}": value.clone() for name, value in module.named_buffers() if value.is_floating_point()}


def visit(
    made: World, values: Tree, k: int, r: int, mu: float = 0.0, pulled: Tree | None = None, drift: Tree | None = None, **feed: Any
) -> Tree:
    """What client `k` holds after torch's own SGD from `values` on the gated module: pulled back by mu, and moved by lr · drift."""
    train, call = made.setting.train, feed.pop("call", 0)
    module = loaded(module_of(), {key: value.clone() for key, value in values.items()}).train()
    optimiser = torch.optim.SGD(module.parameters(), train.lr, train.momentum, weight_decay=train.decay)
    for x, y in batches(made, replace(train.feed(), **feed), k, r, call):
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x), y)
        for name, value in module.named_parameters():
            if f"w/{name}" in (pulled or {}):
                loss = loss + mu / 2 * (value - pulled[f"w/{name}"]).square().sum()  # type: ignore[index]
        loss.backward()
        optimiser.step()
        for name, value in module.named_parameters():
            value.data -= train.lr * (drift or {}).get(f"w/{name}", 0.0)
    return values_of(module)


def pixels(made: World, k: int) -> Tensor:
    """A client's training images as the network sees them, none of them moved."""
    train = made.population.train
    return (train.images(torch.from_numpy(made.population.shards["train"].of(k))).double() / 255 - 0.5) / 0.25


def seen(tree: Tree, x: Tensor, mask: Tensor | None = None, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logits, gates (B, 12)) of the cnn in evaluation mode: the largest gates stay, or those under a mask, or given numbers under it."""
    gates = []
    for i, name in enumerate(("1", "2")):
        y = F.conv2d(x, tree[f"w/conv{name}.weight"], padding=1)
        statistics = (tree[f"buf/norm{name}.running_mean"], tree[f"buf/norm{name}.running_var"])
        y = F.batch_norm(y, *statistics, tree[f"w/norm{name}.weight"], tree[f"w/norm{name}.bias"])
        s = 1 / (1 + torch.exp(-x.mean((2, 3))))
        g = (s @ tree[f"w/gates.conv{name}.weight"].T + tree[f"w/gates.conv{name}.bias"]).clamp(min=0)
        if mask is None:
            g = by_sorting(g, KEPT[i])
        else:
            g = (g if values is None else values.split(WIDTHS)[i].expand_as(g)) * mask.split(WIDTHS)[i]
        gates.append(g)
        x = F.max_pool2d((y * g[:, :, None, None]).relu(), 2)
    x = (x.flatten(1) @ tree["w/fc1.weight"].T + tree["w/fc1.bias"]).relu()
    return x @ tree["w/fc2.weight"].T + tree["w/fc2.bias"], torch.cat(gates, 1)


def measured(tree: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    """(12,) how often every channel is open, and what its gate is on the mean."""
    g = seen(tree, x)[1]
    return (g > 0).double().mean(0), g.mean(0)


def first_of(f: Tensor, g: Tensor, counts: tuple[int, ...] = KEPT) -> Tensor:
    """(12,) bool, of every layer the channels of largest f, then g, then the lower ones, by a full sort."""
    found = []
    for often, mean, count in zip(f.float().split(WIDTHS), g.float().split(WIDTHS), counts, strict=True):
        order = sorted(range(len(often)), key=lambda c, often=often, mean=mean: (-float(often[c]), -float(mean[c]), c))
        found += [c in order[:count] for c in range(len(often))]
    return torch.tensor(found)


def used(made: World, method: ADP, state: State, k: int) -> Tree:
    """The model that client `k` uses, as the method gives it where the client is."""
    shared = method.deploy(made.setting, state, made.fleet, [k])[0]
    return method.model_of(made.setting.net, ClientInput(shared, {}, made.fleet.kept.get(k, {}), *[torch.tensor(0)] * 3))


def weights(tree: Tree) -> Tree:
    return under(tree, "w/", "buf/")


def near(one: Tree, other: Tree, within: float = 2e-7) -> None:
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert torch.allclose(one[key].double(), value.double(), rtol=within, atol=within), key


def mean_of(trees: list[Tree], counts: list[int]) -> Tree:
    return {key: sum(count / sum(counts) * tree[key] for count, tree in zip(counts, trees, strict=True)) for key in trees[0]}


def coloured(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n images of each of two clients, 3x8x8, labels and owners: stripes across or down, of classes 0 and 1 red ones, of 2 and 3 blue."""
    source = torch.Generator().manual_seed(seed)
    owners, down = torch.arange(2).repeat_interleave(n), torch.randint(0, 2, (2 * n,), generator=source)
    stripes = (torch.arange(8) // 2 % 2 * 70.0).expand(8, 8)  # (H, W), down
    x = torch.randint(0, 100, (2 * n, 3, 8, 8), generator=source) + torch.where(down.view(-1, 1, 1) > 0, stripes, stripes.T)[:, None]
    x[owners == 0, 0] += 80
    x[owners == 1, 2] += 80
    return x.to(torch.uint8), 2 * owners + down, owners
