"""What every script here is given and what it gives back, an .npz file each way. Torch and numpy alone: it runs in every environment."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

NUMBERS = ("cohort", "rounds", "epochs", "batch", "lr")


@dataclass(frozen=True)
class Work:
    """FedAvg on clients of equal size."""

    images: Tensor  # (clients, n, C, H, W) float32, normalised
    labels: Tensor  # (clients, n)
    first: dict[str, Tensor]  # the weights that round 1 begins with
    cohort: int  # clients per round
    rounds: int
    epochs: int  # local
    batch: int
    lr: float

    def module(self) -> nn.Module:
        """fedsim's `cnn` without a norm, as wide as the first weights are, with them in it."""
        (width, channels), hidden = self.first["conv1.weight"].shape[:2], self.first["fc1.weight"].shape
        module = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, width, 3, padding=1),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(hidden[1], hidden[0]),
                relu3=nn.ReLU(),
                fc2=nn.Linear(hidden[0], len(self.first["fc2.bias"])),
            )
        )
        module.load_state_dict(self.first)
        return module

    def batches(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all local epochs of `client`, in a new order each epoch."""
        x, y = self.images[client], self.labels[client]
        for _ in range(self.epochs):
            for rows in torch.randperm(len(y)).split(self.batch):
                yield x[rows], y[rows]


class Steps:
    """Counts this process's optimiser steps at the rate `lr`, until it is closed, which a script does after its first round."""

    def __init__(self, lr: float) -> None:
        self.lr, self.count = lr, 0
        self._hook = register_optimizer_step_post_hook(self._one)

    def _one(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        self.count += optimiser.param_groups[0]["lr"] == self.lr

    def close(self) -> int:
        """The steps counted."""
        self._hook.remove()
        return self.count


def asked() -> Work:
    """The work in the first file of the command line."""
    return read(sys.argv[1])


def read(path: str | Path) -> Work:
    with np.load(path) as file:
        first = {name.removeprefix("first/"): torch.from_numpy(file[name]) for name in file.files if name.startswith("first/")}
        numbers: dict[str, Any] = {name: file[name].item() for name in NUMBERS}
        return Work(torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]), first, **numbers)


def write(work: Work, path: Path) -> None:
    numbers = {name: getattr(work, name) for name in NUMBERS}
    first = {f"first/{name}": value.numpy() for name, value in work.first.items()}
    np.savez(path, images=work.images.numpy(), labels=work.labels.numpy(), **first, **numbers)


def answer(marks: list[float], steps: int, last: dict[str, Tensor]) -> None:
    """Into the second file of the command line: the clock at the start and after every round, local steps of round 1, final weights."""
    weights = {f"last/{name}": value.detach().numpy() for name, value in last.items()}
    np.savez(sys.argv[2], seconds=np.diff(marks), steps=steps, torch=torch.__version__, **weights)
