"""Three small networks: a two-layer cnn, an unpadded one, and LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedsim.models.blueprint import Blueprint


def cnn(blueprint: Blueprint) -> nn.Module:
    """3x3 conv width, pool 2, 3x3 conv 2 width, pool 2, 128, classes."""
    channels, height, width = blueprint.shape
    hidden = blueprint.hidden(128)
    return nn.Sequential(
        OrderedDict(
            conv1=blueprint.conv(channels, blueprint.width),
            norm1=blueprint.normed(blueprint.width),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=blueprint.conv(blueprint.width, 2 * blueprint.width),
            norm2=blueprint.normed(2 * blueprint.width),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(2 * blueprint.width * (height // 4) * (width // 4), hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, blueprint.classes),
        )
    )


def simple_cnn(blueprint: Blueprint) -> nn.Module:
    """3x3 conv width, 3x3 conv 2 width, unpadded, pool 2, 128, classes: the CNN of Reddi et al. 2021 (arXiv:2003.00295) without dropout."""
    channels, height, width = blueprint.shape
    hidden = blueprint.hidden(128)
    return nn.Sequential(
        OrderedDict(
            conv1=blueprint.conv(channels, blueprint.width, padding=0),
            norm1=blueprint.normed(blueprint.width),
            relu1=nn.ReLU(),
            conv2=blueprint.conv(blueprint.width, 2 * blueprint.width, padding=0),
            norm2=blueprint.normed(2 * blueprint.width),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(2 * blueprint.width * ((height - 4) // 2) * ((width - 4) // 2), hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, blueprint.classes),
        )
    )


def lenet5(blueprint: Blueprint) -> nn.Module:
    """5x5 conv 6 (padded), pool 2, 5x5 conv 16, pool 2, 120, 84, classes."""
    channels, height, width = blueprint.shape
    c1, c2, h1, h2 = (blueprint.scaled(size, 6) for size in (6, 16, 120, 84))
    return nn.Sequential(
        OrderedDict(
            conv1=blueprint.conv(channels, c1, 5),
            norm1=blueprint.normed(c1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=blueprint.conv(c1, c2, 5, padding=0),
            norm2=blueprint.normed(c2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(c2 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), h1),
            relu3=nn.ReLU(),
            fc2=nn.Linear(h1, h2),
            relu4=nn.ReLU(),
            fc3=nn.Linear(h2, blueprint.classes),
        )
    )
