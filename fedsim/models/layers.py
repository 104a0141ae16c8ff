"""The layers that models are made of, and the Form that says which ones a job wants."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models.normalised import NormalisedConv2d, ScaledReLU


class StandardisedConv2d(nn.Conv2d):
    """A convolution with (w - mean) / (std + 1e-5) for its weight, mean and std over the fan-in of each filter.

    Qiao et al. 2019, arXiv:1903.10520. A fan-in of one has no deviation: its filter becomes 0. Where input channels were cut for
    good, the buffer `removed` (out, 3) holds the number, mean and squared deviations of what each filter lost, which go on counting.
    """

    removed: Tensor | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("removed", None)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight, self.removed), self.bias)


def standardised(weight: Tensor, removed: Tensor | None = None) -> Tensor:
    """Every filter of `weight` (out, in, kh, kw) moved to mean 0 and scaled to standard deviation 1 (over n - 1).

    removed (out, 3): number, mean and sum of squared deviations of entries that count although they are no longer there.
    """
    fan = weight[0].numel()
    if removed is None:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        variance = centred.square().sum((1, 2, 3), keepdim=True) / max(fan - 1, 1)
    else:
        count, away, about = (column.view(-1, 1, 1, 1) for column in removed.unbind(1))
        mean, squares = (value.view(-1, 1, 1, 1) for value in moments(weight))
        whole = fan + count
        squares = squares + about + (mean - away).square() * (fan * count / whole)
        centred = weight - (fan * mean + count * away) / whole
        variance = squares / (whole - 1).clamp(min=1)
    # the root of 0 has no finite slope; a filter that is constant (pruned whole) must not spoil its gradient
    positive = variance > 0
    deviation = torch.where(positive, variance, 1.0).sqrt() * positive
    return centred / (deviation + 1e-5)


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out,) mean of every filter, and the sum of squared deviations from it."""
    flat = weight.flatten(1)
    mean = flat.mean(1)
    return mean, (flat - mean.unsqueeze(1)).square().sum(1)


def ordinary(module: nn.Module) -> nn.Module:
    """The module with torch's convolutions in the place of standardised and normalised ones, changed in place.

    Their values are still to be put in.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, StandardisedConv2d | NormalisedConv2d):
            plain: nn.Module = copy.copy(layer)
            plain.__class__, plain._buffers = nn.Conv2d, {}
            plain._parameters = {slot: value for slot, value in layer._parameters.items() if slot != "gain"}
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, plain)
    return module


class Shortcut(nn.Module):
    """Option A of He et al. 2016: halves height and width by averages, and appends channels of zeros. No parameters."""

    def __init__(self, inside: int, outside: int, stride: int, detached: bool = False) -> None:
        super().__init__()
        self.extra = outside - inside
        self.detached = detached and self.extra > 0  # the published code of DWFNP cuts the gradient there
        # ceil_mode: an odd side ends as it does behind a padded convolution of stride 2
        self.pool: nn.Module = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x.detach() if self.detached else x)  # (B, inside, H', W')
        return self.widened(x) if self.extra else x  # (B, outside, H', W')

    def widened(self, x: Tensor) -> Tensor:
        """x with as many channels of zeros behind its own as the block adds."""
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))


@dataclass(frozen=True)
class Form:
    """What a model is to be made for, and of."""

    shape: tuple[int, int, int]  # C, H, W of an image
    classes: int
    width: int  # channels of the first convolution
    norm: str = "batch"
    standardise: bool = False
    detach_shortcut: bool = False
    shrink: Fraction = Fraction(1)  # how much narrower than asked for a matched model is
    over: str = "all"  # entries that a normalised filter's statistics are of

    def conv(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, padding: int | None = None, groups: int = 1) -> nn.Conv2d:
        """A convolution that keeps height and width (but for its stride); it has a bias where no norm follows."""
        around = kernel // 2 if padding is None else padding
        if self.norm == "nsconv":
            return NormalisedConv2d(inside, outside, kernel, stride, around, groups=groups, over=self.over)
        kind = StandardisedConv2d if self.standardise else nn.Conv2d
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
    """Every convolution of a borrowed network becomes the form's own: with a bias where no norm follows, standardised where asked.

    Without norms the variance is kept by normalised convolutions and scaled ReLUs in the place of ReLU6.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.ReLU6) and form.norm == "nsconv":
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, ScaledReLU(layer.inplace))
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            own = form.conv(layer.in_channels, layer.out_channels, kernel, stride, padding, layer.groups)
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, own)
