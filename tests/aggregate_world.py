"""A small world whose clients take unequally many steps, its aggregation chosen, and a client's visit by hand; in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from small_world import FLEETS, SLOW, World, batches, drawn, loaded, masked, small, stored, world
from torch.nn import functional as F

from fedsim.core.tree import Tree, under
from fedsim.methods.fedavg import FedAvg as Method
from fedsim.methods.fedavg import State

SIZES = [5, 11, 8, 3]  # images; in batches of 4 and two epochs 4, 6, 4 and 2 steps
FALLING = replace(SLOW, schedule="cosine", rounds=10)


def having(aggregate: Any, kind: type = FLEETS[0], sizes: list[int] = SIZES, cohort: int | None = 2, **train: Any) -> World:
    made = world(stored(*drawn(sizes)), kind=kind, training=replace(FALLING, **train), cohort=cohort)
    made.setting = replace(made.setting, aggregate=aggregate)
    return made


def begun(made: World, hidden: bool = False) -> State:
    shared = masked(made.setting).shared if hidden else made.setting.net.initial
    return State(shared, made.setting.aggregate.init_memory(shared))


def played(made: World, state: State, r: int) -> State:
    made.fleet.open(r)
    return Method().round(made.setting, state, made.fleet, r)[0]


def weights(tree: Tree) -> Tree:
    return under(tree, "w/", "buf/")


def hiding(shared: Tree) -> Tree:
    """By weight: 1 where it is kept, everywhere if it has no mask."""
    return {key: shared.get("mask/" + key[2:], torch.ones_like(value)).double() for key, value in under(shared, "w/").items()}


def visit(made: World, shared: Tree, k: int, r: int, drift: Tree | None = None) -> tuple[Tree, int]:
    """What client `k` holds after local SGD by torch, every step followed by lr · drift, and its number of steps."""
    module, hidden = loaded(small(), shared).train(), hiding(shared)
    rate = made.setting.train.at(r)
    optimiser = torch.optim.SGD(module.parameters(), rate.lr, rate.momentum, weight_decay=rate.decay)
    steps = batches(made, made.setting.train.feed(), k, r, 0)
    for x, y in steps:
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        for name, value in module.named_parameters():
            value.grad *= hidden["w/" + name]
        optimiser.step()
        for name, value in module.named_parameters():
            value.data -= rate.lr * drift["w/" + name] * hidden["w/" + name] if drift else 0.0
    after = {f"w/{name}": value.detach() for name, value in module.named_parameters()}
    return after | {f"buf/{name}": value for name, value in module.named_buffers() if value.is_floating_point()}, len(steps)


def mean_of(trees: list[Tree], shares: list[float]) -> Tree:
    return {key: sum(share * tree[key] for share, tree in zip(shares, trees, strict=True)) for key in trees[0]}


def shares_of(counts: list[int]) -> list[float]:
    return [count / sum(counts) for count in counts]
