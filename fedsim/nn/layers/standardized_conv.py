"""Weight-standardised convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StandardisedConv2d(nn.Conv2d):
    """A convolution with (w - mean) / (std + 1e-5) for its weight, mean and std over the fan-in of each filter.

    Qiao et al. 2019, arXiv:1903.10520. A fan-in of one has no deviation: its filter becomes 0. Where input channels were cut for
    good, the buffer `removed` (out, 3) holds the number, mean and squared deviations of what each filter lost, which go on counting.
    It knows no mask; in Net, `RuntimeStandardizedConv2d` applies it.
    """

    removed: Tensor | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("removed", None)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight, self.removed), self.bias)


def standardised(weight: Tensor, removed: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Every filter of `weight` (out, in, kh, kw) moved to mean 0 and scaled to standard deviation 1 (over n - 1).

    removed (out, 3): number, mean and sum of squared deviations of entries that were cut but still count.
    mask, like weight: pruned entries count as the zeros that they are, and are 0 afterwards.
    """
    if mask is not None:
        return standardised(weight * mask, removed) * mask
    fan = weight[0].numel()
    if removed is None:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        variance = centred.square().sum((1, 2, 3), keepdim=True) / max(fan - 1, 1)
    else:
        count, away, about = (column.view(-1, 1, 1, 1) for column in removed.unbind(1))
        mean, squares = (value.view(-1, 1, 1, 1) for value in filter_moments(weight))
        whole = fan + count
        squares = squares + about + (mean - away).square() * (fan * count / whole)
        centred = weight - (fan * mean + count * away) / whole
        variance = squares / (whole - 1).clamp(min=1)
    # the root of 0 has no finite slope; a filter that is constant (pruned whole) must not spoil its gradient
    positive = variance > 0
    deviation = torch.where(positive, variance, 1.0).sqrt() * positive
    return centred / (deviation + 1e-5)


def filter_moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out,) mean of every filter, and the sum of squared deviations from it."""
    flat = weight.flatten(1)
    mean = flat.mean(1)
    return mean, (flat - mean.unsqueeze(1)).square().sum(1)
