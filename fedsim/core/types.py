"""Feeds, batches, data sets and the numbers of local training: the words that the network and the methods share."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Protocol

from torch import Tensor

Tree = dict[str, Tensor]


@dataclass(frozen=True)
class Feed:
    """Which of its own images a client sees; the fleet makes the batches. ValueError for values that do not fit together.

    >>> Feed("train", epochs=2, batch=32).steps  # 0: as many as two epochs take
    0
    >>> Feed("train")
    Traceback (most recent call last):
    ValueError: a feed has epochs or steps, exactly one of them > 0; this one has epochs = 0, steps = 0
    """

    split: str = "train"  # train | held (held out) | probe (a fixed random share of train) | test, global (Evaluate only)
    epochs: int = 0  # or steps: exactly one of them > 0
    steps: int = 0
    batch: int = 64  # images
    augment: bool = True
    share: float = 1.0  # of the split, at least one batch
    cost: str = "train"  # what the ledger prices per image: train | forward | inputs (forward, and gradients of inputs alone)
    dense_gradient_layers: tuple[str, ...] = ()  # layers whose weight gradient is formed at all positions ("*" = all)
    dense_gradient_steps: int = 0  # in so many of its last steps; 0: in all

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.steps > 0) or min(self.epochs, self.steps) < 0:
            raise ValueError(
                f"a feed has epochs or steps, exactly one of them > 0; this one has epochs = {self.epochs}, steps = {self.steps}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"a feed's split is one of {', '.join(SPLITS)}; not {self.split!r}")
        if self.cost not in COSTS:
            raise ValueError(f"a feed's cost is one of {', '.join(COSTS)}; not {self.cost!r}")
        if self.dense_gradient_steps < 0 or (self.dense_gradient_steps and not self.dense_gradient_layers):
            raise ValueError(
                f"a feed has dense_gradient_steps >= 0, of its dense_gradient_layers;"
                f" this one has {self.dense_gradient_steps} of {self.dense_gradient_layers}"
            )
        if self.batch < 1 or not 0 < self.share <= 1:
            raise ValueError(f"a feed has batch >= 1 and share in (0, 1]; this one has batch = {self.batch}, share = {self.share}")


SPLITS = ("train", "held", "probe", "test", "global")  # global: every client sees the whole global test set
COSTS = ("train", "forward", "inputs")


@dataclass(frozen=True)
class Batch:
    """What one step sees of one client."""

    x: Tensor  # (B, C, H, W) float, normalised and augmented
    y: Tensor  # (B,) int64
    real: Tensor | None  # (B,) in {0, 1} float; None when no batch of the pack is padded
    t: Tensor  # (), the step of this feed, from 0
    T: Tensor  # (), this client's number of steps in this feed
    feed: int = 0  # the feed's number; an int, may be branched on
    key: Tensor | None = None  # (), ClientInput.key, by which layers draw (dropout); None: for models without such layers


class Data(Protocol):
    """Labelled images, by index: uint8 until the fleet normalises a batch."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...  # C, H, W
    @property
    def classes(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...  # per channel, of the training images over 255
    @property
    def std(self) -> tuple[float, ...]: ...
    def __len__(self) -> int: ...
    def images(self, index: Tensor) -> Tensor: ...  # (b,) int64 -> (b, C, H, W) uint8
    def labels(self, index: Tensor) -> Tensor: ...  # (b,) int64 -> (b,) int64


@dataclass(frozen=True)
class LocalOptimizer:
    """The local optimiser of one round: its name, its rate, its momentum and its weight decay."""

    lr: float
    momentum: float
    decay: float
    optimiser: str = "sgd"


@dataclass(frozen=True)
class LocalTraining:
    """The local training that the job asks for, over all rounds."""

    epochs: int = 1  # E, local epochs; or steps
    steps: int = 0
    batch: int = 64  # B
    lr: float = 0.05  # eta
    momentum: float = 0.0
    decay: float = 0.0  # weight decay
    optimiser: str = "sgd"  # sgd | adam
    schedule: str = (
        "constant"  # over rounds: constant | cosine (to 0) | exponential (lr * factor^(r-1)) | step (* factor at each milestone)
    )
    factor: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the rounds
    rounds: int = 1
    augment: bool = True

    def at(self, r: int) -> LocalOptimizer:
        """The optimiser of round `r`, counted from 1, with the learning rate that the schedule gives it.

        >>> LocalTraining(lr=0.1, schedule="step", milestones=(0.5,), rounds=10).at(6).lr == 0.1 * 0.1
        True
        """
        done = (r - 1) / self.rounds
        scale = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + cos(pi * done)),
            "exponential": self.factor ** (r - 1),
            "step": self.factor ** sum(done >= m for m in self.milestones),
        }[self.schedule]
        return LocalOptimizer(self.lr * scale, self.momentum, self.decay, self.optimiser)

    def feed(self) -> Feed:
        """The feed of ordinary local training."""
        return Feed("train", epochs=0 if self.steps else self.epochs, steps=self.steps, batch=self.batch, augment=self.augment)
