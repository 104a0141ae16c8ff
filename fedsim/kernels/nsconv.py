"""The normalised weight of an NSConv layer and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4  # the least N s^2
OVER = ("all", "kept")  # entries that a filter's statistics are of
RELU_SCALE = 1.7139588594436646  # the published estimate of sqrt(2 / (1 - 1 / pi)): a unit normal's ReLU then has variance 1


def normalised(w: Tensor, gain: Tensor, mask: Tensor | None, over: str = "all") -> Tensor:
    """mask · gain · (w - mu) / sqrt(max(N s^2, EPS)) of filters w (out, in, kh, kw); gain (out,), mask like w or None.

    over "kept": N, mu and s^2 are those of the kept entries alone. A filter that is pruned whole, or has a single entry, is 0.
    """
    centred, scale, _ = _statistics(w, mask, over)
    found = centred * (_by_filter(gain, w) * scale)
    return found if mask is None else found * mask


def slopes(by_effective: Tensor, w: Tensor, gain: Tensor, mask: Tensor | None, over: str = "all") -> tuple[Tensor, Tensor]:
    """(gradient of w, masked; of gain) from that of `normalised`'s result, at all of its positions; all like w."""
    centred, scale, count = _statistics(w, mask, over)
    inside = by_effective if mask is None else by_effective * mask
    along = _sum(inside * centred)
    factor = count / (count - 1).clamp(min=1)
    live = factor * _sum(centred.square()) > EPS  # else the scale is a constant
    gained = _by_filter(gain, w) * scale
    found = inside * gained - centred * (live * along * gained * scale.square() * factor)
    found = found - _sum(found) / count
    return found if mask is None else found * mask, (along * scale).flatten()


def _statistics(w: Tensor, mask: Tensor | None, over: str) -> tuple[Tensor, Tensor, Tensor]:
    """w less its mean, 1 / sqrt(max(N s^2, EPS)) and N of every filter (out, 1, 1, 1)."""
    held = w if mask is None else w * mask
    if over == "all" or mask is None:
        count = torch.full((), float(w[0].numel()), dtype=w.dtype, device=w.device)
        centred = held - _sum(held) / count
    else:
        count = _sum(mask.to(w.dtype)).clamp(min=1)
        centred = (held - _sum(held) / count) * mask
    squares = _sum(centred.square()) * (count / (count - 1).clamp(min=1))
    return centred, squares.clamp(min=EPS).rsqrt(), count


def _sum(values: Tensor) -> Tensor:
    return values.sum(tuple(range(1, values.dim())), keepdim=True)


def _by_filter(values: Tensor, w: Tensor) -> Tensor:
    return values.view(-1, *[1] * (w.dim() - 1))
