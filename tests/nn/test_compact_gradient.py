"""Gradients of kept channels alone, and the steps along them: what torch.optim.SGD does with the whole gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from channel_models import ZOO, batch, drawn, hard
from torch import Tensor

from fedsim.core.keys import GATE, GATE_STEPS
from fedsim.core.tree import Tree, clone, each, under
from fedsim.core.types import Batch, Feed
from fedsim.federated.protocol import ClientInput
from fedsim.nn import optim
from fedsim.nn.gradients.compact import ChannelBlock, CompactGradient
from fedsim.nn.net import Net
from fedsim.pruning.gated_training import TrainGated

ENTRIES = [ZOO[0], ZOO[5], ZOO[8], *ZOO[-2:]]  # flattened channels, standardised filters, residual sums, depth-wise convolutions


def case(name: str, norm: str, standardise: bool) -> tuple[Net, Tree, Batch]:
    """Float32: the kernels take nothing else."""
    _, net, values = drawn(name, norm, standardise)
    images = batch(name)
    net = net.to("cpu", torch.float32)
    return net, each(Tensor.float, values) | {GATE: hard(net)}, Batch(images.x.float(), images.y, None, images.t, images.T)


def compact(net: Net, held: Tree, images: Batch) -> tuple[Tensor, Tree, Tree]:
    loss, gradient, buffers, _ = net.gradient(held, images, compact=True)
    return loss, gradient, buffers


@torch.no_grad()
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_compact_gradient_is_the_whole_one(entry: Any) -> None:
    net, held, images = case(*entry)
    loss, found, buffers = compact(net, held, images)
    wanted, whole, moved, _ = net.gradient(held, images)
    assert isinstance(found, CompactGradient)
    assert len(found.blocks) > 2
    assert not isinstance(whole, CompactGradient)
    assert sum(value.numel() for value in found.values()) < sum(value.numel() for value in whole.values())
    spread = found.whole(held)
    assert loss == wanted
    assert list(spread) == list(whole)
    assert all(torch.equal(spread[key], value) for key, value in whole.items())
    assert all(torch.equal(buffers[key], value) for key, value in moved.items())


@torch.no_grad()
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_steps_are_those_of_torch_along_the_whole_gradient(momentum: float, decay: float) -> None:
    """Under another gate each time: a channel that closes goes on by its momentum, one that opens again has it still."""
    net, held, images = case("cnn", "group", False)
    w = under(held, "w/")
    state = clone(w | optim.fresh(w, momentum))
    theirs = {key: value.clone() for key, value in w.items()}
    optimiser = torch.optim.SGD(theirs.values(), 0.05, momentum, weight_decay=decay)
    for seed in range(5):
        held |= {GATE: hard(net, seed)} | under(state, "w/")
        for key, g in net.gradient(held | theirs, images)[1].items():
            theirs[key].grad = g
        optimiser.step()
        state = net.descend(state, compact(net, held, images)[1], torch.tensor(0.05) if seed else 0.05, momentum, decay)
    for key, value in theirs.items():
        assert not torch.equal(value, net.initial[key])
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_adam_takes_the_whole_of_it() -> None:
    net, held, images = case("cnn", "none", False)
    w = under(held, "w/")
    states = [clone(w | optim.fresh(w, 0.0, "adam")) for _ in range(2)]
    one = net.descend(states[0], compact(net, held, images)[1], 0.01, optimiser="adam")
    other = net.descend(states[1], net.gradient(held, images)[1], 0.01, optimiser="adam")
    assert all(torch.equal(one[key], value) for key, value in other.items())


@torch.no_grad()
def test_where_more_than_the_kept_channels_counts_the_gradient_is_whole() -> None:
    net, held, images = case("cnn", "none", False)
    key = "w/conv2.weight"
    mask = {"mask/conv2.weight": torch.ones(held[key].shape, dtype=torch.bool)}
    for tree, options in ((held | mask, {}), (held, {"extra": {key: held[key]}}), (held | {GATE: held[GATE].float()}, {})):
        assert not isinstance(net.gradient(tree, images, compact=True, **options)[1], CompactGradient)
    assert not isinstance(net.under_vmap().gradient(held, images, compact=True)[1], CompactGradient)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    found = compact(net.to("cpu", torch.float64), doubles, batch("cnn"))[1]
    assert isinstance(found, CompactGradient)
    assert not found.blocks
    assert all(g.shape == held[name].shape for name, g in found.items())


def test_a_client_trains_under_its_gates_as_the_reference_does() -> None:
    net, held, images = case("resnet8", "batch", False)
    gates = torch.stack([hard(net, seed) for seed in range(3)])
    own = {GATE_STEPS: gates}
    sent = ClientInput(
        {key: value for key, value in held.items() if key != GATE}, own, {}, torch.tensor(5), torch.tensor([3]), torch.tensor(0)
    )
    work = TrainGated((Feed("train", steps=3),), 0.05, 0.9, 1e-2)
    states = [clone(work.init_state(net, sent)) for _ in range(2)]
    with torch.no_grad():
        for t in range(3):
            step = Batch(images.x, images.y, None, torch.tensor(t), torch.tensor(3))
            states = [work.step(one, sent, state, step)[0] for one, state in zip((net, net.under_vmap()), states, strict=True)]
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "rows", "columns"), [((4, 6, 3), [0, 3], [1, 2, 5]), ((1, 5, 1), [0], [0, 4]), ((3, 1, 9), [2], [0])])
def test_a_block_reads_and_moves_what_indexing_does(shape: tuple[int, int, int], rows: list[int], columns: list[int]) -> None:
    w = torch.arange(float(np.prod(shape))).view(shape)
    block = ChannelBlock(shape, np.array(rows), np.array(columns))
    there = np.ix_(rows, columns)
    assert torch.equal(block.cut(w), w[there])
    moved = w.clone()
    block.step(moved, None, torch.ones(len(rows), len(columns), shape[2]), *np.float32([0.5, 0.0, 0.0]))
    w[there] -= 0.5
    assert torch.equal(moved, w)
