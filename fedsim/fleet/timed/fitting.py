"""Memory is a limit: who can take a call, who cannot, and who can with smaller batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedsim.errors import BadInput
from fedsim.fleet.accounting import ClientCosts
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Call
from fedsim.fleet.timed.preview import Preview, preview
from fedsim.fleet.timed.rules import Rules

Row = tuple[ClientCosts, int]  # what a call costs a client, and the bytes that it sends


@dataclass(frozen=True)
class Fit:
    """A call for the clients that have the memory for it."""

    call: Call
    preview: Preview  # of these clients, as they do it
    unfit: list[int]
    halvings: dict[int, int] = field(default_factory=dict)  # client -> how often its batch is halved
    least: int = 0  # bytes that the client of the call needs that needs least

    def joined(self, more: Fit) -> Fit:
        """With other clients that do the same call without rows of their own."""
        clients = sorted([*self.call.clients, *more.call.clients])
        rows = {client: row for fit in (self, more) for client, row in fit.rows().items()}
        costs, up = [rows[client][0] for client in clients], [rows[client][1] for client in clients]
        arrived = {**self.preview.arrived, **more.preview.arrived}
        whole = Preview(costs, up, arrived)
        return Fit(self.call.of(clients), whole, [*self.unfit, *more.unfit], {**self.halvings, **more.halvings})

    def rows(self) -> dict[int, Row]:
        """Each client with its costs and the bytes that it sends."""
        return dict(zip(self.call.clients, zip(self.preview.costs, self.preview.up, strict=True), strict=True))


def of(fleet: LocalFleet, rules: Rules, call: Call) -> Fit:
    """Those who can take the call. BadInput for one that cannot, where the job says devices.unfit = "error"."""
    found = preview(fleet, call)
    limits = rules.mix.of(rules.seed, call.clients).memory
    fits = found.memory() <= limits
    if fits.all():
        return Fit(call, found, [], least=int(found.memory().min()))
    if rules.unfit == "error" and rules.select != "fits":
        raise _too_small(rules, call, found, limits, int(np.flatnonzero(~fits)[0]))
    rows = {client: (found.costs[i], found.up[i]) for i, client in enumerate(call.clients) if fits[i]}
    halvings = _halved(fleet, call, limits, fits, rows) if rules.unfit == "fit" and rules.select != "fits" else {}
    clients = [client for client in call.clients if client in rows]
    kept = Preview([rows[client][0] for client in clients], [rows[client][1] for client in clients], found.arrived)
    return Fit(call.of(clients), kept, [client for client in call.clients if client not in rows], halvings, int(found.memory().min()))


def _halved(fleet: LocalFleet, call: Call, limits: np.ndarray, fits: np.ndarray, rows: dict[int, Row]) -> dict[int, int]:
    """Adds the clients that fit with halved batches to `rows`, and says how often these are halved."""
    halvings: dict[int, int] = {}
    left = {client: limits[i] for i, client in enumerate(call.clients) if not fits[i]}
    for times in range(1, max(feed.batch for feed in call.work.feeds).bit_length()):
        if not left:
            break
        smaller = call.of(list(left))
        found = preview(fleet, smaller, times)
        for i, client in enumerate(smaller.clients):
            if found.costs[i].memory <= left[client]:
                rows[client], halvings[client] = (found.costs[i], found.up[i]), times
                del left[client]
    return halvings


def _too_small(rules: Rules, call: Call, found: Preview, limits: np.ndarray, i: int) -> BadInput:
    client = call.clients[i]
    kind = rules.mix.names[int(rules.mix.kind_of(rules.seed, [client])[0])]
    needed, limit = found.costs[i].memory, int(limits[i])
    has = f"client {client} ({kind}) has {limit:,} bytes for {type(call.work).__name__}, which needs {needed:,}"
    others = "skip leaves such clients out, fit halves their batches"
    return BadInput(f'[devices] unfit = "error", and {has}: {needed - limit:,} bytes are missing; {others}')
