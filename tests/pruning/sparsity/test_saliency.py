"""Scores of weights against closed forms, differences and plain torch, and the masks that many steps make of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.core.tree import Tree, clone
from fedsim.core.types import Batch
from fedsim.nn.net import Net
from fedsim.pruning.sparsity import saliency
from fedsim.pruning.sparsity.masked_averaging import drawn

Weights = Sequence[Tensor]


def net_of(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> Net:
    return Net(nn.Sequential(*layers)).to("cpu", dtype)


def linear_net(*widths: int, activation: type[nn.Module] = nn.ReLU, bias: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second, bias=bias), activation()]
    return net_of(*layers[:-1])


def batch_of(x: Tensor, y: Tensor) -> Batch:
    return Batch(x, y, None, torch.tensor(0), torch.tensor(1))


def images(n: int, *shape: int, classes: int = 4, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return batch_of(x, torch.randint(0, classes, (n,), generator=generator))


def cut(whole: Batch, *sizes: int) -> list[Batch]:
    return [batch_of(x, y) for x, y in zip(whole.x.split(sizes), whole.y.split(sizes), strict=True)]


def layers_of(net: Net) -> tuple[str, ...]:
    return tuple(net.sizes)


# ---- SNIP


def convolutional() -> Net:
    torch.manual_seed(1)
    layers = {"conv": nn.Conv2d(2, 3, 3, padding=1), "relu": nn.ReLU(), "flatten": nn.Flatten(), "fc": nn.Linear(3 * 16, 4)}
    return Net(nn.Sequential(OrderedDict(layers))).to("cpu", torch.float64)


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3)])
def test_connection_sensitivity_is_the_derivative_by_an_explicit_mask(sizes) -> None:
    net, seen = convolutional(), images(11, 2, 4, 4)
    tree = net.initial
    conv, fc = (torch.ones_like(tree[f"w/{layer}.weight"]).requires_grad_() for layer in ("conv", "fc"))
    hidden = F.conv2d(seen.x, tree["w/conv.weight"] * conv, tree["w/conv.bias"], padding=1).relu()
    F.cross_entropy(F.linear(hidden.flatten(1), tree["w/fc.weight"] * fc, tree["w/fc.bias"]), seen.y).backward()
    scores = saliency.snip(net, tree, ("conv", "fc"), cut(seen, *sizes))
    for layer, mask in (("conv", conv), ("fc", fc)):
        assert mask.grad is not None
        torch.testing.assert_close(scores[layer], mask.grad.abs(), rtol=1e-10, atol=1e-14)


def test_gradients_are_summed_before_the_absolute_value_is_taken() -> None:
    """One linear layer, logits W x: of two images whose gradients cancel nothing is left."""
    net = linear_net(2, 2)
    tree = net.initial | {"w/1.weight": torch.zeros(2, 2, dtype=torch.float64) + 0.5}
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    cancelling = [batch_of(x[:1], torch.tensor([0])), batch_of(x[1:], torch.tensor([1]))]
    assert float(saliency.snip(net, tree, ("1",), cancelling)["1"].max()) < 1e-15
    assert float(saliency.snip(net, tree, ("1",), cancelling[:1])["1"].min()) > 0.1


def test_a_scaled_loss_keeps_the_same_weights() -> None:
    net, seen = convolutional(), [images(9, 2, 4, 4)]
    kept = []
    for scale in (1.0, 37.0):
        gradient = saliency.mean_gradient(net, net.initial, seen, lambda logits, y, real, scale=scale: scale * F.cross_entropy(logits, y))
        scores = saliency.sensitivity(net.initial, gradient, ("conv", "fc"))
        kept.append(saliency.pruned(net.initial, lambda tree, scores=scores: scores, [[(("conv", "fc"), 60)]]))
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_no_statistics_of_norms_move() -> None:
    torch.manual_seed(0)
    net = net_of(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    before, seen = clone(net.initial), [images(6, 1, 4, 4)]
    saliency.snip(net, net.initial, ("0", "4"), seen)
    saliency.grasp(net, net.initial, ("0", "4"), seen, 200.0)
    saliency.synflow(net, net.initial, ("0", "4"), (1, 4, 4))
    assert all(torch.equal(value, net.initial[key]) for key, value in before.items())
    assert all(float(value.abs().max()) == 0 for key, value in net.initial.items() if key.endswith("running_mean"))


# ---- GraSP


def squared_norm(w: Weights, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """1/2 |g|^2 of the tanh net in plain torch."""
    leaves = [value.clone().requires_grad_() for value in w]
    loss = F.cross_entropy((x.flatten(1) @ leaves[0].T).tanh() @ leaves[1].T / temperature, y)
    return sum((g**2).sum() for g in torch.autograd.grad(loss, leaves)) / 2


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_gradient_flow_against_central_differences_on_40_weights(temperature) -> None:
    net, seen = linear_net(4, 5, 4, activation=nn.Tanh), images(10, 1, 2, 2)
    w = [net.initial["w/1.weight"], net.initial["w/3.weight"]]
    assert sum(value.numel() for value in w) == 40
    scores, step = saliency.grasp(net, net.initial, ("1", "3"), [seen], temperature), 1e-4
    for layer, place in (("1", 0), ("3", 1)):
        wanted = torch.zeros_like(w[place])
        for i in range(wanted.numel()):
            ends = []
            for sign in (1, -1):
                moved = [value.clone() for value in w]
                moved[place].view(-1)[i] += sign * step
                ends.append(squared_norm(moved, seen.x, seen.y, temperature))
            wanted.view(-1)[i] = (ends[0] - ends[1]) / (2 * step) * w[place].view(-1)[i]
        torch.testing.assert_close(scores[layer], wanted, rtol=1e-5, atol=1e-7 * float(wanted.abs().max()))


def test_gradient_flow_of_halves_is_that_of_the_whole_and_only_its_order_counts() -> None:
    net, seen = linear_net(4, 6, 5, 4, activation=nn.Tanh, bias=True), images(12, 1, 2, 2)
    layers = layers_of(net)
    whole = saliency.grasp(net, net.initial, layers, [seen], 200.0)
    halves = saliency.grasp(net, net.initial, layers, cut(seen, 5, 7), 200.0)
    kept = [
        saliency.pruned(net.initial, lambda tree, scores=scores: scores, [[(layers, 30)]])
        for scores in (whole, halves, {layer: score / 13 for layer, score in whole.items()})
    ]
    for layer in layers:
        torch.testing.assert_close(whole[layer], halves[layer], rtol=1e-9, atol=1e-18)
    for other in kept[1:]:
        assert all(torch.equal(value, other[key]) for key, value in kept[0].items())


def test_gradient_flow_counts_the_gradient_of_layers_that_are_not_scored() -> None:
    net, seen = linear_net(4, 5, 4, activation=nn.Tanh), [images(10, 1, 2, 2)]
    both, last = (saliency.grasp(net, net.initial, layers, seen, 200.0) for layers in (("1", "3"), ("3",)))
    assert torch.equal(both["3"], last["3"])


# ---- SynFlow


def flow(net: Net, x: Tensor) -> Tensor:
    """The sum of outputs of a plain sequence for |w|, in the dtype of x."""
    w = [value.abs().to(x.dtype) for key, value in net.initial.items() if key.endswith("weight")]
    x = F.max_pool2d(F.conv2d(x, w[0], padding=1).relu(), 2)
    return F.linear(F.linear(F.conv2d(x, w[1]).relu().flatten(1), w[2]).relu(), w[3]).sum()


def pooled() -> Net:
    torch.manual_seed(3)
    parts = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2, bias=False), nn.ReLU()]
    return net_of(*parts, nn.Flatten(), nn.Linear(20, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))


def test_the_scores_of_every_layer_sum_to_the_flow() -> None:
    net = pooled()
    before = clone(net.initial)
    scores = saliency.synflow(net, net.initial, layers_of(net), (2, 6, 6))
    whole = float(flow(net, torch.ones(1, 2, 6, 6, dtype=torch.float64)))
    assert [float(score.sum()) for score in scores.values()] == pytest.approx([whole] * 4, rel=1e-12)
    assert all(torch.equal(value, net.initial[key]) for key, value in before.items())  # signs too
    assert all(float(score.min()) >= 0 for score in scores.values())


def test_the_flow_through_two_linear_layers_by_hand() -> None:
    """S of W_2[k, j] is |W_2[k, j]| · sum_i |W_1[j, i]|."""
    net = linear_net(3, 4, 2)
    first, second = (net.initial[f"w/{layer}.weight"].abs() for layer in ("1", "3"))
    scores = saliency.synflow(net, net.initial, ("1", "3"), (1, 1, 3))
    torch.testing.assert_close(scores["3"], second * first.sum(1)[None, :])
    torch.testing.assert_close(scores["1"], first * second.sum(0)[:, None])


def test_buffers_are_absolute_too() -> None:
    net = net_of(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2, bias=False))
    scores = []
    for sign in (1.0, -1.0):
        tree = net.initial | {"buf/1.running_mean": torch.full((2,), sign * 0.3, dtype=torch.float64)}
        scores.append(saliency.synflow(net, tree, ("3",), (1, 1, 1))["3"])
    assert torch.equal(*scores)


def test_permuted_hidden_units_have_permuted_scores() -> None:
    net, order = linear_net(5, 7, 3), torch.randperm(7, generator=torch.Generator().manual_seed(5))
    moved = net.initial | {"w/1.weight": net.initial["w/1.weight"][order], "w/3.weight": net.initial["w/3.weight"][:, order]}
    plain, other = (saliency.synflow(net, tree, ("1", "3"), (1, 1, 5)) for tree in (net.initial, moved))
    torch.testing.assert_close(other["1"], plain["1"][order])
    torch.testing.assert_close(other["3"], plain["3"][:, order])


def test_float64_agrees_with_float32_on_a_small_net_and_does_not_overflow_on_a_deep_one() -> None:
    net = pooled()
    scores = saliency.synflow(net, net.initial, layers_of(net), (2, 6, 6))
    w = [value for key, value in net.initial.items() if key.endswith("weight")]
    single = [value.float().abs().requires_grad_() for value in w]
    x = F.max_pool2d(F.conv2d(torch.ones(1, 2, 6, 6), single[0], padding=1).relu(), 2)
    out = F.linear(F.linear(F.conv2d(x, single[1]).relu().flatten(1), single[2]).relu(), single[3]).sum()
    for score, value, g in zip(scores.values(), single, torch.autograd.grad(out, single), strict=True):
        torch.testing.assert_close(score.float(), value * g, rtol=1e-5, atol=1e-7)
    deep = net_of(nn.Flatten(), *[nn.Linear(64, 64, bias=False) for _ in range(70)], dtype=torch.float32)
    wide = {key: value * 8 for key, value in deep.initial.items()}
    last = saliency.synflow(deep, wide, ("70",), (1, 8, 8))["70"]
    assert bool(last.isfinite().all())
    assert float(last.max()) > torch.finfo(torch.float32).max


def test_a_hundred_steps_empty_no_layer_and_one_step_may() -> None:
    net = linear_net(16, 24, 256, 256, 24, 16, 10)
    layers, n = layers_of(net), sum(net.sizes.values())
    assert len(layers) == 6
    kept = {}
    for steps in (1, 100):
        budget = [[(layers, floor(d * n))] for d in saliency.densities(0.01, steps)]
        held = saliency.pruned(net.initial, lambda tree: saliency.synflow(net, tree, layers, (1, 4, 4)), budget)
        kept[steps] = [int(mask.sum()) for mask in held.values()]
        assert sum(kept[steps]) == floor(0.01 * n)
    assert min(kept[100]) > 0
    assert min(kept[1]) == 0


# ---- masks


def test_densities() -> None:
    assert saliency.densities(0.3, 1) == [0.3]
    assert saliency.densities(0.001, 3) == pytest.approx([0.1, 0.01, 0.001])
    assert saliency.densities(0.29, 100)[-1] == 0.29


def tree_of(**sizes: tuple[int, ...]) -> Tree:
    return {keys.weight(layer): torch.ones(shape) for layer, shape in sizes.items()}


def test_masks_are_nested_whatever_the_scores_do_and_counts_are_exact() -> None:
    tree, generator, seen = tree_of(a=(4, 5), b=(3, 10)), np.random.default_rng(0), []

    def score(held: Tree) -> saliency.Scores:
        seen.append({layer: held[keys.weight(layer)] != 0 for layer in ("a", "b")})
        return {layer: torch.tensor(generator.normal(size=held[keys.weight(layer)].shape)) for layer in ("a", "b")}

    counts = [40, 17, 17, 3]
    last = saliency.pruned(tree, score, [[(("a", "b"), count)] for count in counts])
    seen.append({layer: last[keys.mask(layer)] for layer in ("a", "b")})
    assert [sum(int(mask.sum()) for mask in masks.values()) for masks in seen] == [50, *counts]
    for before, after in pairwise(seen):
        assert not any(bool((after[layer] & ~before[layer]).any()) for layer in ("a", "b"))


def test_pruned_weights_do_not_come_back_where_all_scores_are_equal() -> None:
    scores = iter([{"a": torch.tensor([0.0, 0, 0, 1, 1, 1])}, {"a": torch.zeros(6)}])
    held = saliency.pruned(tree_of(a=(6,)), lambda tree: next(scores), [[(("a",), 3)], [(("a",), 2)]])
    assert held["mask/a.weight"].tolist() == [False, False, False, True, True, False]


def test_layers_of_a_group_are_ranked_together_and_ties_go_to_the_first() -> None:
    scores = {"a": torch.tensor([1.0, 5, 5]), "b": torch.tensor([5.0, 6, 0])}
    together = saliency.pruned(tree_of(a=(3,), b=(3,)), lambda tree: scores, [[(("a", "b"), 3)]])
    apart = saliency.pruned(tree_of(a=(3,), b=(3,)), lambda tree: scores, [[(("a",), 1), (("b",), 2)]])
    assert [mask.int().tolist() for mask in together.values()] == [[0, 1, 1], [0, 1, 0]]
    assert [mask.int().tolist() for mask in apart.values()] == [[0, 1, 0], [1, 1, 0]]


def test_every_output_keeps_its_largest_scores_within_the_same_count() -> None:
    scores = {"a": torch.tensor([9.0, 8, 7, 6]), "fc": torch.tensor([[1.0, 3, 2], [5.0, 4, 6], [0.0, 0, 0]])}
    tree = tree_of(a=(4,), fc=(3, 3))
    held = saliency.pruned(tree, lambda tree: scores, [[(("a", "fc"), 5)]], "fc", 1)
    assert held["mask/a.weight"].int().tolist() == [1, 1, 0, 0]
    assert held["mask/fc.weight"].int().tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"the outputs of fc need 6 weights, more than the 5 that a, fc may keep"):
        saliency.pruned(tree, lambda tree: scores, [[(("a", "fc"), 5)]], "fc", 2)


def test_what_an_output_keeps_stays_within_what_the_step_before_has_left() -> None:
    """Of the second output one weight is left: it stays, though it could keep two."""
    left = torch.tensor([[True, True, True], [False, True, False]])
    score = torch.tensor([[1.0, 3, 2], [9.0, 0, 8]])
    assert saliency.of_outputs(score, left, 2).int().tolist() == [[0, 1, 1], [0, 1, 0]]


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="a score is nan"):
        saliency.pruned(tree_of(a=(2,)), lambda tree: {"a": torch.tensor([1.0, float("nan")])}, [[(("a",), 1)]])


def test_a_frozen_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 'b' is frozen"):
        saliency.sensitivity(tree_of(a=(2,), b=(2,)), {"w/a.weight": torch.ones(2)}, ("a", "b"))


def test_random_scores_of_a_layer_keep_what_drawn_keeps_and_those_of_all_layers_spread_evenly() -> None:
    net = linear_net(20, 30, 40, 10)
    layers, counts = layers_of(net)[1:], {"3": 300, "5": 50}
    alone = saliency.random(net, [(layer,) for layer in layers], 7)
    held = saliency.pruned(net.initial, lambda tree: alone, [[((layer,), counts[layer]) for layer in layers]])
    assert all(torch.equal(value, held[key]) for key, value in drawn(net, counts, 7).items())
    shares = []
    for seed in range(40):
        together = saliency.random(net, [layers], seed)
        shares.append(int(saliency.pruned(net.initial, lambda tree, s=together: s, [[(layers, 160)]])["mask/5.weight"].sum()) / 160)
    mean, deviation = 0.25, (0.25 * 0.75 / 160 * (1440 / 1599)) ** 0.5  # hypergeometric: 400 of 1,600
    assert abs(np.mean(shares) - mean) < 4 * deviation / 40**0.5
    assert np.std(shares) == pytest.approx(deviation, rel=0.5)
