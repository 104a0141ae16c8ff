"""What every fleet does besides the work itself: picking cohorts, cutting packs, kept state, counting calls, charging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index
from typing import Any, Protocol

import numpy as np
import torch

from fedsim.core import tree
from fedsim.core.trace import span
from fedsim.core.tree import Tree
from fedsim.core.validation import MAX_COHORT
from fedsim.errors import BadInput, Stopped
from fedsim.federated.client_work import Evaluate
from fedsim.federated.protocol import Reply, Work
from fedsim.federated.verbs import fits
from fedsim.fleet import checks
from fedsim.fleet.accounting import Charged, ClientCosts, CostAccount
from fedsim.fleet.charging.report_costs import charge_pack
from fedsim.fleet.client_images import TESTS
from fedsim.fleet.messages import Call, Pack, PackResult, WorkerContext, WorkOrder, merged, smaller_batches
from fedsim.fleet.packing import Ints, Packs, cuts_of, held, whole_images
from fedsim.nn.net import Net
from fedsim.storage.places.beside import Beside

NOBODY: Ints = np.zeros(0, np.int64)
Engine = Callable[[WorkOrder, Pack, WorkerContext], PackResult]
Answers = Callable[[WorkOrder, Sequence[Pack], WorkerContext], Iterator[PackResult]]


@dataclass(frozen=True)
class Carried:
    """A call that was carried out: the reply, and what each client was charged for it, without what it was sent."""

    reply: Reply
    clients: list[int]
    charged: list[tuple[list[int], Charged]]  # clients, and what these were charged
    answer: PackResult

    @property
    def costs(self) -> list[ClientCosts]:
        """(K,) of each client; clients alike share one object."""
        found = {client: cost for clients, charged in self.charged for client, cost in zip(clients, charged.each(), strict=True)}
        return [found[client] for client in self.clients] if found else []

    @property
    def up(self) -> list[int]:
        """(K,) bytes that each client sent."""
        return self.answer.sent_back(np.asarray(self.clients, np.int64)).tolist()


class Emulation(Protocol):
    """Devices of clients: who is asked, who answers, and what time it takes; `fedsim.fleet.timed.emulation` is it."""

    def times(self, call: Call) -> bool: ...
    def pick(self, fleet: Any, k: int, r: int) -> list[int]: ...
    def run(self, fleet: Any, call: Call) -> Reply: ...


class LocalFleet:
    """Runs every pack in this process, one after the other; a subclass says how one pack is carried out."""

    name = "local"
    carry_out: Engine

    def __init__(
        self,
        site: WorkerContext,
        account: CostAccount,
        packs: int,
        clock: Callable[[], float],
        kept: MutableMapping[int, Tree] | None = None,
    ) -> None:
        self.site, self.account, self.packs, self.clock = site, account, packs, clock
        self.timing = {"broadcast": 0.0, "compute": 0.0, "reduce": 0.0}  # seconds, growing
        self.moved = {"broadcast": 0, "reduce": 0}  # bytes between ranks, growing
        self.traffic = {"rank_bytes": 0, "rank0_bytes": 0, "rank0_messages": 0}  # of all ranks, and of rank 0, growing
        self.touched: set[int] = set()  # clients whose kept state changed; whoever writes it down empties this
        self.kept: MutableMapping[int, Tree] = {} if kept is None else kept
        self.r = 0
        self.emulation: Emulation | None = None
        self._undo: dict[int, tuple[Tree | None, bool]] | None = None  # what clients kept, and whether it is to be written down
        self._beside = Beside()
        self._calls: dict[str, tuple[Ints, Ints]] = {}  # in this round: purpose or split -> sorted clients, and how often each
        sizes = site.population.shards["train"].sizes()
        self._filled = None if sizes.min() > 0 else np.flatnonzero(sizes)

    def open(self, r: int) -> None:
        """Begins round `r`: calls are counted anew, and nothing has been sent yet."""
        self.r = r
        self._calls.clear()
        self.account.open()

    def pick(self, k: int | None, r: int) -> list[int]:
        """`k` (None: all) distinct non-empty clients, sorted: a function of the seed and the round, the same for every method.

        Where clients have devices, more or fewer may be asked in the round in progress.
        """
        return self.draw(k, r) if self.emulation is None or k is None else self.emulation.pick(self, k, r)

    @property
    def filled(self) -> int:
        """Clients that have training images."""
        return self.site.population.clients if self._filled is None else len(self._filled)

    def drawn(self, generator: np.random.Generator, k: int) -> np.ndarray:
        """(k,) distinct clients that have training images, in the order of a draw."""
        chosen = generator.choice(self.filled, k, replace=False)
        return chosen if self._filled is None else self._filled[chosen]

    def draw(self, k: int | None, r: int) -> list[int]:
        """`pick`, whatever devices clients have."""
        if k is None:
            return list(range(self.filled)) if self._filled is None else self._filled.tolist()
        if k > self.filled:
            raise BadInput(
                f"a cohort of {k} was asked for, but only {self.filled} clients have training images; lower cohort.size or set"
                " partition.min_images >= 1"
            )
        return np.sort(self.drawn(np.random.default_rng((self.site.seed, r)), k)).tolist()

    def later(self, task: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        """Runs `task` beside the training that follows, after the task before has ended; `then` is run by `drain`, after it."""
        self._beside.begin(task, then)

    def run(self, work: Work, cohort: Sequence[int], shared: Tree, own: Tree | None = None, net: Net | None = None) -> Reply:
        """Has every client of the cohort do the work; totals over the cohort, and the rows of each client in sorted order."""
        clients = sorted(map(index, cohort))
        call = Call(work, clients, shared, own or {}, net or self.site.net)
        self._check(call)
        if self.emulation is not None and self.emulation.times(call):
            return self.emulation.run(self, call)
        return self.carry(call).reply

    def order(self, call: Call) -> WorkOrder:
        """The call as packs get it."""
        return WorkOrder(call.work, call.net, self._placed(call.shared), self.r, whole_images(self.site, call.clients))

    def carry(
        self,
        call: Call,
        down: np.ndarray | None = None,
        halved: Mapping[int, int] | None = None,
        foreseen: Mapping[int, tuple[ClientCosts, int]] | None = None,
    ) -> Carried:
        """Has all clients of the call do the work. down: (K,) bytes that they were sent for it, where they have been sent it already.

        halved: client -> how often its batches are halved, where its memory is too small for them. foreseen: see `CostAccount.charge`.
        """
        order, answer, charged = self.order(call), None, list[tuple[list[int], Charged]]()
        for times in sorted({halved.get(client, 0) for client in call.clients}) if halved else [0]:
            mine = call.of([client for client in call.clients if halved.get(client, 0) == times]) if halved else call
            part = replace(order, work=smaller_batches(order.work, times))
            with torch.no_grad():
                found = self._carried_out(part, self._packed(part, mine.clients, self._placed(mine.own)))
            if charge_pack(part):
                received = None if down is None else down[np.isin(call.clients, mine.clients)]
                with span("bills"):
                    charged.append((mine.clients, self.account.charge(part, mine.clients, mine.own, found, received, foreseen)))
            answer = found if answer is None else merged(answer, found)
        assert answer is not None
        self._keep(answer)
        rows = [answer.each.get(client, {}) for client in call.clients] if answer.each else []
        checks.alike(rows, call.clients, "each")
        reply = Reply(self._placed(answer.total.value()), self._placed(tree.stack(rows)), tuple(call.clients))
        return Carried(reply, call.clients, charged, answer)

    @contextmanager
    def undoing(self) -> Iterator[Callable[[], None]]:
        """Until its end, what it gives takes back what clients have put aside since, as if they had not been visited."""
        self._undo = {}
        try:
            yield self._take_back
        finally:
            self._undo = None

    def _take_back(self) -> None:
        for client, (kept, touched) in (self._undo or {}).items():
            if kept is None:
                del self.kept[client]
            else:
                self.kept[client] = kept
            if not touched:
                self.touched.discard(client)

    def _placed(self, part: Tree) -> Tree:
        return tree.each(lambda value: value.to(self.site.device), part)

    def _keep(self, answer: PackResult) -> None:
        """What clients put aside at this visit."""
        for client, keep in answer.keep.items():
            if keep:
                if self._undo is not None and client not in self._undo:
                    self._undo[client] = held(self.kept, client), client in self.touched
                self.kept[client] = (held(self.kept, client) or {}) | keep
                self.touched.add(client)

    def drain(self) -> None:
        """Waits for the task that goes on beside the training; what that raised is raised here."""
        self._beside.wait()

    def _carried_out(self, order: WorkOrder, packs: Packs) -> PackResult:
        begin, answer = self.clock(), PackResult(order.sum())
        for part in checks.drawing_by_keys(self.answers(order, packs, self.site), order, packs, self.site):
            answer.merge(part)
            if self._beside.failed:
                self.drain()
        self.timing["compute"] += self.clock() - begin
        return answer

    @classmethod
    def answers(cls, order: WorkOrder, packs: Sequence[Pack], context: WorkerContext) -> Iterator[PackResult]:
        """The answer of one pack after the other. Raises Stopped when the context is asked to stop."""
        for pack in packs:
            if context.stopped():
                raise Stopped
            with span(order.work.purpose, clients=len(pack.clients), r=order.r):
                answer = cls.carry_out(order, pack, context)
            yield answer

    def _packed(self, order: WorkOrder, clients: list[int], own: Tree) -> Packs:
        return Packs(clients, cuts_of(len(clients), self.packs), own, self.kept, self._counted(order.work, clients))

    def _counted(self, work: Work, clients: list[int]) -> list[Ints]:
        """(K,) earlier uses in this round of the work, then of each feed's split, by each client."""
        ids, calls = np.asarray(clients), []
        for purpose in (work.purpose, *(feed.split for feed in work.feeds)):
            known, counts = self._calls.get(purpose, (NOBODY, NOBODY))
            every = np.union1d(known, ids) if len(known) else ids
            times = np.zeros(len(every), np.int64)
            times[np.searchsorted(every, known)] = counts
            rows = np.searchsorted(every, ids)
            calls.append(times[rows])
            times[rows] += 1
            self._calls[purpose] = every, times
        return calls

    def _check(self, call: Call) -> None:
        work, clients = call.work, call.clients
        if not clients:
            raise ValueError("the cohort is empty; it must have at least one client")
        if not (np.diff(clients) > 0).all():
            twice = next(one for one, following in pairwise(clients) if one == following)
            raise ValueError(f"client {twice} stands in the cohort twice; the clients of a cohort must be distinct")
        if not isinstance(work, Work):
            raise TypeError(f"a fleet runs a Work; {type(work).__name__} does not inherit from fedsim.Work")
        count = self.site.population.clients
        if not isinstance(work, Evaluate) and not 0 <= clients[0] <= clients[-1] < count:
            unknown = clients[0] if clients[0] < 0 else clients[-1]
            raise ValueError(f"a cohort has client {unknown}, and the clients are 0 to {count - 1}; fleet.pick gives a cohort")
        for name, sent in (("shared", call.shared), ("own", call.own)):
            tree.check(sent, name)
        fits(call.net, call.shared, "shared")
        for feed in work.feeds:
            if feed.split in TESTS and not isinstance(work, Evaluate):
                raise ValueError(f"{type(work).__name__} asks for test images, which only Evaluate may see")
            if feed.split == "held" and not self.site.population.shards["held"].sizes().any():
                raise ValueError(f"{type(work).__name__} asks for held-out images; set partition.holdout above 0")
        if len(clients) > MAX_COHORT:
            raise ValueError(f"a cohort of {len(clients):,} clients; at most {MAX_COHORT:,} can be summed exactly")
        for key, value in call.own.items():
            if value.dim() == 0 or len(value) != len(clients):
                rows = f"{len(value)} rows" if value.dim() else "no rows"
                raise ValueError(f"own {key!r} has {rows} for a cohort of {len(clients)}")
