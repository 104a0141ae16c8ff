"""VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for small images.

torchvision's networks, with strides and heads for 32x32 images and without dropout. Its MobileNetV2 is taken from it when a job names it;
importing torchvision takes as long as importing torch, and 160 MB.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedsim.models.blueprint import Blueprint, he, recast

Plan = tuple[int | str, ...]  # channels of each convolution when the first has 64, and "M" for a pooling layer
A: Plan = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
D: Plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
# expansion, channels, blocks, stride of the first block; the second row has stride 2 in the paper, on images seven times as large
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def vgg11(blueprint: Blueprint) -> nn.Module:
    """Configuration A, then 512, 512, classes."""
    return _vgg(blueprint, A, 512)


def vgg16(blueprint: Blueprint) -> nn.Module:
    """Configuration D, then 4096, 4096, classes."""
    return _vgg(blueprint, D, 4096)


class VGG(nn.Module):
    """torchvision's, with its names."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(torch.flatten(self.avgpool(self.features(x)), 1)))


def _vgg(blueprint: Blueprint, plan: Plan, units: int) -> nn.Module:
    units, features = blueprint.scaled(units, 64), _features(blueprint, plan)
    inside = nn.Linear(blueprint.scaled(512, 64), units)
    return he(VGG(features, nn.Sequential(inside, nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, blueprint.classes))))


def _features(blueprint: Blueprint, plan: Plan) -> nn.Sequential:
    layers: list[nn.Module] = []
    inside = blueprint.shape[0]
    for entry in plan:
        if isinstance(entry, str):  # "M"
            layers.append(nn.MaxPool2d(2))
            continue
        outside = blueprint.scaled(entry, 64)
        layers += [blueprint.conv(inside, outside), blueprint.normed(outside), nn.ReLU()]
        inside = outside
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def mobilenet_v2(blueprint: Blueprint) -> nn.Module:
    """torchvision's MobileNetV2, its width multiplier width / 32 to the channel, its last width narrowed too; strides as on CIFAR."""
    from torchvision.models.mobilenetv2 import Conv2dNormActivation, MobileNetV2

    stages = [list(stage) for stage in STAGES]
    multiplier, last = blueprint.width / 32, 40 * blueprint.width
    net = MobileNetV2(blueprint.classes, multiplier, stages, round_nearest=1, norm_layer=blueprint.normed)
    inside = net.features[-2].out_channels
    net.features[0] = Conv2dNormActivation(blueprint.shape[0], blueprint.width, norm_layer=blueprint.normed, activation_layer=nn.ReLU6)
    net.features[-1] = Conv2dNormActivation(inside, last, kernel_size=1, norm_layer=blueprint.normed, activation_layer=nn.ReLU6)
    net.classifier = nn.Linear(last, blueprint.classes)
    recast(net, blueprint)
    return he(net)
