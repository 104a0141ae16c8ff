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


class BasicBlock(nn.Module):
    """torchvision's block, with its names: conv, norm, ReLU, conv, norm, plus the input or its 1x1 convolution, ReLU."""

    def __init__(self, blueprint: Blueprint, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        downsample = None
        if stride != 1:  # made before the rest, as torchvision does: first weights are drawn in this order
            downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), blueprint.normed(outside))
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = blueprint.normed(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = blueprint.normed(outside)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return cast(Tensor, self.relu(out))


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with its names, a 3x3 stem and no first pooling; importing torchvision itself takes a second and 160 MB."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        width = blueprint.width
        self.conv1 = blueprint.conv(blueprint.shape[0], width)
        self.bn1 = blueprint.normed(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = nn.Sequential(BasicBlock(blueprint, width, width, 1), BasicBlock(blueprint, width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(blueprint, width, 2 * width, 2), BasicBlock(blueprint, 2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(blueprint, 2 * width, 4 * width, 2), BasicBlock(blueprint, 4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(blueprint, 4 * width, 8 * width, 2), BasicBlock(blueprint, 8 * width, 8 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, blueprint.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))


def resnet18(blueprint: Blueprint) -> nn.Module:
    """torchvision's ResNet-18, stages of width, 2, 4 and 8 width channels, 1x1 shortcuts with a norm."""
    net = ResNet18(blueprint)
    recast(net, blueprint)
    return he(net)
