"""Standardised filters under masks: pruned entries count as zeros and are 0 in use, in training, evaluation, under gates and after cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from channel_models import alike, batch, close, drawn, hard
from torch import Tensor
from torch.func import vmap

from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree
from fedsim.nn.net import Net

SHAPE = (8, 4, 3, 3)
MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5
MASK[1] = False  # a filter that is pruned whole
MASKED = "w/conv2.weight"


def effective(weight: Tensor) -> Tensor:
    """By hand, filter by filter: the masked filter standardised over all of its entries, pruned ones 0 again."""
    found = np.zeros(SHAPE)
    for row, (w, m) in enumerate(zip(weight.numpy(), MASK.numpy(), strict=True)):
        held = w * m
        found[row] = (held - held.mean()) / (held.std(ddof=1) + 1e-5) * m
    return torch.from_numpy(found)


def masked() -> tuple[Net, Tree, Net, Tree]:
    """A standardised net under a mask, and the same net with ordinary convolutions that hold the filters made by hand."""
    _, net, values = drawn("cnn", "group", True)
    _, plain, _ = drawn("cnn", "group", False)
    first = {"w/conv1.weight": net.folded(values)["w/conv1.weight"]}
    return net, values | {"mask/conv2.weight": MASK}, plain, values | first | {MASKED: effective(values[MASKED])}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("pure", [False, True])
def test_the_filters_in_use_are_those_made_by_hand(pure: bool, train: bool) -> None:
    net, tree, plain, ready = masked()
    x = batch("cnn").x
    assert close((net.under_vmap() if pure else net)(tree, x, train)[0], plain(ready, x, train)[0], 1e-12)
    assert close(net.folded(tree)[MASKED], ready[MASKED], 1e-12)
    assert torch.equal(net.folded(tree)[MASKED] != 0, MASK)


@pytest.mark.parametrize("pure", [False, True])
def test_their_gradient_is_that_of_the_loss(pure: bool) -> None:
    """Against central differences, in every kept entry of two filters; 0 at pruned ones."""
    net, tree, _, _ = masked()
    one = batch("cnn")
    gradient = (net.under_vmap() if pure else net).gradient(tree, one)[1][MASKED]
    assert not gradient[~MASK].any()
    for place in MASK[2:4].nonzero()[::5].tolist():
        at = (place[0] + 2, *place[1:])
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[at] = 1e-5
        up, down = (net.gradient(tree | {MASKED: tree[MASKED] + sign * step}, one, None)[0] for sign in (1, -1))
        assert float(gradient[at]) == pytest.approx(float(up - down) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("wrt", ["w", None])
@pytest.mark.parametrize("pure", [False, True])
def test_a_tap_sees_the_dense_gradient_of_the_filters_in_use(pure: bool, wrt: str | None) -> None:
    """It tells pruned entries apart: the gradient of the stored weight is nearly the same at all pruned entries of a filter."""
    net, tree, plain, ready = masked()
    one = batch("cnn")
    _, gradient, _, taps = (net.under_vmap() if pure else net).gradient(tree, one, wrt, tap=lambda layer, g: {layer: g}, layers=["conv2"])
    expected = plain.gradient(ready, one)[1][MASKED]
    assert close(taps["conv2"], expected, 1e-10)
    assert len(taps["conv2"][2][~MASK[2]].unique()) == int((~MASK[2]).sum())
    if wrt == "w":
        alike(gradient, net.gradient(tree, one)[1])


def test_activation_pruning_sees_the_same_filters() -> None:
    net, tree, plain, ready = masked()
    for one in (net, plain):
        one.set_activation_pruning(ActivationPruning(0.5, "bitmap", "all"))
    found, expected = net.gradient(tree, batch("cnn")), plain.gradient(ready, batch("cnn"))
    assert close(found[0], expected[0], 1e-12)
    assert not found[1][MASKED][~MASK].any()


def test_stacked_clients_have_masks_of_their_own() -> None:
    net, tree, _, _ = masked()
    trees = [tree, tree | {"mask/conv2.weight": ~MASK}]
    x = batch("cnn").x
    found = vmap(lambda held: net.under_vmap()(held, x)[0])({key: torch.stack([held[key] for held in trees]) for key in tree})
    for row, held in zip(found, trees, strict=True):
        assert close(row, net(held, x)[0], 1e-12)


def test_cuts_keep_the_filters_whatever_stands_below_the_mask() -> None:
    """Columns that are cut away go on counting, as the masked filter's."""
    net, tree, _, _ = masked()
    gate, x = hard(net), batch("cnn").x
    kept = net.channels.kept(gate)
    expected = net.under_vmap()(tree | {GATE: gate}, x)[0]
    small, compact = net.cut(kept), net.compact(tree, kept)
    assert close(net(tree | {GATE: gate}, x)[0], expected, 1e-12)
    assert close(small(compact, x)[0], expected, 1e-12)
    assert close(small.plain(compact).double()(x), expected)
    assert not small.folded(compact)[MASKED][~compact["mask/conv2.weight"]].any()
