"""What the architectures are built from: widths, norm and shape of the images."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from fedsim.nn.layers.nsconv import NormalisedConv2d, ScaledReLU
from fedsim.nn.layers.standardized_conv import StandardisedConv2d


@dataclass(frozen=True)
class Blueprint:
    """What a model is made for (images, classes) and made of (widths, norms, convolutions)."""

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
        """A hidden width that `width` does not set; in a matched model it shrinks like the others."""
        return max(1, int(units * self.shrink))

    def scaled(self, channels: int, full: int) -> int:
        """`channels` of a model whose first width is `full`, scaled to this model's width."""
        return max(1, channels * self.width // full)


def he(module: nn.Module) -> nn.Module:
    """Initialises every convolution's weight from N(0, 2 / fan-out) (He et al. 2015), as the published networks start; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def recast(module: nn.Module, blueprint: Blueprint) -> None:
    """Replaces every convolution of a torchvision network by the blueprint's own, in place.

    With norm "nsconv" scaled ReLUs replace ReLU6, so that the variance is kept without norms.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.ReLU6) and blueprint.norm == "nsconv":
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, ScaledReLU(layer.inplace))
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            own = blueprint.conv(layer.in_channels, layer.out_channels, kernel, stride, padding, layer.groups)
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, own)
