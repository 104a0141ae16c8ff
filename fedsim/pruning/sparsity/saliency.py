"""Scores of weights before training, and masks that keep the weights of largest score, in one step or in many.

Magnitude |w|; random; connection sensitivity |w g| (SNIP, Lee et al., ICLR 2019, arXiv:1810.02340); synaptic flow (SynFlow, Tanaka et
al., NeurIPS 2020, arXiv:2006.05467); preserved gradient flow (GraSP, Wang et al., ICLR 2020, arXiv:2002.07376).

Paper -> code:  c_j = dL(m w) / dm_j -> sensitivity,  R -> the sum of outputs in synflow,  S = |w dR/dw| -> synflow,
                -S = w (H g) -> gradient_flow,  T of the loss of GraSP -> temperature,  d^(tau / T) -> densities
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fedsim.core import keys, masks, rng
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.nn.loss import LossFunction, cross_entropy
from fedsim.nn.net import Net

Scores = dict[str, Tensor]  # layer -> the score of each weight, of the weight's shape; the largest are kept
Score = Callable[[Tree], Scores]  # of a model with its masks
Budget = Sequence[tuple[tuple[str, ...], int]]  # layers that are ranked together, and how many weights they keep
GRASP_PASSES = 4  # a gradient (3 forward passes) and a Hessian times a vector (8.4 to 9.1 by torch's counter), in gradients


# ---- scores


def magnitude(tree: Tree, layers: Sequence[str]) -> Scores:
    """|w|."""
    return {layer: tree[keys.weight(layer)].abs() for layer in layers}


def random(net: Net, groups: Sequence[Sequence[str]], seed: int) -> Scores:
    """Places in an order that the seed draws, one order for all layers of a group."""
    found: Scores = {}
    for place, layers in enumerate(groups):
        sizes = [net.sizes[layer] for layer in layers]
        order = rng.permutation(rng.key(seed, "mask", place), sum(sizes))
        score = torch.empty(len(order), dtype=torch.float64)
        score[order] = -torch.arange(len(order), dtype=torch.float64)
        for layer, part in zip(layers, score.split(sizes), strict=True):
            like = net.initial[keys.weight(layer)]
            found[layer] = part.view(like.shape).to(like.device)
    return found


def sensitivity(tree: Tree, gradient: Tree, layers: Sequence[str]) -> Scores:
    """|w g|, which is |dL(m w) / dm| at the weights in use. ValueError for a layer that is frozen and therefore has no gradient."""
    check(gradient, layers)
    return {layer: (tree[keys.weight(layer)] * gradient[keys.weight(layer)]).abs() for layer in layers}


def check(trained: Tree, layers: Sequence[str]) -> None:
    """ValueError for a layer whose weight is not in `trained`, a gradient or the weights that have one."""
    for layer in layers:
        if keys.weight(layer) not in trained:
            raise ValueError(f"layer {layer!r} is frozen (requires_grad = False), so that it has no gradient to be scored by")


def snip(net: Net, tree: Tree, layers: Sequence[str], batches: Sequence[Batch]) -> Scores:
    """Connection sensitivity over all images of the batches: the gradients are summed before the absolute value is taken."""
    return sensitivity(tree, mean_gradient(net, tree, batches), layers)


def grasp(net: Net, tree: Tree, layers: Sequence[str], batches: Sequence[Batch], temperature: float) -> Scores:
    """w (H g), of the loss of logits / temperature. The gradient g that a step should keep is that of all conv and linear weights."""
    loss = partial(_cooled, temperature)
    gradient = mean_gradient(net, tree, batches, loss)
    g = {key: gradient[key] for layer in net.sizes if (key := keys.weight(layer)) in gradient}
    check(g, layers)
    product = _mean(batches, lambda batch: net.hessian_vector(tree, batch, g, loss))
    return {layer: tree[key] * product[key] for layer in layers if (key := keys.weight(layer))}


def synflow(net: Net, tree: Tree, layers: Sequence[str], shape: Sequence[int]) -> Scores:
    """|w dR/dw| with every parameter and buffer at its absolute value, R the sum of the outputs for one image of ones of this `shape`.

    In float64, on the CPU, in evaluation mode: R grows with the product of the layers' weights, and float32 overflows on deep networks.
    Filters that a layer makes of its stored weight are scored as the layer uses them.
    """
    module = net.plain(tree).double()
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.abs_()
    weights = [module.requires_grad_().get_parameter(f"{layer}.weight") for layer in layers]
    with torch.enable_grad():
        flow = module(torch.ones(1, *shape, dtype=torch.float64)).sum()
        found = torch.autograd.grad(flow, weights, allow_unused=True, materialize_grads=True)
    device = next(iter(tree.values())).device
    return {layer: (w * g).abs().detach().to(device) for layer, w, g in zip(layers, weights, found, strict=True)}


def mean_gradient(net: Net, tree: Tree, batches: Sequence[Batch], loss: LossFunction = cross_entropy) -> Tree:
    """The gradient of the mean loss over all images of the batches. Norms use each batch's statistics, and none is moved."""
    return _mean(batches, lambda batch: net.gradient(tree, batch, loss=loss)[1])


def _mean(batches: Sequence[Batch], of: Callable[[Batch], Tree]) -> Tree:
    """The mean over images of what is a mean over each batch's, summed in float64."""
    images = sum(len(batch.y) for batch in batches)
    total: Tree = {}
    for batch in batches:
        part = of(batch)
        total = {key: total.get(key, 0.0) + value.double() * (len(batch.y) / images) for key, value in part.items()}
    return {key: value.to(part[key].dtype) for key, value in total.items()}


def _cooled(temperature: float, logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    return cross_entropy(logits / temperature, y, real)


# ---- masks


def densities(density: float, steps: int) -> list[float]:
    """d^(tau / T) for tau = 1 … T: each step keeps the same share of what the step before has left.

    >>> densities(0.25, 2)
    [0.5, 0.25]
    """
    return [density ** (step / steps) for step in range(1, steps)] + [density]


def pruned(tree: Tree, score: Score, steps: Sequence[Budget], classifier: str = "", of_class: int = 0) -> Tree:
    """The "mask/NAME" after all steps. Each step scores the model under the masks so far and keeps the largest scores among what is left.

    Args:
        tree: the model ("w/", "buf/").
        score: of such a model with its masks, whose pruned weights are 0.
        steps: what each step keeps; the counts of a group of layers should not grow.
        classifier: the layer of which every output keeps at least `of_class` weights, those of its largest scores.

    Raises:
        ValueError: for a score that is not finite, or where the outputs would keep more weights than a group of layers may.
    """
    held: Tree = {}
    for budget in steps:
        scores = score(masks.apply(tree, held) | held)
        after: Tree = {}
        for layers, count in budget:
            group = {layer: scores[layer] for layer in layers}
            left = {layer: held.get(keys.mask(layer), torch.ones_like(value, dtype=torch.bool)) for layer, value in group.items()}
            sure = {classifier: of_outputs(group[classifier], left[classifier], of_class)} if classifier in group and of_class else {}
            after |= {keys.mask(layer): mask for layer, mask in _largest(group, left, sure, count).items()}
        held = after
    return held


def of_outputs(score: Tensor, left: Tensor, k: int) -> Tensor:
    """The mask of the `k` largest scores among what is `left` of every output (the first axis of both), all of it where less is left."""
    chosen = torch.zeros_like(left)
    for row, scores, alive in zip(chosen, score, left, strict=True):
        row[alive] = masks.top(scores[alive], k)
    return chosen


def ranked(score: Tensor, of_output: int = 0, most: int | None = None) -> Tensor:
    """(N,) flat positions of `score` from its largest value to its smallest; the `of_output` largest of every output come first.

    most: so many are enough, of scores of which none is below 0: (min(most, N),).

    >>> ranked(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 1)
    tensor([2, 1, 3, 0])
    """
    if not of_output:
        return masks.rank(score, most)
    ranking, sure = masks.rank(score), of_outputs(score, torch.ones_like(score, dtype=torch.bool), of_output)
    return ranking[(~sure.flatten()[ranking]).int().argsort(stable=True)][:most]


def _largest(scores: Scores, left: Mapping[str, Tensor], sure: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The masks of all that is `sure`, and of the largest scores among the rest that is `left`: `count` weights in all."""
    certain = {layer: sure.get(layer, torch.zeros_like(alive)) for layer, alive in left.items()}
    needed = sum(masks.count(mask) for mask in certain.values())
    if needed > count:
        layer = next(iter(sure))
        raise ValueError(f"the outputs of {layer} need {needed:,} weights, more than the {count:,} that {', '.join(scores)} may keep")
    free = {layer: alive & ~certain[layer] for layer, alive in left.items()}
    best = masks.top_of_all({layer: score[free[layer]] for layer, score in scores.items()}, count - needed)
    return {layer: mask.masked_scatter(free[layer], best[layer]) for layer, mask in certain.items()}
