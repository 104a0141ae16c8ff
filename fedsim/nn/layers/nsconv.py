"""The normalised sparse convolution: FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification section 3.5.

Its weight is standardised under its mask and scaled so that the outputs keep the variance of the inputs: no norm has to follow, and
none has activations to save. A filter has N entries, mean mu and unbiased variance s^2, its pruned entries counting as the zeros
they are; gain is learnt, one number for each output channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels.nsconv import RELU_SCALE, normalised

WHOLE = 'model.norm = "nsconv" normalises a filter over all its channels, so that gates cannot cut any; take "batch", "group" or "none"'


class NormalisedConv2d(nn.Conv2d):
    """A convolution with `normalised` filters, a gain for each and a bias. It knows no mask; in Net, `RuntimeNSConv2d` applies it."""

    def __init__(self, *args: Any, over: str = "all", **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels))
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, normalised(self.weight, self.gain, None, self.over), self.bias)


class ScaledReLU(nn.Module):
    """RELU_SCALE · max(x, 0)."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """The scale goes first, so that autograd keeps one tensor, which is also what the next layer reads."""
        return F.relu(x.mul_(RELU_SCALE) if self.inplace else x * RELU_SCALE, inplace=True)


def normalised_of(module: nn.Module) -> dict[str, str]:
    """Normalised layer -> the entries that its statistics are of, "all" or "kept"."""
    return {name: layer.over for name, layer in module.named_modules() if isinstance(layer, NormalisedConv2d)}
