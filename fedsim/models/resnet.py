"""Residual networks for small images: He et al. 2016, arXiv:1512.03385.

resnet8/20/32/56 are section 4.2's, 6n + 2 layers with parameter-free shortcuts; resnet18 is torchvision's with a 3x3 stem and no
first pooling.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fedsim.models.blueprint import Blueprint, he, recast
from fedsim.nn.layers.shortcut import Shortcut


class ResidualBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, plus the shortcut, ReLU."""

    def __init__(self, blueprint: Blueprint, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = blueprint.conv(inside, outside, stride=stride)
        self.norm1 = blueprint.normed(outside)
        self.relu1 = nn.ReLU()
        self.conv2 = blueprint.conv(outside, outside)
        self.norm2 = blueprint.normed(outside)
        self.shortcut = Shortcut(inside, outside, stride, blueprint.detach_shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.norm1(self.conv1(x)))
        return cast(Tensor, self.relu2(self.norm2(self.conv2(inner)) + self.shortcut(x)))


def _stage(blueprint: Blueprint, inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    sizes = [inside] + [outside] * blocks
    return nn.Sequential(*(ResidualBlock(blueprint, a, b, stride if i == 0 else 1) for i, (a, b) in enumerate(pairwise(sizes))))


def cifar_resnet(blueprint: Blueprint, blocks: int) -> nn.Module:
    """Section 4.2's network of 6 · blocks + 2 layers: three stages of `blocks` blocks, of width, 2 width and 4 width channels."""
    width = blueprint.width
    return he(
        nn.Sequential(
            OrderedDict(
                conv1=blueprint.conv(blueprint.shape[0], width),
                norm1=blueprint.normed(width),
                relu1=nn.ReLU(),
                layer1=_stage(blueprint, width, width, blocks, 1),
                layer2=_stage(blueprint, width, 2 * width, blocks, 2),
                layer3=_stage(blueprint, 2 * width, 4 * width, blocks, 2),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(4 * width, blueprint.classes),
            )
        )
    )


def resnet18(blueprint: Blueprint) -> nn.Module:
    """torchvision's ResNet-18, stages of width, 2, 4 and 8 width channels, 1x1 shortcuts with a norm."""
    from torchvision.models.resnet import BasicBlock, ResNet

    with torch.device("meta"):  # its parts of fixed width are replaced at once
        net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=blueprint.classes, norm_layer=blueprint.normed)
    net.conv1 = blueprint.conv(blueprint.shape[0], blueprint.width)
    net.bn1 = blueprint.normed(blueprint.width)
    net.maxpool = nn.Identity()
    net.inplanes = blueprint.width
    for stage in range(4):
        layer = net._make_layer(BasicBlock, blueprint.width << stage, 2, stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Linear(8 * blueprint.width, blueprint.classes)
    recast(net, blueprint)
    return he(net)
