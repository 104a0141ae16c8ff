"""FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639.

Paper -> code:  M_c -> concurrency,  K -> buffer,  tau -> staleness,  s(tau) = 1 / sqrt(1 + tau) -> weight_of

`concurrency` clients train at any time, each from the model that it was sent. Every `buffer` answers are one server step, which is a
round. The move of a client, from the model that it was sent, counts with the weight of its staleness:
w <- w + sum_k s(tau_k) n_k (w_k - w_sent,k) / sum_k n_k. A client is trained when its answer arrives, from the model of its version.
A round takes fewer answers where nobody else can train any more. Running statistics of norms are averaged with these weights, not moved: a
variance that several clients move may fall below 0.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree
from fedsim.costs.profile import Breakdown
from fedsim.devices import clock, draws
from fedsim.federated.protocol import Reply
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Call
from fedsim.fleet.timed import fitting, selection
from fedsim.fleet.timed.emulation import DeviceEmulation
from fedsim.fleet.timed.state import ANSWERED, FAILED, LATE, UNAVAILABLE, UNFIT, Flight, Version


def weight_of(staleness: int) -> float:
    """s(tau) = 1 / sqrt(1 + tau)."""
    return 1 / sqrt(1 + staleness)


class BufferedEmulation(DeviceEmulation):
    """Devices whose answers the server takes one by one."""

    def pick(self, fleet: LocalFleet, k: int, r: int) -> list[int]:
        """The plain draw where the server takes answers one by one: whom it asks, and when, is decided as they come."""
        return fleet.draw(k, r) if r and r == self._r else super().pick(fleet, k, r)

    def run(self, fleet: LocalFleet, call: Call) -> Reply:
        """The answers that fill the buffer, as one reply. What precedes training (round 0) is waited for."""
        if not self._r:
            return super().run(fleet, call)
        self.state.versions[self._r] = Version(call.work, {key: value.clone() for key, value in call.shared.items()})
        arrived = self._arrived(fleet, call)
        reply = self._trained(fleet, call, arrived)
        newest = self._r + 1 - self.rules.max_staleness  # older answers will be dropped
        used = {flight.version for flight in self.state.flights if flight.version >= newest}
        self.state.versions = {version: held for version, held in self.state.versions.items() if version in used}
        return reply

    # ---- who trains

    def _arrived(self, fleet: LocalFleet, call: Call) -> list[Flight]:
        """The answers of this round, in the order in which they come. Those that come at one moment come together."""
        arrived: list[Flight] = []
        while len(arrived) < self.rules.buffer:
            self._send(fleet, call, {flight.client for flight in arrived})
            if not self.state.flights:
                if arrived:
                    return arrived
                raise self._nobody()
            now = min(flight.ends for flight in self.state.flights)
            self.state.seconds = max(now, self.state.seconds)
            for flight in sorted((flight for flight in self.state.flights if flight.ends == now), key=lambda each: each.client):
                if len(arrived) < self.rules.buffer:
                    self.state.flights.remove(flight)
                    self._land(fleet, flight, arrived)
        return arrived

    def _land(self, fleet: LocalFleet, flight: Flight, arrived: list[Flight]) -> None:
        """One client is done: its answer is in the buffer, too stale, or does not come."""
        assert self._r is not None
        stale = self._r - flight.version > self.rules.max_staleness
        status = FAILED if flight.fails else LATE if stale else ANSWERED
        self.log.add(flight.client, flight.ends - flight.begun, flight.joules, status, flight.begun)
        if status == ANSWERED:
            arrived.append(flight)
            self.log.staleness.append(self._r - flight.version)
        else:
            bill = fleet.account.bills.apart(flight.client)
            bill.add_unused(flight.down, flight.up, flight.flops, flight.extra_flops, Breakdown(flight.memory))

    def _send(self, fleet: LocalFleet, call: Call, arrived: set[int]) -> None:
        """Sends the model of this round to new clients, until `concurrency` of them train."""
        busy = arrived | {flight.client for flight in self.state.flights}
        missing, scanned = self.rules.concurrency - len(self.state.flights), 0
        if missing <= 0:
            return
        assert self._r is not None
        attempt = self.state.sends if self.log.status or self.attempt else 0  # a round begins with the draw that it has without devices
        for piece in selection.draws(fleet, min(missing, fleet.filled), self._r, attempt):
            clients = np.array([client for client in piece.tolist() if client not in busy], dtype=np.int64)
            there = self.rules.mix.available(self.rules.seed, clients, self._draw, self.state.seconds)
            busy |= set(clients.tolist())
            named = clients if there.sum() < missing else clients[: np.flatnonzero(there)[missing - 1] + 1]
            self.log.missed(named[~there[: len(named)]].tolist(), UNAVAILABLE)
            if there.any():
                missing -= self._begin(fleet, call, sorted(clients[there][:missing].tolist()))
            scanned += len(piece)
            if missing <= 0 or scanned > max(selection.SCANNED, selection.POOL * self.rules.concurrency):
                return

    def _begin(self, fleet: LocalFleet, call: Call, clients: list[int]) -> int:
        """Has these clients begin now; how many of them can."""
        assert self._r is not None
        fit = fitting.of(fleet, self.rules, call.of(clients))
        self.log.missed(fit.unfit, UNFIT)
        if not fit.call.clients:
            return 0
        self.log.batches |= fit.halvings
        devices = self.rules.mix.of(self.rules.seed, fit.call.clients)
        down = fleet.account.deliver(fleet.order(fit.call), fit.call.clients, {}, fit.preview.arrived)
        times = clock.times(self.rules.mix, devices, fit.preview.needs(down.tolist()))
        ids, self.state.sends = np.array(fit.call.clients), self.state.sends + 1
        fails = draws.uniform(self.rules.seed, "fails", ids, self._r, self.state.sends) < devices.fails
        leaves = draws.uniform(self.rules.seed, "fails at", ids, self._r, self.state.sends) * times.total
        lasts = np.where(fails, leaves, times.total)
        spent, now = times.until(lasts), self.state.seconds
        joules, computed = spent.joules(devices), np.where(times.compute > 0, spent.compute / np.maximum(times.compute, 1e-300), 1.0)
        for i, client in enumerate(fit.call.clients):
            cost, ends, up = fit.preview.costs[i], now + float(lasts[i]), 0 if fails[i] else fit.preview.up[i]
            flight = Flight(client, self._r, now, ends, bool(fails[i]), float(joules[i]), fit.halvings.get(client, 0))
            flight.down, flight.up, flight.memory = int(down[i]), up, dict(cost.memory_terms)
            flight.flops, flight.extra_flops = round(computed[i] * cost.train_flops), round(computed[i] * cost.extra_flops)
            self.state.flights.append(flight)
        return len(fit.call.clients)

    # ---- what comes of it

    def _trained(self, fleet: LocalFleet, call: Call, arrived: list[Flight]) -> Reply:
        """Trains the clients of the buffer, version after version, and adds up what they moved."""
        assert self._r is not None
        parts: list[tuple[int, Version, Reply]] = []
        for version in sorted({flight.version for flight in arrived}):
            flights = sorted((flight for flight in arrived if flight.version == version), key=lambda flight: flight.client)
            held, clients = self.state.versions[version], [flight.client for flight in flights]
            halved = {flight.client: flight.halvings for flight in flights if flight.halvings}
            down = np.array([flight.down for flight in flights], dtype=np.int64)
            carried = fleet.carry(Call(held.work, clients, held.shared, {}, call.net), down, halved)
            parts.append((self._r - version, held, carried.reply))
        if len(parts) == 1 and parts[0][0] == 0:
            return parts[0][2]
        clients = [client for _, _, reply in parts for client in reply.clients]
        order = torch.tensor(np.argsort(clients, kind="stable"))
        rows = {key: torch.cat([reply.each[key] for _, _, reply in parts]) for key in parts[0][2].each}
        each = {key: value[order.to(value.device)] for key, value in rows.items()}
        return Reply(_total(call.shared, parts), each, tuple(sorted(clients)))


def _total(now: Tree, parts: list[tuple[int, Version, Reply]]) -> Tree:
    """Sums over all answers as a method expects them: as if each client had moved the newest model, by its weighted move."""
    whole = sum((reply.total[COUNT] for _, _, reply in parts), torch.zeros((), dtype=torch.float64))
    return {key: _sum(key, now, parts, whole) for key in parts[0][2].total}


def _sum(key: str, now: Tree, parts: list[tuple[int, Version, Reply]], whole: Tensor) -> Tensor:
    if key not in now:
        return torch.stack([reply.total[key] for _, _, reply in parts]).sum(0)
    weights, totals = [weight_of(staleness) for staleness, _, _ in parts], [reply.total for _, _, reply in parts]
    if key.startswith(keys.BUFFERS):
        mine, of_all = (_weighted(weights, [total[name] for total in totals]) for name in (key, COUNT))
        return whole.to(mine.device) * mine / of_all
    moved = [total[key] - total[COUNT] * held.shared[key].double() for total, (_, held, _) in zip(totals, parts, strict=True)]
    return _weighted(weights, moved) + whole.to(moved[0].device) * now[key].double()


def _weighted(weights: list[float], values: list[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)
