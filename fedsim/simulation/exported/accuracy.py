"""Evaluates an exported module on test images, in the batches of its run, and compares it with what the run recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.core.types import Feed
from fedsim.data.population import Population
from fedsim.errors import BadInput
from fedsim.fleet.batches import Batches, Ready, Round
from fedsim.fleet.client_images import count_of, evaluation_shards
from fedsim.storage.reader import RunReader

NONE = "the run recorded none after its last round"
ROUNDING = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}  # of logits, as a share of the largest, by execution.dtype


@dataclass(frozen=True)
class Measured:
    """What a module makes of some images."""

    correct: int
    images: int
    near: int  # images whose two largest logits are so close that rounding may exchange them

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass(frozen=True)
class Recorded:
    """What a run found when it evaluated the same network last."""

    accuracy: float
    r: int


def batches(population: Population, seed: int, batch: int, client: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) of the global test set, or of a client's own test images, as the run evaluates them."""
    feed, first, ready = Feed("test", epochs=1, batch=batch, augment=False), population.clients, Ready()
    for shard in range(first, first + evaluation_shards(population)) if client is None else [client]:
        if count_of(population, feed, shard):
            steps = Batches(population, feed, [shard], [0], Round(seed, 0), "cpu", torch.float32, ready=ready).alone(0)
            yield from ((step.x[0], step.y[0]) for step in steps)


@torch.no_grad()
def measured(network: Callable[[Tensor], Tensor], images: Iterable[tuple[Tensor, Tensor]], dtype: str = "float32") -> Measured:
    """Of a network in evaluation mode; dtype: execution.dtype of the run that it is compared with."""
    correct = count = near = 0
    for x, y in images:
        logits = network(x)
        correct += int((logits.argmax(-1) == y).sum())
        count += len(y)
        if logits.shape[-1] > 1:
            first, second = logits.topk(2).values.unbind(-1)
            near += int((first - second <= 2 * ROUNDING[dtype] * logits.abs().max()).sum())
    return Measured(correct, count, near)


def recorded(reader: RunReader, client: int | None) -> Recorded | str:
    """The accuracy after the last round, or why it is not known."""
    try:
        if "accuracy" not in reader.names("rounds" if client is None else "clients"):
            return NONE
        column = reader.column("accuracy") if client is None else reader.client("accuracy", client)
    except BadInput as error:
        return f"what the run recorded cannot be read: {error}"
    return Recorded(float(column[-1]), len(column) - 1) if np.isfinite(column[-1]) else NONE


def lines_of(found: Measured, before: Recorded | str, client: int | None, note: str) -> list[str]:
    """The accuracies, and a warning where rounding does not explain their difference; with a `note` something else may explain it."""
    where = "the global test set" if client is None else "its own test images"
    if not found.images:
        return [f"no accuracy: client {client} has no test images"]
    line = f"accuracy of this file on {where}: {found.accuracy:.2%}"
    if isinstance(before, str):
        return [f"{line}; {before}"]
    lines = [f"{line}; recorded: {before.accuracy:.2%} (round {before.r})"]
    apart = abs(found.correct - round(before.accuracy * found.images))
    if apart > found.near and not note:
        lines.append(
            f"warning: {apart} of {found.images} test images make the difference, and rounding explains {found.near} at most:"
            " this is not the network that the run evaluated, or the test images have changed since"
        )
    return lines


@torch.no_grad()
def differs(logits: Tensor, expected: Tensor, chooses: bool, within: float = ROUNDING["float32"]) -> str:
    """How far a module's logits (B, classes) are from the run's network's; empty where rounding explains it.

    within: as a share of the largest logit. chooses: gates choose channels for each image. Rounding may then change the choice for a
    few images, though not for half of them.
    """
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    apart = (logits - expected).abs().amax(-1) / largest
    wrong = ~(apart <= within)
    if int(wrong.sum()) <= (len(wrong) // 2 if chooses else 0):
        return ""
    return f"for {int(wrong.sum())} of {len(wrong)} images its logits differ by up to {float(apart.max()):.2g} times the largest one"
