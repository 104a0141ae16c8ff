"""What ranks answer: a message takes in those of other ranks on its way to rank 0, which so receives a few, however many ranks there are.

    8 bytes: length of the header   header (JSON, padded to 8 bytes)   clients, loss, up, form: 8 bytes a client each   rows

A client's rows are what it reports for itself and what it keeps, in a form that most clients share. Long rows do not pass through other
ranks: they go to rank 0 alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.fleet.messages import Columns, Floats, Ints, PackResult
from fedsim.fleet.mpi.tree_buffer import flat, layout, size_of, unflat

Totals = dict[str, list[int]]  # key -> shape of its partial sums, limbs first
Bytes = NDArray[np.uint8]

LONG = 2**16  # bytes of a rank's rows, above which they go to rank 0 alone
NOTHING = "[[], []]"  # the form of a client that has no rows
OWN = ("ones", "arrived", "open")  # what only clients with models of their own have


@dataclass
class Reply:
    """The answers of one rank, or of several."""

    clients: Ints  # (K,)
    loss: Floats  # (K,)
    up: Ints  # (K,) bytes of each report, NO_BYTES where there are none
    form: Ints  # (K,) which of the forms a client's rows have
    forms: list[str]  # layouts of `each` and `keep`, as JSON
    rows: Bytes  # of the clients of all ranks whose rows are here
    ranks: list[tuple[int, int, bool]]  # rank, how many clients it has, whether their rows are here
    totals: Totals | None  # None where a rank has stopped before its end
    own: dict[str, dict[str, Any]] = field(default_factory=dict)  # of OWN: client -> what PackResult has of it
    unlike: str = ""  # why the totals of two ranks cannot be added
    passed: int = 0  # bytes of the replies that it took in

    @property
    def complete(self) -> bool:
        """Whether there is a sum over all its clients, which then follows it."""
        return self.totals is not None and not self.unlike

    @classmethod
    def of(cls, answer: PackResult, rank: int, stopped: bool) -> tuple[Reply, Bytes | None]:
        """A rank's own, and its rows where they are long."""
        clients = [] if stopped else answer.clients
        forms: dict[str, int] = {}
        form = [forms.setdefault(_form(answer, client), len(forms)) for client in clients]
        trees = (where.get(client) for client in clients for where in (answer.each, answer.keep)) if forms.keys() - {NOTHING} else ()
        parts = [flat(held) for held in trees if held]
        rows = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        apart = len(rows) > LONG
        reply = cls(
            np.array(clients, np.int64),
            answer.losses(np.array(clients, np.int64)),
            answer.sent_back(np.array(clients, np.int64)),
            np.array(form, np.int64),
            list(forms),
            np.zeros(0, np.uint8) if apart else rows,
            [(rank, len(clients), not apart)],
            None if stopped else answer.total.layout(),
            {name: {str(client): value for client, value in getattr(answer, name).items()} for name in OWN},
        )
        return reply, rows if apart else None

    def join(self, other: Reply, size: int) -> None:
        """Takes in another, whose message had `size` bytes."""
        forms = {form: i for i, form in enumerate(self.forms)}
        places = np.array([forms.setdefault(form, len(forms)) for form in other.forms], np.int64)
        self.form = np.concatenate([self.form, places[other.form] if len(places) else other.form])
        self.forms = list(forms)
        for name in ("clients", "loss", "up", "rows"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        self.own = {name: self.own.get(name, {}) | other.own.get(name, {}) for name in OWN}
        self.unlike = self.unlike or other.unlike or unlike(self.totals, other.totals)
        self.totals = None if self.totals is None or other.totals is None else self.totals
        self.ranks, self.passed = [*self.ranks, *other.ranks], self.passed + other.passed + size

    def coded(self) -> Bytes:
        """As a message."""
        header = {"forms": self.forms, "ranks": self.ranks, "totals": self.totals, "unlike": self.unlike, "passed": self.passed}
        text = json.dumps(header | {"own": {name: held for name, held in self.own.items() if held}, "clients": len(self.clients)}).encode()
        text += b" " * (-len(text) % 8)
        head = np.array([len(text)], np.int64)
        parts: list[NDArray[Any]] = [head, np.frombuffer(text, np.uint8), self.clients, self.loss, self.up, self.form, self.rows]
        return np.concatenate([part.view(np.uint8) for part in parts])

    @classmethod
    def read(cls, buffer: Bytes) -> Reply:
        """The inverse of `coded`."""
        end = 8 + int(buffer[:8].view(np.int64)[0])
        header = json.loads(buffer[8:end].tobytes())
        cuts = [end + 8 * header["clients"] * i for i in range(5)]
        clients, loss, up, form = [buffer[begin:cut] for begin, cut in pairwise(cuts)]
        ranks = [(rank, count, here) for rank, count, here in header["ranks"]]
        more = header["totals"], header["own"], header["unlike"], header["passed"]
        columns = clients.view(np.int64), loss.view(np.float64), up.view(np.int64), form.view(np.int64)
        return cls(*columns, header["forms"], buffer[cuts[-1] :], ranks, *more)

    def put_into(self, answer: PackResult, rows_of: Callable[[int], Bytes]) -> None:
        """Gives an answer all but the totals. rows_of: rank -> its rows, which it has sent alone."""
        clients, form, begin, place = self.clients.tolist(), self.form.tolist(), 0, 0
        forms = [tuple(json.loads(form)) for form in self.forms]
        for rank, count, here in self.ranks if any(form != NOTHING for form in self.forms) else ():
            rows, at = (self.rows, place) if here else (rows_of(rank), 0)
            for i in range(begin, begin + count):
                at = _put_rows(answer, clients[i], forms[form[i]], rows, at)
            begin, place = begin + count, at if here else place
        answer.clients += clients
        answer.columns = Columns.of(self.clients, self.loss, self.up)
        for name, held in self.own.items():
            getattr(answer, name).update({int(client): value for client, value in held.items()})


def unlike(one: Totals | None, other: Totals | None) -> str:
    """Why totals cannot be added; "" where they can."""
    if one is None or other is None or one == other:
        return ""
    key = min(key for key in {*one, *other} if one.get(key) != other.get(key))
    both = " and ".join(sorted("nothing" if each is None else str(tuple(each[1:])) for each in (one.get(key), other.get(key))))
    return f"total {key!r} is {both} for two clients; all clients must report the same keys and shapes"


def _form(answer: PackResult, client: int) -> str:
    each, keep = answer.each.get(client), answer.keep.get(client)
    return json.dumps([layout(each or {}), layout(keep or {})]) if each or keep else NOTHING


def _put_rows(answer: PackResult, client: int, form: tuple[Any, Any], rows: Bytes, at: int) -> int:
    """What one client reports for itself and what it keeps, from the rows at `at`; where the next one's begin."""
    for where, held in zip((answer.each, answer.keep), form, strict=True):
        if held:
            end = at + size_of(held)
            where[client] = unflat(held, rows[at:end])
            at = end
    return at
