"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) in the form that DWFNP (CVPR 2024) is evaluated on: for images of 32x32.

It differs from `vgg_mobilenet.py: mobilenet_v2` in four things: every block expands, also the first; a block of stride 1 that changes
the number of channels has a 1x1 convolution with a norm as its shortcut; the third stage keeps the size of its images; ReLU in place
of ReLU6.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from fedsim.models.blueprint import Blueprint, he
from fedsim.nn.layers.nsconv import ScaledReLU

FULL = 32  # channels of the first convolution of the published network
LAST = 1280  # channels of its last one
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 1), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# expansion, channels, blocks, stride of the first block


class InvertedResidual(nn.Module):
    """Expansion (1x1), one filter a channel (3x3), projection (1x1), each with its norm; at stride 1 plus the shortcut."""

    def __init__(self, blueprint: Blueprint, inside: int, outside: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inside
        self.expand = blueprint.conv(inside, inner, kernel=1)
        self.norm1 = blueprint.normed(inner)
        self.relu1 = _relu(blueprint)
        self.depthwise = blueprint.conv(inner, inner, stride=stride, groups=inner)
        self.norm2 = blueprint.normed(inner)
        self.relu2 = _relu(blueprint)
        self.project = blueprint.conv(inner, outside, kernel=1)
        self.norm3 = blueprint.normed(outside)
        self.adds = stride == 1
        self.shortcut = nn.Sequential()
        if self.adds and inside != outside:
            self.shortcut = nn.Sequential(blueprint.conv(inside, outside, kernel=1), blueprint.normed(outside))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.norm1(self.expand(x)))
        out = cast(Tensor, self.norm3(self.project(self.relu2(self.norm2(self.depthwise(inner))))))
        return out + cast(Tensor, self.shortcut(x)) if self.adds else out


def mobilenet_v2_cifar(blueprint: Blueprint) -> nn.Module:
    """A stem, the 17 blocks of STAGES, a last 1x1 convolution, the mean over positions, a classifier; widths in proportion to the first."""
    inside, last = blueprint.width, blueprint.scaled(LAST, FULL)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=blueprint.conv(blueprint.shape[0], inside), norm1=blueprint.normed(inside), relu1=_relu(blueprint)
    )
    for number, (expansion, channels, blocks, stride) in enumerate(STAGES, 1):
        outside = blueprint.scaled(channels, FULL)
        strides = [stride] + [1] * (blocks - 1)
        sizes = [inside] + [outside] * (blocks - 1)
        made = (InvertedResidual(blueprint, size, outside, expansion, step) for size, step in zip(sizes, strides, strict=True))
        layers[f"layer{number}"] = nn.Sequential(*made)
        inside = outside
    layers |= {"conv2": blueprint.conv(inside, last, kernel=1), "norm2": blueprint.normed(last), "relu2": _relu(blueprint)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(last, blueprint.classes)}
    return he(nn.Sequential(layers))


def _relu(blueprint: Blueprint) -> nn.Module:
    return ScaledReLU() if blueprint.norm == "nsconv" else nn.ReLU()
