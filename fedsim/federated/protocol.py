"""The words of fedsim: what a method's author writes with, and nothing else.

A Method is server state passed through rounds. In a round it sends Work to a cohort, as often as it likes. A Work is written
for one client; what the client hands back is a Report of three kinds: total (summed over the cohort), each (one row per
client) and keep (never leaves the client). A Fleet does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from fedsim.core.types import Batch, Data, Feed, LocalTraining, Tree
from fedsim.costs.server import ServerBill

if TYPE_CHECKING:
    from fedsim.costs.profile import ModelProfile
    from fedsim.nn.net import Net


@dataclass(frozen=True)
class ClientInput:
    """What one client holds when its work begins. Tensors are on the device of the run, without an axis of clients.

    >>> import torch
    >>> sent = ClientInput({"w/a": torch.zeros(2)}, {}, {}, n=torch.tensor(5), steps=torch.tensor([3]), key=torch.tensor(7))
    >>> sent.tree({"w/a": torch.ones(2)})
    {'w/a': tensor([1., 1.])}
    """

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
    """What one client hands back. Keys have a prefix of `fedsim.keys`, which says what they cost.

    >>> import torch
    >>> report = Report(total={"n/images": torch.tensor(5.0, dtype=torch.float64)}, keep={"n/visits": torch.tensor(1.0)})
    >>> report.each
    {}
    """

    total: Tree  # summed over the cohort, exactly; float64
    each: Tree = field(default_factory=dict)  # one row per client reaches the server; keep it small
    keep: Tree = field(default_factory=dict)  # stays with the client


@dataclass(frozen=True)
class Reply:
    """What a fleet hands back: `reply.total["n/images"]` is the sum over the cohort, `reply.each["n/images"]` (K,) a number per client."""

    total: Tree  # sums over the cohort, float64
    each: Tree  # (K, …), a row per client, in the order of `clients`
    clients: tuple[int, ...] = ()  # those that answered, sorted: the cohort; where clients have devices, fewer or others


class Work(ABC):
    """What one client does, as a frozen dataclass of plain numbers: ranks receive it by value.

    Every function sees one client and is pure tensor arithmetic: no branch on a tensor's value, so that a fleet may run it under vmap.

    >>> @dataclass(frozen=True)
    ... class CountImages(Work):
    ...     feeds: tuple[Feed, ...] = (Feed("train", epochs=1, augment=False, cost="forward"),)
    ...
    ...     def step(self, net, sent, state, batch):
    ...         return state, batch.x.sum() * 0
    ...
    ...     def finish(self, net, sent, state):
    ...         return Report(total={"n/images": sent.n.double()})
    >>> CountImages().purpose
    'CountImages'
    """

    feeds: tuple[Feed, ...]  # run in this order
    extra_memory: int = 0  # bytes a client holds during this work beside its model (e.g. other candidates), for its memory figure
    extra_flops: int = 0  # FLOPs a client with images spends in this work beside its model's passes (e.g. on a hypernetwork)
    deployment_only: bool = False  # work after the last round that makes each client's own model: charged to deploy_flops alone
    compact: ClassVar[bool] = False  # clients hold and exchange the open channels alone; both ends know the hard gate of each
    purpose: ClassVar[str]  # of ClientInput.key's draws: the class's name, where the class itself states no other

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.purpose = cls.__dict__.get("purpose", cls.__name__)

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        """The kept state of a client that was never visited."""
        return {}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        """The state before the first step. It fixes the keys, shapes and dtypes of the state."""
        return {}

    def begin_feed(self, net: Net, sent: ClientInput, state: Tree, feed: int) -> Tree:
        """The state before the first step of feed number `feed`."""
        return state

    @abstractmethod
    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        """The state after one step, and the batch's mean loss, (). It may overwrite the tensors of `state`."""

    @abstractmethod
    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        """What the client hands back after its last step."""


class Fleet(Protocol):
    """Who carries out Work: serial, packed, or MPI over either; the same answer."""

    def run(self, work: Work, cohort: Sequence[int], shared: Tree, own: Tree | None = None, net: Net | None = None) -> Reply:
        """Has every client of the cohort do the work.

        cohort: K distinct clients, at most 16,384; shared: what all of them are sent; own: (K, …) rows in the order of the sorted cohort,
        what each is sent for itself; net: another network than the job's, after a permanent cut. The traffic is charged to the clients.
        Raises ClientFault where a client fails, Stopped where the run is asked to stop.
        """
        ...

    def pick(self, k: int | None, r: int) -> list[int]:
        """`k` (None: all) distinct clients that have images, sorted: a function of the seed and the round `r` alone."""
        ...


@dataclass(frozen=True)
class Setting:
    """What the job says beyond the method: the same object on every call of a method.

    >>> from fedsim import load_job
    >>> from fedsim.simulation.experiment import build_experiment
    >>> data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 80, "test_images": 20}
    >>> job = load_job({"data": data, "partition": {"clients": 4}, "method": {"name": "fedavg"}})
    >>> setting = build_experiment(job).setting
    >>> setting.clients, setting.net.initial["w/conv1.weight"].shape
    (4, torch.Size([32, 1, 3, 3]))
    """

    net: Net
    train: LocalTraining
    aggregate: Any  # one of federated/aggregation.py
    rounds: int
    cohort: int  # clients per round
    clients: int
    seed: int
    model_profile: ModelProfile  # of the net: its layers, their positions
    holdout: float = 0.0  # share of every client's images that is held out
    server: ServerBill = field(
        default_factory=ServerBill, compare=False, repr=False
    )  # what the server computes: server.charge("scoring", flops)
    image_shape: tuple[int, ...] = ()  # (C, H, W)
    costs_only: bool = False  # `fedsim estimate` asks what a run costs: a method may leave out what changes no cost


State = TypeVar("State")


class Method(ABC, Generic[State]):
    """A pruning method, as a frozen dataclass whose fields are its hyperparameters. State: what the server knows between rounds.

    >>> from fedsim.federated.averaged_round import AveragedState, averaged_round
    >>> @dataclass(frozen=True)
    ... class Dense(Method[AveragedState]):
    ...     def init(self, setting, public):
    ...         return AveragedState.begin(setting, setting.net.initial)
    ...
    ...     def round(self, setting, state, fleet, r):
    ...         return averaged_round(setting, fleet, state, r)
    ...
    ...     def deploy(self, setting, state, fleet, cohort):
    ...         return state.shared, {}, None
    >>> Dense().variants()
    {}
    """

    density: float | None = None  # share of the weights that a masked model keeps, for the choice of kernels; None: no masks

    follows_rounds: ClassVar[bool] = True  # whether a round may depend on how many there are; a class that says False can be extended
    asynchronous: ClassVar[bool] = False  # its rounds are one averaged training each, so that clients may answer to older models

    @property
    def stays(self) -> str:
        """What of the model stays with each client, such as "gates" or "weights": no run file holds it, so that it cannot be exported."""
        return ""

    def unread(self) -> Mapping[str, str]:
        """Its fields that other fields leave without a use, each with the reason; a job that gives one of them is refused."""
        return {}

    @abstractmethod
    def init(self, setting: Setting, public: Data | None) -> State:
        """The state before round 0. public: the server's own images, if any. Raises BadInput for a job that the method cannot run."""

    @abstractmethod
    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        """The state after round `r` and what to record; r = 0 comes first: what precedes training (selection, scoring).

        Where too few clients with devices answer, it is called again with the same state, which must be as it was: make a new one.
        """

    @abstractmethod
    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        """What clients use: shared, own (a row per client of the cohort, which may be empty), and the network after a permanent cut."""

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        """The model a client uses, run where the client is."""
        return sent.tree({})

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        """What round `r` records beside its rate, where clients pay for an `averaged_round`, and only training changes the state.

        Then `fedsim estimate` charges it and need not play it, where the state is an `AveragedState`. None is always right, and slower. It
        speaks of the class that has it and not of its subclasses.
        """
        return None

    def variants(self) -> Mapping[str, Method[Any]]:
        """Other forms in which clients could use the last round's state, by name: methods like this one, evaluated beside it."""
        return {}
