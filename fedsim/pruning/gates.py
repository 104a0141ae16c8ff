"""Gates: one number a channel. Soft in (0, 1) while masks are learned, hard in {0, 1} (bool) where a channel is used or not (DWFNP, 3.3).

Drawn from logits by the Gumbel-sigmoid: y = sigmoid((o + g + b) / tau), g = -log(-log U). A hard draw is 1[y >= 0.5] with the
gradient of y (straight-through); the mean-noise mask puts Euler's constant, the mean of g, in the place of the draw.

A gate of a whole network is one tensor (…, n), its groups in network order; in a tree it stands under GATES. Soft ones are
multiplied in, nothing else changes. Under hard ones norms see the kept channels only, and a network may run physically smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core import rng

EULER = 0.57721


def gumbel(key: Tensor, n: int) -> Tensor:
    """(…, n) float32 draws of -log(-log U) for keys of any shape."""
    u = (rng.uniform(key, n).double() + 2.0**-25).clamp(max=1 - 2.0**-26)  # inside (0, 1), the middle of each step
    return (-(-u.log()).log()).float()


def soft(o: Tensor, g: Tensor, tau: float, bias: float) -> Tensor:
    """y of logits `o` and noise `g`, both (…, n)."""
    return torch.sigmoid((o + g + bias) / tau)


def straight(y: Tensor, groups: Sequence[int], within: Tensor | None = None) -> Tensor:
    """The hard values of soft gates y (…, n), with the gradient of y. `groups`: channels of each group; none is left empty."""
    hard = never_empty(y.detach() >= 0.5, y.detach(), groups, within).to(y.dtype)
    return hard + (y - y.detach())


def mean(o: Tensor, bias: float, groups: Sequence[int], within: Tensor | None = None) -> Tensor:
    """(…, n) bool, the mean-noise mask of logits o: kept where P(keep) >= 0.42963."""
    return never_empty(o + bias + EULER >= 0, o, groups, within)


def never_empty(hard: Tensor, score: Tensor, groups: Sequence[int], within: Tensor | None = None) -> Tensor:
    """(…, n) bool `hard`, and where a group would be empty its channel of largest score.

    within (…, n): what may be kept at all; the result lies inside of it.
    """
    if within is not None:
        hard, score = hard & within, score.masked_fill(~within, -torch.inf)
    parts = []
    for part, values in zip(hard.split(list(groups), -1), score.split(list(groups), -1), strict=True):
        best = torch.zeros_like(part).scatter(-1, values.argmax(-1, keepdim=True), True)
        parts.append(torch.where(part.any(-1, keepdim=True), part, best))
    return torch.cat(parts, -1)


def merge(v: Tensor, u: Tensor) -> Tensor:
    """u where the base keeps the channel (v >= 0.5), else 1: so v * merge(v, u) tells v alone that a channel it drops is missed."""
    return torch.where(v >= 0.5, u, 1.0)


def overlap(kept: Tensor) -> Tensor:
    """(K, K) shares |m_i and m_j| / |m_i or m_j| of hard gates (K, n)."""
    held = kept.float()
    both = held @ held.T
    return both / (held.sum(1, keepdim=True) + held.sum(1) - both)
