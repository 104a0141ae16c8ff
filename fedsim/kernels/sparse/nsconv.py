"""The normalised weight of an NSConv layer and its derivatives, from the kept values alone: pruned entries count as the zeros they are.

Symbols as in `fedsim.kernels.nsconv`, whose results these are: a filter has N entries, of which it keeps n. Sums over the kept values go
in the weight's order, in float64.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels import nsconv
from fedsim.kernels.sparse.pattern import Pattern

EPS = nsconv.EPS


def normalised(values: Tensor, gain: Tensor, pattern: Pattern, over: str = "all") -> Tensor:
    """(nnz,) the kept entries of `nsconv.normalised` of a weight with these kept values (nnz,); gain (O,)."""
    return cast(Tensor, _Normalised.apply(values, gain, pattern, over))


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, gain: Tensor, pattern: Pattern, over: str) -> Tensor:
        context.save_for_backward(values, gain)
        context.pattern, context.over = pattern, over
        if values.is_cuda:  # sums by index have no order there
            return pattern.values(nsconv.normalised(pattern.spread(values), gain, pattern.mask, over))
        out = torch.empty_like(values)
        make(values.numpy(), gain.numpy(), pattern.begins.numpy(), _entries(pattern, over), out.numpy())
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (values, gain), pattern, over = context.saved_tensors, context.pattern, context.over
        if values.is_cuda:
            moved, gained = nsconv.slopes(pattern.spread(g), pattern.spread(values), gain, pattern.mask, over)
            return pattern.values(moved), gained, None, None
        by_values, by_gain = torch.empty_like(values), torch.empty_like(gain)
        given = (g.contiguous().numpy(), values.numpy(), gain.numpy(), pattern.begins.numpy(), _entries(pattern, over))
        slopes(*given, by_values.numpy(), by_gain.numpy())
        return by_values, by_gain, None, None


def _entries(pattern: Pattern, over: str) -> int:
    """N where statistics are of all entries, 0 where they are of the kept ones."""
    return pattern.mask[0].numel() if over == "all" else 0


@inlined
def _statistics(values: Any, entries: int) -> tuple[float, float, float, float]:  # pragma: no cover - compiled
    """Mean, N s^2, N and N / (N - 1) of a filter that keeps `values`."""
    whole, squares = 0.0, 0.0
    for value in values:
        whole += value
    count = float(entries or max(1, values.size))
    mean = whole / count
    for value in values:
        squares += (value - mean) * (value - mean)
    if entries:
        squares += (entries - values.size) * mean * mean
    factor = count / max(1.0, count - 1.0)
    return mean, squares * factor, count, factor


@kernel
def make(values: Any, gain: Any, begins: Any, entries: int, out: Any) -> None:  # pragma: no cover - compiled
    """out (nnz,) = gain · (w - mu) / sqrt(max(N s^2, EPS)); values (nnz,) by filter from begins (O + 1,)."""
    for o in range(gain.size):
        kept, made = values[begins[o] : begins[o + 1]], out[begins[o] : begins[o + 1]]
        mean, squares, _, _ = _statistics(kept, entries)
        scale = gain[o] / np.sqrt(max(squares, EPS))
        for j in range(kept.size):
            made[j] = (kept[j] - mean) * scale


@kernel
def slopes(g: Any, values: Any, gain: Any, begins: Any, entries: int, by_values: Any, by_gain: Any) -> None:  # pragma: no cover - compiled
    """Gradients of `make` from that of its result, g (nnz,)."""
    for o in range(gain.size):
        first, last = begins[o], begins[o + 1]
        kept, given, found = values[first:last], g[first:last], by_values[first:last]
        mean, squares, count, factor = _statistics(kept, entries)
        scale = 1.0 / np.sqrt(max(squares, EPS))
        along, whole = 0.0, 0.0
        for j in range(kept.size):
            along += given[j] * (kept[j] - mean)
            whole += given[j]
        by_gain[o] = along * scale
        gained = gain[o] * scale
        pull = along * gained * scale * scale * factor if squares > EPS else 0.0  # below, the scale is a constant
        for j in range(kept.size):
            found[j] = given[j] * gained - (kept[j] - mean) * pull - gained * whole / count
