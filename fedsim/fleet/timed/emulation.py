"""The devices of clients between a method and its fleet: whom the server asks, who answers in time, what time and energy it takes.

A call becomes an exchange: its costs are known before anyone trains, so who is unfit, fails or comes too late is known too and is not
trained. The clock goes on by what the clients that count were charged in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import numpy as np

from fedsim.devices import clock, draws
from fedsim.devices.clock import Times
from fedsim.devices.draws import Floats
from fedsim.devices.mix import ClientDevices
from fedsim.errors import NobodyThere, TooFewAnswers
from fedsim.federated.protocol import Reply
from fedsim.fleet.charging.report_costs import charge_pack
from fedsim.fleet.local_fleet import Carried, LocalFleet
from fedsim.fleet.messages import Call
from fedsim.fleet.timed import fitting, selection
from fedsim.fleet.timed.modes import Arrivals, arrivals
from fedsim.fleet.timed.preview import needs
from fedsim.fleet.timed.rules import Rules
from fedsim.fleet.timed.state import ANSWERED, FAILED, LATE, UNAVAILABLE, UNFIT, ClockState, RoundLog

NOBODY, LONGEST = 60.0, 3_600.0  # seconds after which a server asks again that found nobody to ask: at first, and later


@dataclass(frozen=True, eq=False)
class Exchange:
    """A call for the clients that can do it, as they would do it."""

    call: Call
    fit: fitting.Fit
    devices: ClientDevices
    down: np.ndarray  # (K,) bytes
    times: Times
    fails_at: Floats


class DeviceEmulation:
    """The devices of one run, on rank 0. `state` is what a checkpoint keeps, `log` what the round in progress leaves."""

    def __init__(self, rules: Rules, state: ClockState | None = None) -> None:
        self.rules, self.state = rules, state or ClockState()
        self.log = RoundLog()
        self.attempt = 0
        self._r: int | None = None  # the round in progress; None between rounds, when nothing is timed
        self._asked: dict[int, list[int]] = {}  # clients wanted -> who was asked
        self._substitutes: dict[int, int] = {}  # unfit client -> who took its place
        self._need = 0  # of this round, what `ClockState.need` is of the last one
        self._waits = 0  # times that nobody was there, one after the other

    @contextmanager
    def playing(self, r: int, attempt: int) -> Iterator[None]:
        """Round `r` goes on: what the method calls for takes time. attempt: 0, or how often the round was repeated."""
        if attempt:
            self.log.again()
        else:
            self.log = RoundLog(began=self.state.seconds)
        self._r, self.attempt, self._asked, self._substitutes, self._need = r, attempt, {}, {}, 0
        try:
            yield
            self.state.need, self._waits = self._need, 0
        finally:
            self._r = None

    def times(self, call: Call) -> bool:
        """Whether a call takes time: evaluation is the simulator's own, and deployment is on no bill."""
        return self._r is not None and not call.work.deployment_only and charge_pack(call)

    def pick(self, fleet: LocalFleet, k: int, r: int) -> list[int]:
        """Whom the server asks in the round in progress; the plain draw for other rounds. NobodyThere where nobody is there."""
        if r != self._r:
            return fleet.draw(k, r)
        if k not in self._asked:
            found, missed = selection.chosen(fleet, self.rules, k, r, self.attempt, self.state)
            for status, clients in missed.items():
                self.log.missed(clients, status)
            if not found:
                raise self._nobody()
            self._asked[k] = found
        return self._asked[k]

    def run(self, fleet: LocalFleet, call: Call) -> Reply:
        """Carries the call out on the clients that count. TooFewAnswers where these are fewer than the job's least."""
        exchange = self._begun(fleet, call)
        if exchange is None:
            raise self._nobody()
        wanted = self._wanted(call)
        found = self._arrivals(exchange, wanted)
        counted = [client for client, kept in zip(exchange.call.clients, found.kept, strict=True) if kept]
        if len(counted) < (least := min(self.rules.least, wanted)):
            self._settle(fleet, exchange, found, exchange.times, used=False)
            raise TooFewAnswers(f"{len(counted)} of {len(call.clients)} clients answered; at least {least} are needed")
        halved = {client: exchange.fit.halvings[client] for client in counted if exchange.fit.halvings.get(client)}
        carried = fleet.carry(exchange.call.of(counted), exchange.down[found.kept], halved, exchange.fit.rows())
        times = self._charged(exchange, found.kept, carried)
        self._settle(fleet, exchange, self._as_long(exchange, found, times), times)
        return carried.reply

    # ---- an exchange

    def _begun(self, fleet: LocalFleet, call: Call) -> Exchange | None:
        """The call for those that are still there and have the memory for it, who have received it; None where there is nobody."""
        there = self._there(fleet, call)
        if not there.clients:
            return None
        fit = self._fitting(fleet, there)
        self.log.missed(fit.unfit, UNFIT)
        if not fit.call.clients:
            return None
        self.log.batches |= fit.halvings
        devices = self.rules.mix.of(self.rules.seed, fit.call.clients)
        down = fleet.account.deliver(fleet.order(fit.call), fit.call.clients, fit.call.own, fit.preview.arrived)
        times = clock.times(self.rules.mix, devices, fit.preview.needs(down.tolist()))
        return Exchange(fit.call, fit, devices, down, times, self._fails_at(fit.call, devices, times))

    def _wanted(self, call: Call) -> int:
        """How many answers a call is for: the size of its cohort, which more may have been asked for."""
        return next((k for k, asked in self._asked.items() if asked == call.clients), len(call.clients))

    def _there(self, fleet: LocalFleet, call: Call) -> Call:
        """The call for those that are there: without who has left in an earlier exchange of the round, with who took their places.

        Clients that were not picked for the round, such as all of them, are asked whether they are there.
        """
        gone = self.log.gone()
        clients = {client if call.own else self._substitutes.get(client, client) for client in call.clients} - gone
        if not any(asked == call.clients for asked in self._asked.values()):
            asked = np.array(sorted(clients), dtype=np.int64)
            there = self.rules.mix.available(self.rules.seed, asked, self._draw, self.state.seconds)
            self.log.missed(asked[~there].tolist(), UNAVAILABLE)
            clients = set(asked[there].tolist())
        return call if clients == set(call.clients) else call.of(sorted(clients))

    @property
    def _draw(self) -> int:
        """The number of this attempt at the round, by which chances are drawn."""
        assert self._r is not None
        return self._r + (self.attempt << 32)

    def _fitting(self, fleet: LocalFleet, call: Call) -> fitting.Fit:
        """Those of the call with the memory for it; the others' places go to the next of the draw where the call is the same for all."""
        fit = fitting.of(fleet, self.rules, call)
        if call.own:
            self._need = max(self._need, fit.least)
        if call.own or not fit.unfit or self._r is None:
            return fit
        wanted, tried, away = len(call.clients), set(call.clients) | set(self.log.status), list[int]()
        for piece in selection.draws(fleet, wanted, self._r, self.attempt):
            others = [client for client in piece.tolist() if client not in tried]
            while others and (missing := wanted - len(fit.call.clients)) > 0:
                asked, others = np.array(others[:missing]), others[missing:]
                tried |= set(asked.tolist())
                there = self.rules.mix.available(self.rules.seed, asked, self._draw, self.state.seconds)
                away += asked[~there].tolist()
                if there.any():
                    fit = fit.joined(fitting.of(fleet, self.rules, call.of(sorted(asked[there].tolist()))))
            if len(fit.call.clients) >= wanted or len(tried) > max(selection.SCANNED, selection.POOL * wanted):
                break
        self.log.missed(away, UNAVAILABLE)
        new = [client for client in fit.call.clients if client not in call.clients]
        self._substitutes.update(zip([client for client in call.clients if client in fit.unfit], new, strict=False))
        return fit

    def _fails_at(self, call: Call, devices: ClientDevices, times: Times) -> Floats:
        """(K,) seconds after which each client leaves; infinite for those that stay. A client may leave once in a round."""
        ids = np.array(call.clients)
        if not devices.fails.any():
            return np.full(len(ids), inf)
        assert self._r is not None
        before = np.array([client in self.log.status for client in call.clients])
        leaves = (draws.uniform(self.rules.seed, "fails", ids, self._r, self.attempt) < devices.fails) & ~before
        return np.where(leaves, draws.uniform(self.rules.seed, "fails at", ids, self._r, self.attempt) * times.total, inf)

    def _arrivals(self, exchange: Exchange, wanted: int) -> Arrivals:
        rules, total = self.rules, exchange.times.total
        if rules.mode == "oversample":
            return arrivals(total, exchange.fails_at, first=wanted)
        return arrivals(total, exchange.fails_at, rules.deadline if rules.mode == "deadline" else inf)

    def _charged(self, exchange: Exchange, kept: np.ndarray, carried: Carried) -> Times:
        """The times, of the clients that count by what they were charged in the end."""
        foreseen = exchange.fit.preview
        places = np.flatnonzero(kept).tolist()
        if all(foreseen.costs[i] is cost and foreseen.up[i] == up for i, cost, up in zip(places, carried.costs, carried.up, strict=True)):
            return exchange.times
        found = needs(carried.costs, exchange.down[kept].tolist(), carried.up)
        return _replaced(exchange.times, kept, clock.times(self.rules.mix, exchange.devices.take(kept), found))

    def _as_long(self, exchange: Exchange, found: Arrivals, times: Times) -> Arrivals:
        """The same clients, and how long the exchange lasted by what they were charged in the end."""
        if found.kept.all() or self.rules.mode == "oversample":
            lasts = float(times.total[found.kept].max())
        else:
            lasts = found.lasts if np.isfinite(self.rules.deadline) else max(found.lasts, float(times.total[found.kept].max()))
        ends = np.where(found.kept, times.total, np.minimum(found.ends, lasts) if self.rules.mode == "oversample" else found.ends)
        return Arrivals(found.kept, lasts, ends)

    # ---- what it took

    def _settle(self, fleet: LocalFleet, exchange: Exchange, found: Arrivals, times: Times, used: bool = True) -> None:
        """Puts seconds, joules and the bills of those that do not count on record, and moves the clock. used: whether the others count."""
        spent, begun = times.until(found.ends), self.state.seconds
        waiting = np.where(found.kept, np.maximum(found.lasts - found.ends, 0.0), 0.0)
        joules = spent.joules(exchange.devices, waiting)
        status = np.where(found.kept, ANSWERED, np.where(exchange.fails_at <= found.lasts, FAILED, LATE))
        self.log.exchanged(exchange.call.clients, found.ends, joules, status, begun)
        for i in np.flatnonzero(~found.kept | (not used)).tolist():
            whole = times.compute[i]
            self._charge(fleet, exchange, i, spent.compute[i] / whole if whole else 1.0, bool(found.ends[i] >= times.total[i]))
        self._pass(found.lasts)

    def _charge(self, fleet: LocalFleet, exchange: Exchange, i: int, share: float, sent_back: bool) -> None:
        """The bill of a client that does not count: what it was sent, the part it computed, and its answer where it came too late."""
        cost, up = exchange.fit.preview.costs[i], exchange.fit.preview.up[i] if sent_back else 0
        bill = fleet.account.bills.apart(exchange.call.clients[i])
        flops, extra = round(share * cost.train_flops), round(share * cost.extra_flops)
        bill.add_unused(int(exchange.down[i]), up, flops, extra, cost.memory_terms)

    def _pass(self, seconds: float) -> None:
        self.state.seconds += seconds

    def _nobody(self) -> NobodyThere:
        """Nobody could be asked: some time passes, more each time."""
        self._pass(min(NOBODY * 2.0**self._waits, LONGEST))
        self._waits += 1
        return NobodyThere("no client could be asked: all are unavailable, unfit, or have left")


def _replaced(times: Times, kept: np.ndarray, true: Times) -> Times:
    """The times with those of the clients that count as they were charged."""
    found = {name: getattr(times, name).copy() for name in ("down", "compute", "up")}
    for name, values in found.items():
        values[kept] = getattr(true, name)
    return Times(**found)
