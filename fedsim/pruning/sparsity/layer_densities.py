"""How the layers of a network share the weights that are kept: Erdős-Rényi-kernel, Erdős-Rényi, or one density for all.

Evci et al., ICML 2020, arXiv:1911.11134 (RigL), appendix; Mocanu et al., Nature Communications 2018 (SET).

Paper -> code:  epsilon -> eps,  d_l -> eps · raw(shape),  n_l -> sizes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, prod
from typing import Literal

from fedsim.core import masks
from fedsim.nn.net import Net

Shape = tuple[int, ...]
Sharing = Literal["erk", "er", "uniform"]
RAW = {  # of a weight (out, in, …): its density but for a factor that all layers share
    "erk": lambda shape: sum(shape) / prod(shape),
    "er": lambda shape: sum(shape[:2]) / prod(shape[:2]),
    "uniform": lambda shape: 1.0,
}


def kept_counts(net: Net, layers: Sequence[str], density: float, how: Sharing = "erk") -> dict[str, int]:
    """Kept weights of each of the `layers`, so that `density` is that of the whole network; its other layers stay dense.

    Raises ValueError where no layer is left to be pruned, or a layer could not keep a single weight.
    """
    return shared_out({layer: net.shapes[layer] for layer in layers}, budget(net, layers, density), how)


def budget(net: Net, layers: Sequence[str], density: float) -> int:
    """The number of weights that the `layers` may keep together: floor(density · n) without those of the dense layers.

    Raises ValueError where no layer is left to be pruned, or there is less than one weight for each.
    """
    if not layers:
        raise ValueError("no layer is left to be pruned: the first one stays dense, and others may be left out")
    dense = [layer for layer in net.sizes if layer not in layers]
    sizes = {"+".join(dense) or "no layer": sum(net.sizes[layer] for layer in dense)}
    return masks.budget(sizes | {layer: net.sizes[layer] for layer in layers}, density)


def shared_out(shapes: Mapping[str, Shape], budget: int, how: Sharing = "erk", most: Mapping[str, int] | None = None) -> dict[str, int]:
    """Kept weights of every layer, `budget` in all.

    A layer that would get more than it has is dense, and eps is solved again; counts are rounded down, at least 1; what is left goes to
    the layers that have room, in order, and an excess is taken from the largest. ValueError for a budget below one weight a layer, or
    above all weights.

    Args:
        shapes: masked layer -> shape of its weight, outputs first.
        budget: kept weights of all these layers together.
        how: "erk": densities in proportion to the sum of a tensor's sizes over their product; "er": of its outputs and inputs alone;
            "uniform": one density.
        most: weights that a layer has, where these are fewer than its shape says: what was pruned before, and may not come back.

    >>> shared_out({"conv": (8, 4, 3, 3), "fc": (10, 32)}, budget=100)
    {'conv': 30, 'fc': 70}
    """
    sizes = {layer: prod(shape) for layer, shape in shapes.items()}
    most = most or sizes
    if not len(sizes) <= budget <= sum(most.values()):
        raise ValueError(f"a budget of {budget:,} weights for {len(sizes)} layers; it is from {len(sizes)} to {sum(most.values()):,}")
    raw = {layer: RAW[how](shape) for layer, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        free = [layer for layer in sizes if layer not in dense]
        left = budget - sum(most[layer] for layer in dense)
        eps = left / sum(raw[layer] * sizes[layer] for layer in free) if free else 0.0
        if not (full := {layer for layer in free if eps * raw[layer] > most[layer] / sizes[layer]}):
            break
        dense |= full
    counts = {layer: most[layer] if layer in dense else max(1, floor(eps * raw[layer] * size + 1e-9)) for layer, size in sizes.items()}
    while (rest := budget - sum(counts.values())) > 0:
        for layer in [layer for layer, count in counts.items() if count < most[layer]][:rest]:
            counts[layer] += 1
    for layer in sorted(sizes, key=lambda layer: -sizes[layer]):  # what the minimum of 1 has added
        counts[layer] -= min(counts[layer] - 1, max(0, sum(counts.values()) - budget))
    return counts
