"""What every script here is given and what it gives back, an .npz file each way. It runs in every environment, on torch and numpy alone.

The network comes as a traced torch module. Where it has layers of fedsim's own, their code is found by PYTHONPATH.
"""

from __future__ import annotations

import io
import sys
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
    first: dict[str, Tensor]  # the weights that round 1 begins with, and buffers
    network: bytes  # a module with them, as torch.save writes it
    cohort: int  # clients per round
    rounds: int
    epochs: int  # local
    batch: int
    lr: float

    def module(self) -> nn.Module:
        """The job's network with the first weights in it, in training mode."""
        module = torch.load(io.BytesIO(self.network), weights_only=False)
        assert isinstance(module, nn.Module)
        return module.train()

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
        return Work(torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]), first, file["network"].tobytes(), **numbers)


def write(work: Work, path: Path) -> None:
    numbers = {name: getattr(work, name) for name in NUMBERS}
    first = {f"first/{name}": value.numpy() for name, value in work.first.items()}
    network = np.frombuffer(work.network, np.uint8)
    np.savez(path, images=work.images.numpy(), labels=work.labels.numpy(), network=network, **first, **numbers)


def answer(marks: list[float], steps: int, last: dict[str, Tensor]) -> None:
    """Into the second file of the command line: the clock at the start and after every round, local steps of round 1, final weights."""
    weights = {f"last/{name}": value.detach().numpy() for name, value in last.items()}
    np.savez(sys.argv[2], seconds=np.diff(marks), steps=steps, torch=torch.__version__, **weights)
