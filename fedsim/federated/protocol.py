"""The words of fedsim: what a method's author writes with, and nothing else.

A Method is server state passed through rounds. In a round it sends Work to a cohort, as often as it likes. A Work is written
for one client; what the client hands back is a Report of three kinds: total (summed over the cohort), each (one row per
client) and keep (never leaves the client). A Fleet does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from fedsim.core.types import Batch, Data, Feed, LocalTraining, Tree

if TYPE_CHECKING:
    from fedsim.costs.profile import ModelProfile
    from fedsim.nn.net import Net

"""Named tensors, flat: the only container that travels. Keys: "w/conv1.weight", "mask/…", "gate/…", "buf/…", "opt/momentum/…"."""


@dataclass(frozen=True)
class ClientInput:
    """What one client holds when its work begins."""

    shared: Tree  # from the server, the same for the whole cohort
    own: Tree  # from the server, for this client alone
    kept: Tree  # put aside by this client at its last visit (Work.init_kept gives the first)
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
    extra_memory: int = 0  # bytes that the described client holds meanwhile beside the model at work, for the ledger
    deployment_only: bool = (
        False  # it makes the model that clients use of the last round's, which every client needs: no traffic, FLOPs apart
    )

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        """Kept state of a client never visited."""
        return {}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        """The first state; fixes the keys, shapes and dtypes of the state."""
        return {}

    def begin_feed(self, net: Net, sent: ClientInput, state: Tree, feed: int) -> Tree:
        """Called before each feed."""
        return state

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        """The new state and the mean loss; spends the state it is given."""
        ...

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report: ...


class Fleet(Protocol):
    """Who carries out Work: serial, packed, or MPI over either; the same answer."""

    def run(self, work: Work, cohort: Sequence[int], shared: Tree, own: Tree | None = None, net: Net | None = None) -> Reply: ...

    def pick(self, k: int | None, r: int) -> list[int]:
        """`k` (None: all) distinct non-empty clients, sorted: a function of the seed and the round."""
        ...


@dataclass(frozen=True)
class Setting:
    """What the job says beyond the method."""

    net: Net
    train: LocalTraining
    aggregate: Any  # one of aggregate.py
    rounds: int
    cohort: int  # clients per round
    clients: int
    seed: int
    anatomy: ModelProfile  # of the net: its layers, their positions
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

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        """The model a client uses, run where the client is."""
        return sent.tree({})

    def variants(self) -> Mapping[str, Method[Any]]:
        """Other forms in which clients could use the last round's state, by name: methods like this one, evaluated beside it."""
        return {}
