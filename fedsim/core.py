"""The words of fedsim: what a method's author writes with, and nothing else.

A Method is server state passed through rounds. In a round it sends Work to a cohort, as often as it likes. A Work is written
for one client; what the client hands back is a Report of three kinds: total (summed over the cohort), each (one row per
client) and keep (never leaves the client). A Fleet does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from fedsim.ledger import Anatomy
    from fedsim.net import Net

Tree = dict[str, Tensor]
"""Named tensors, flat: the only container that travels. Keys: "w/conv1.weight", "mask/…", "gate/…", "buf/…", "opt/momentum/…"."""


@dataclass(frozen=True)
class Feed:
    """Which of its own images a client sees; the fleet makes the batches."""

    split: str = "train"  # train | held (held out) | probe (a fixed random share of train) | test, global (Evaluate only)
    epochs: int = 0  # or steps: exactly one of them > 0
    steps: int = 0
    batch: int = 64  # images
    augment: bool = True
    share: float = 1.0  # of the split, at least one batch
    charge: str = "train"  # what the ledger prices per image: train | forward | inputs (forward, and gradients of inputs alone)
    dense: tuple[str, ...] = ()  # layers whose weight gradient is formed at all positions ("*" = all)
    dense_steps: int = 0  # in so many of its last steps; 0: in all

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.steps > 0) or min(self.epochs, self.steps) < 0:
            raise ValueError(
                f"a feed has epochs or steps, exactly one of them > 0; this one has epochs = {self.epochs}, steps = {self.steps}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"a feed's split is one of {', '.join(SPLITS)}; not {self.split!r}")
        if self.charge not in CHARGES:
            raise ValueError(f"a feed's charge is one of {', '.join(CHARGES)}; not {self.charge!r}")
        if self.dense_steps < 0 or (self.dense_steps and not self.dense):
            raise ValueError(f"a feed has dense_steps >= 0, of its dense layers; this one has {self.dense_steps} of {self.dense}")
        if self.batch < 1 or not 0 < self.share <= 1:
            raise ValueError(f"a feed has batch >= 1 and share in (0, 1]; this one has batch = {self.batch}, share = {self.share}")


SPLITS = ("train", "held", "probe", "test", "global")  # global: every client sees the whole global test set
CHARGES = ("train", "forward", "inputs")


@dataclass(frozen=True)
class Batch:
    """What one step sees of one client."""

    x: Tensor  # (B, C, H, W) float, normalised and augmented
    y: Tensor  # (B,) int64
    real: Tensor | None  # (B,) in {0, 1} float; None when no batch of the pack is padded
    t: Tensor  # (), the step of this feed, from 0
    T: Tensor  # (), this client's number of steps in this feed
    feed: int = 0  # the feed's number; an int, may be branched on


@dataclass(frozen=True)
class Sent:
    """What one client holds when its work begins."""

    shared: Tree  # from the server, the same for the whole cohort
    own: Tree  # from the server, for this client alone
    kept: Tree  # put aside by this client at its last visit (Work.fresh gives the first)
    n: Tensor  # (), its number of training images
    steps: Tensor  # (feeds,), its steps in each feed
    key: Tensor  # (), int64, for its random draws

    def tree(self, state: Tree) -> Tree:
        """shared, own, kept and state laid over each other, later wins: what Net and the ledger see."""
        return {**self.shared, **self.own, **self.kept, **state}


@dataclass(frozen=True)
class Report:
    """What one client hands back."""

    total: Tree  # summed over the cohort, exactly; float64
    each: Tree = field(default_factory=dict)  # one row per client reaches the server; keep it small
    keep: Tree = field(default_factory=dict)  # stays with the client


@dataclass(frozen=True)
class Reply:
    """What a fleet hands back."""

    total: Tree  # sums over the cohort, float64
    each: Tree  # (K, …), a row per client, in the order of the sorted cohort


class Work(Protocol):
    """One client's work, a frozen dataclass of plain numbers: to send an order is to send a value."""

    feeds: tuple[Feed, ...]  # run in this order
    beside: int = 0  # bytes that the described client holds meanwhile beside the model at work, for the ledger
    deploys: bool = False  # it makes the model that clients use of the last round's, which every client needs: no traffic, FLOPs apart

    def fresh(self, net: Net, sent: Sent) -> Tree:
        """Kept state of a client never visited."""
        return {}

    def start(self, net: Net, sent: Sent) -> Tree:
        """The first state; fixes the keys, shapes and dtypes of the state."""
        return {}

    def begin(self, net: Net, sent: Sent, state: Tree, feed: int) -> Tree:
        """Called before each feed."""
        return state

    def step(self, net: Net, sent: Sent, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        """The new state and the mean loss; spends the state it is given."""
        ...

    def finish(self, net: Net, sent: Sent, state: Tree) -> Report: ...


class Fleet(Protocol):
    """Who carries out Work: serial, packed, or MPI over either; the same answer."""

    def run(self, work: Work, cohort: Sequence[int], shared: Tree, own: Tree | None = None, net: Net | None = None) -> Reply: ...

    def pick(self, k: int | None, r: int) -> list[int]:
        """`k` (None: all) distinct non-empty clients, sorted: a function of the seed and the round."""
        ...


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
class Rate:
    """The numbers of the local optimiser in one round."""

    lr: float
    momentum: float
    decay: float
    optimiser: str = "sgd"


@dataclass(frozen=True)
class Training:
    """What the job says of local training."""

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

    def at(self, r: int) -> Rate:
        """The rate of round `r`, counted from 1."""
        done = (r - 1) / self.rounds
        scale = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + cos(pi * done)),
            "exponential": self.factor ** (r - 1),
            "step": self.factor ** sum(done >= m for m in self.milestones),
        }[self.schedule]
        return Rate(self.lr * scale, self.momentum, self.decay, self.optimiser)

    def feed(self) -> Feed:
        """The feed of ordinary local training."""
        return Feed("train", epochs=0 if self.steps else self.epochs, steps=self.steps, batch=self.batch, augment=self.augment)


@dataclass(frozen=True)
class Setting:
    """What the job says beyond the method."""

    net: Net
    train: Training
    aggregate: Any  # one of aggregate.py
    rounds: int
    cohort: int  # clients per round
    clients: int
    seed: int
    anatomy: Anatomy  # of the net: its layers, their positions
    holdout: float = 0.0  # share of every client's images that is held out


State = TypeVar("State")


class Method(Protocol[State]):
    """A frozen dataclass whose fields are the hyperparameters."""

    def init(self, setting: Setting, public: Data | None) -> State: ...

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        """The state after round `r` and what to record; r = 0 comes first: what precedes training (selection, scoring)."""
        ...

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        """shared, own (a row per client of the cohort, which may be empty), and the network in use after a permanent cut."""
        ...

    def model_of(self, net: Net, sent: Sent) -> Tree:
        """The model a client uses, run where the client is."""
        return sent.tree({})

    def others(self) -> Mapping[str, Method[Any]]:
        """Other forms in which clients could use the last round's state, by name: methods like this one, evaluated beside it."""
        return {}
