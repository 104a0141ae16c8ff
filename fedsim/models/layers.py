"""The layers that models are made of, and the Form that says which ones a job wants."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StandardisedConv2d(nn.Conv2d):
    """A convolution with (w - mean) / (std + 1e-5) for its weight, mean and std over the fan-in of each filter.

    Qiao et al. 2019, arXiv:1903.10520. A fan-in of one has no deviation: its filter becomes 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight), self.bias)


def standardised(weight: Tensor) -> Tensor:
    """Every filter of `weight` (out, in, kh, kw) moved to mean 0 and scaled to standard deviation 1 (over n - 1)."""
    fan = weight[0].numel()
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    variance = centred.square().sum((1, 2, 3), keepdim=True) / max(fan - 1, 1)
    # the root of 0 has no finite slope; a filter that is constant (pruned whole) must not spoil its gradient
    positive = variance > 0
    deviation = torch.where(positive, variance, 1.0).sqrt() * positive
    return centred / (deviation + 1e-5)


class Shortcut(nn.Module):
    """Option A of He et al. 2016: halves height and width by averages, and appends channels of zeros. No parameters."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.extra = outside - inside
        # ceil_mode: an odd side ends as it does behind a padded convolution of stride 2
        self.pool: nn.Module = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)  # (B, inside, H', W')
        return F.pad(x, (0, 0, 0, 0, 0, self.extra)) if self.extra else x  # (B, outside, H', W')


@dataclass(frozen=True)
class Form:
    """What a model is to be made for, and of."""

    shape: tuple[int, int, int]  # C, H, W of an image
    classes: int
    width: int  # channels of the first convolution
    norm: str = "batch"
    standardise: bool = False
    shrink: Fraction = Fraction(1)  # how much narrower than asked for a matched model is

    def conv(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, padding: int | None = None, groups: int = 1) -> nn.Conv2d:
        """A convolution that keeps height and width (but for its stride); it has a bias where no norm follows."""
        kind = StandardisedConv2d if self.standardise else nn.Conv2d
        around = kernel // 2 if padding is None else padding
        return kind(inside, outside, kernel, stride, around, groups=groups, bias=self.norm == "none")

    def normed(self, channels: int) -> nn.Module:
        """The norm that follows a convolution."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        return nn.GroupNorm(1, channels) if self.norm == "group" else nn.Identity()

    def hidden(self, units: int) -> int:
        """A hidden width that `width` does not set, in a matched model as much narrower as the rest."""
        return max(1, int(units * self.shrink))

    def scaled(self, channels: int, full: int) -> int:
        """A width of the model that begins with `full` channels, in this one."""
        return max(1, channels * self.width // full)


def he(module: nn.Module) -> nn.Module:
    """Draws every convolution's weight from N(0, 2 / fan-out) (He et al. 2015), as the published networks start; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def recast(module: nn.Module, form: Form) -> None:
    """Every convolution of a borrowed network becomes the form's own: with a bias where no norm follows, standardised where asked."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            own = form.conv(layer.in_channels, layer.out_channels, kernel, stride, padding, layer.groups)
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, own)
