"""VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for small images.

torchvision's classes, with strides and heads for 32x32 images and without dropout (whose draws no two fleets would share).
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import vgg
from torchvision.models.mobilenetv2 import Conv2dNormActivation, MobileNetV2

from fedsim.models.blueprint import Blueprint, he, recast

# expansion, channels, blocks, stride of the first block; the second row has stride 2 in the paper, on images seven times as large
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def vgg11(form: Blueprint) -> nn.Module:
    """Configuration A, then 512, 512, classes."""
    return _vgg(form, "A", 512)


def vgg16(form: Blueprint) -> nn.Module:
    """Configuration D, then 4096, 4096, classes."""
    return _vgg(form, "D", 4096)


def _vgg(form: Blueprint, configuration: str, units: int) -> nn.Module:
    units = form.scaled(units, 64)
    with torch.device("meta"):  # its head for 224x224 images is replaced at once
        net = vgg.VGG(nn.Sequential(), num_classes=form.classes, init_weights=False)
    net.features = _features(form, vgg.cfgs[configuration])
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(
        nn.Linear(form.scaled(512, 64), units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, form.classes)
    )
    return he(net)


def _features(form: Blueprint, plan: list[str | int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    inside = form.shape[0]
    for entry in plan:
        if isinstance(entry, str):  # "M"
            layers.append(nn.MaxPool2d(2))
            continue
        outside = form.scaled(entry, 64)
        layers += [form.conv(inside, outside), form.normed(outside), nn.ReLU()]
        inside = outside
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def mobilenet_v2(form: Blueprint) -> nn.Module:
    """torchvision's MobileNetV2, its width multiplier width / 32 to the channel, its last width narrowed too; strides as on CIFAR."""
    stages = [list(stage) for stage in STAGES]
    multiplier, last = form.width / 32, 40 * form.width
    net = MobileNetV2(form.classes, multiplier, stages, round_nearest=1, norm_layer=form.normed)
    inside = net.features[-2].out_channels
    net.features[0] = Conv2dNormActivation(form.shape[0], form.width, norm_layer=form.normed, activation_layer=nn.ReLU6)
    net.features[-1] = Conv2dNormActivation(inside, last, kernel_size=1, norm_layer=form.normed, activation_layer=nn.ReLU6)
    net.classifier = nn.Linear(last, form.classes)
    recast(net, form)
    return he(net)
