"""Masks: which weights are kept. A mask is bool, stands beside its weight under "mask/", and is counted, never inferred from zeros.

Every choice is exact in number and depends on values alone: of equal scores the lower flat position goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import mask_of
from fedsim.core.tree import Tree

CHUNK = 1 << 11  # positions of a gradient that are ranked at once
_LAST = 2**31 - 1  # a tensor has fewer positions than that
_NEVER, _BEYOND = -(2**63), 2**63 - 1  # keys below and above those of every score


def apply(tree: Tree, masks: Tree) -> Tree:
    """The tree with every masked weight multiplied by its mask, so that pruned weights are exactly 0.

    Args:
        tree: "w/NAME", "opt/momentum/NAME", … -> tensor. Entries without a mask stay as they are.
        masks: a tree with "mask/NAME" (bool, the shape of the weight); its other keys are not read.

    >>> apply({"w/a": torch.tensor([1.0, 2.0])}, {"mask/a": torch.tensor([True, False])})
    {'w/a': tensor([1., 0.])}
    """
    return {key: times(value, masks[mask_of(key)]) if mask_of(key) in masks else value for key, value in tree.items()}


def times(value: Tensor, mask: Tensor) -> Tensor:
    """value · mask. On the CPU a product of two dtypes is slow, and so the mask is converted first."""
    return value * (mask if value.is_cuda else mask.to(value.dtype))


def ones(masks: Tree) -> dict[str, int]:
    """The number of kept weights, by the weight's name.

    >>> ones({"mask/conv.weight": torch.tensor([True, False, True])})
    {'conv.weight': 2}
    """
    return {key.removeprefix(keys.MASKS): count(mask) for key, mask in masks.items() if key.startswith(keys.MASKS)}


def count(mask: Tensor) -> int:
    """The number of True entries. Sums of bool tensors convert every entry first, which takes ten times as long."""
    return int(mask.count_nonzero()) if mask.is_cuda else int(np.count_nonzero(mask.numpy()))


def check(tree: Tree) -> None:
    """Raises ValueError for a mask that is not bool or not of its weight's shape."""
    for key, mask in tree.items():
        if not key.startswith(keys.MASKS):
            continue
        name = key.removeprefix(keys.MASKS)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} is {mask.dtype}; a mask is bool")
        weight = tree.get(keys.WEIGHTS + name)
        if weight is not None and weight.shape != mask.shape:
            raise ValueError(f"mask {name!r} is {tuple(mask.shape)}, its weight is {tuple(weight.shape)}")


def rank(score: Tensor, most: int | None = None) -> Tensor:
    """(N,) flat positions of `score` from its largest value to its smallest; ValueError for a score that is not finite.

    most: so many positions are enough, of scores of which none is below 0: (min(most, N),).
    """
    flat = score.flatten()
    if not bool(flat.isfinite().all()):
        raise ValueError(f"a score is {flat[~flat.isfinite()][0].item()}; only finite scores can be ranked")
    if most is None:
        return flat.sort(descending=True, stable=True).indices
    return _LAST - (_keys(flat, 0).topk(min(most, len(flat))).values & 0xFFFFFFFF)


def first(ranking: Tensor, k: int, shape: torch.Size) -> Tensor:
    """The mask (bool, of `shape`) that keeps the first `k` positions of a ranking that `rank` made."""
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=ranking.device)
    mask[ranking[:k]] = True
    return mask.view(shape)


def top(score: Tensor, k: int) -> Tensor:
    """The mask, bool and of the shape of `score`, that keeps its `k` largest entries. ValueError for a score that is not finite.

    >>> top(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2)  # of equal scores the lower position goes first
    tensor([ True, False,  True, False])
    """
    return first(rank(score), k, score.shape)


def budget(sizes: Mapping[str, int], density: float) -> int:
    """The number of weights that the masked layers may keep together: floor(d n) - n_1.

    Args:
        sizes: layer -> number of weights, in network order. The first layer, of n_1 weights, stays dense; n is the sum of all.
        density: d, the kept share of all n weights. ValueError where it leaves less than one weight for each masked layer.

    >>> budget({"conv": 10, "fc": 90}, density=0.25)
    15
    """
    (name, dense), *masked = sizes.items()
    whole = sum(sizes.values())
    left = floor(density * whole + 1e-9) - dense
    if left < len(masked):
        least = ceil(1e4 * (dense + len(masked)) / whole) / 1e4
        raise ValueError(
            f"density = {density} leaves {max(left, 0)} of {whole:,} weights for the {len(masked)} layers to be pruned, each needs one:"
            f" {name} stays dense with {dense:,}. Take at least {least}"
        )
    return left


def top_of_all(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks by one ranking of all layers together: layer -> bool, `k` True in all. A layer may keep nothing.

    Of equal scores the earlier layer goes first, and in a layer the lower position. ValueError for a score that is not finite.

    >>> top_of_all({"conv": torch.tensor([3.0, 1.0]), "fc": torch.tensor([3.0, 2.0])}, 2)
    {'conv': tensor([ True, False]), 'fc': tensor([ True, False])}
    """
    whole = top(torch.cat([score.flatten() for score in scores.values()]), k)
    parts = whole.split([score.numel() for score in scores.values()])
    return {layer: part.view(score.shape) for (layer, score), part in zip(scores.items(), parts, strict=True)}


def largest(g: Tensor, mask: Tensor, k: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(index (k,) int32, value (k,) float32) of the `k` largest |g| among pruned positions, largest first. Fit for `vmap`.

    Args:
        g: a gradient, of any shape; it is read chunk by chunk, so that no second tensor of its size is made.
        mask: bool, of g's shape: the kept positions.
        k: at most the number of pruned positions.
    """
    flat, pruned = g.flatten(), ~mask.flatten()
    best = torch.full((k,), _NEVER, dtype=torch.int64, device=g.device)
    chunk = max(chunk, k // 8, len(flat) // 64)  # long buffers and layers are gone through in fewer steps
    for begin in range(0, flat.shape[0], chunk):
        part = slice(begin, begin + chunk)
        found = torch.where(pruned[part], _keys(flat[part].abs(), begin), _NEVER)
        best = torch.cat([best, found]).topk(k, sorted=False).values
    index = _LAST - (best.sort(descending=True).values & 0xFFFFFFFF)
    return index.to(torch.int32), flat[index].float()


def smallest(w: Tensor, mask: Tensor, k: int) -> Tensor:
    """(k,) int64 flat positions of the `k` smallest |w| among kept ones, smallest first. Fit for `vmap`."""
    flat = w.flatten().abs()
    order = torch.where(mask.flatten(), (flat.float().view(torch.int32).long() << 32) | _positions(flat), _BEYOND)
    return order.topk(k, largest=False).values & 0xFFFFFFFF


def largest_kept(w: Tensor, mask: Tensor, k: Tensor) -> Tensor:
    """The mask, bool and of w's shape, of the `k` largest |w| among kept positions. Fit for `vmap`, where each client has a `k` of its own.

    k: (), int64, from 1 to the number of kept positions.

    >>> w, mask = torch.tensor([3.0, 0.0, 5.0, -4.0]), torch.tensor([True, True, False, True])
    >>> largest_kept(w, mask, torch.tensor(2))
    tensor([ True, False, False,  True])
    """
    order = torch.where(mask.flatten(), _keys(w.flatten().abs(), 0), _NEVER)
    last = order.sort(descending=True).values.gather(0, k.view(1) - 1)
    return (order >= last).view(mask.shape)


def without_smallest(w: Tensor, mask: Tensor, k: int) -> Tensor:
    """`mask` without the `k` kept positions of smallest |w|; of equal ones the higher position leaves first. Fit for `vmap`.

    >>> without_smallest(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, True, False]), 1)
    tensor([ True,  True, False, False])
    """
    kept = mask.flatten()
    order = torch.where(kept, _keys(w.flatten().abs(), 0), _BEYOND)
    leaving = _LAST - (order.topk(k, largest=False).values & 0xFFFFFFFF)
    return kept.scatter(0, leaving, False).view(mask.shape)


def _positions(flat: Tensor) -> Tensor:
    return torch.arange(flat.shape[0], device=flat.device)


def _keys(score: Tensor, begin: int) -> Tensor:
    """(n,) int64 keys in the order of the scores (>= 0), equal ones by falling position: the bits of a float32 sort as it does."""
    position = torch.arange(begin, begin + score.shape[0], device=score.device)
    return (score.float().view(torch.int32).long() << 32) | (_LAST - position)
