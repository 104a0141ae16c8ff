"""What a job asks of each kind of device, before anyone trains: memory, seconds and joules of a round, and whether anyone can do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from fedsim.devices import clock
from fedsim.devices.clock import Need
from fedsim.devices.mix import ClientDevices, DeviceMix
from fedsim.errors import BadInput, ClientFault, MethodFault
from fedsim.federated import verbs
from fedsim.federated.protocol import Reply
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.messages import Call
from fedsim.fleet.timed.emulation import DeviceEmulation
from fedsim.fleet.timed.preview import Preview, preview
from fedsim.fleet.timed.rules import Rules
from fedsim.reporting.formatting import duration, quantity
from fedsim.simulation.experiment import Experiment

LOOKED_AT = 10_000  # clients at most, among whom the fastest and the largest are sought


@dataclass
class Exchange:
    """What a call asks of clients, each kind of device in turn."""

    work: str
    needs: list[Need]
    seconds: np.ndarray  # (kinds, K)
    joules: np.ndarray  # (kinds, K), without waiting
    kind: np.ndarray  # (K,) of each client
    quickest: Need  # of the client with fewest images that may be asked
    least: int  # bytes that some client needs, with batches of one image where these may be halved


@dataclass
class Survey(DeviceEmulation):
    """Notes what each exchange would ask of every kind of device; all clients of the plain draw take part, and no time passes."""

    rules: Rules
    own_sizes: bool = False  # whether clients of each kind have a model of a size of its own
    exchanges: dict[int, list[Exchange]] = field(default_factory=dict)  # by round

    def __post_init__(self) -> None:
        super().__init__(self.rules)

    def pick(self, fleet: LocalFleet, k: int, r: int) -> list[int]:
        return fleet.draw(k, r)

    def run(self, fleet: LocalFleet, call: Call) -> Reply:
        found = preview(fleet, call)
        down = fleet.account.deliver(fleet.order(call), call.clients, call.own, found.arrived)
        needs, mix = found.needs(down.tolist()), self.rules.mix
        kind = mix.kind_of(self.rules.seed, call.clients)
        every = [(clock.times(mix, devices, needs), devices) for devices in _kinds(mix, len(needs))]
        seconds = np.array([times.total for times, _ in every])
        joules = np.array([times.joules(devices) for times, devices in every])
        assert self._r is not None
        least = int(self._smallest(fleet, call).memory().min())
        exchange = Exchange(type(call.work).__name__, needs, seconds, joules, kind, self._quickest(fleet, call, needs), least)
        self.exchanges.setdefault(self._r, []).append(exchange)
        return fleet.carry(call, down).reply

    def _smallest(self, fleet: LocalFleet, call: Call) -> Preview:
        """What the clients need that need least: those with fewest images, and batches of one image where batches may be halved."""
        halvings = max((feed.batch for feed in call.work.feeds), default=1).bit_length() if self.rules.unfit == "fit" else 0
        return preview(fleet, self._of_fewest(fleet, call), halvings)

    def _quickest(self, fleet: LocalFleet, call: Call, needs: list[Need]) -> Need:
        found = preview(fleet, self._of_fewest(fleet, call))
        down = [min(need.bytes_down for need in needs)] * len(found.costs)
        return min(found.needs(down), key=lambda need: sum(need.flops.values()))

    def _of_fewest(self, fleet: LocalFleet, call: Call) -> Call:
        """The call for the client with fewest images of all, where all are sent the same; else for those of the call."""
        if call.own:
            return call
        sizes = fleet.site.population.shards["train"].sizes()
        return call.of([int(np.where(sizes > 0, sizes, sizes.max() + 1).argmin())])

    def columns(self, exchange: Exchange, number: int) -> np.ndarray:
        """(K,) the clients of an exchange that stand for a kind: all of them, or its own where models differ by kind."""
        own = exchange.kind == number
        return own if self.own_sizes and own.any() else np.ones_like(own)


def _kinds(mix: DeviceMix, count: int) -> Iterator[ClientDevices]:
    """For each kind, `count` clients that have its very figures."""
    for number, kind in enumerate(mix.kinds):
        values = {name: np.full(count, getattr(kind, name)) for name in ClientDevices.__dataclass_fields__ if name != "kind"}
        yield ClientDevices(np.full(count, number), **values)


# ---- `fedsim estimate`


def table(survey: Survey, names: list[str]) -> Table:
    """A line for each kind: whether it fits, by how many bytes it does not, and what a round takes it."""
    title = "per kind of device and round, without waiting for others; memory of the round that needs most"
    made = Table(title=title, title_justify="left")
    for name in ("kind", "memory", "seconds (largest)", "joules", *(["late"] if np.isfinite(survey.rules.deadline) else [])):
        made.add_column(name, justify="left" if name == "kind" else "right")
    every = {r: found for r, found in survey.exchanges.items() if r} or survey.exchanges
    trained = list(every.values())  # of each round
    for number, name in enumerate(names):
        seconds = [[each.seconds[number][survey.columns(each, number)] for each in found] for found in trained]
        joules = [[each.joules[number][survey.columns(each, number)] for each in found] for found in trained]
        mean = float(np.mean([sum(times.mean() for times in found) for found in seconds]))
        largest = max(sum(float(times.max()) for times in found) for found in seconds)
        used = float(np.mean([sum(each.mean() for each in found) for found in joules]))
        row = [_fits(survey, number), f"{duration(mean)} ({duration(largest)})", f"{used:,.3g}"]
        made.add_row(name, *row, *([_late(survey, number, trained)] if np.isfinite(survey.rules.deadline) else []))
    return made


def _fits(survey: Survey, number: int) -> str:
    limit = survey.rules.mix.kinds[number].memory
    memory = {
        r: [np.array([need.memory for need in each.needs])[survey.columns(each, number)].max() for each in found]
        for r, found in survey.exchanges.items()
    }
    rounds = {r: int(max(found)) for r, found in memory.items()}
    over = max(rounds.values()) - limit
    if over <= 0:
        return "fits"
    short = f"{int(over):,} bytes over ({quantity(float(max(rounds.values())), 'B')} of {quantity(limit, 'B')})"
    fitting = sum(need <= limit for need in rounds.values())
    return short if not fitting else f"{short}, fits in {fitting} of {len(rounds)} rounds"


def _late(survey: Survey, number: int, trained: list[list[Exchange]]) -> str:
    exchanges = [(each.seconds[number], survey.columns(each, number)) for found in trained for each in found]
    late = [(seconds[those] > survey.rules.deadline).mean() for seconds, those in exchanges]
    return "always" if min(late) == 1 else "never" if max(late) == 0 else f"{np.mean(late):.0%} of clients"


# ---- before the first round


def refuse_hopeless(parts: Experiment, state: object, fleet: LocalFleet, say: Callable[[str], object]) -> None:
    """BadInput where no client has the memory for a round, or none answers before the deadline; it names the fastest one's time.

    state: the method's first; the rounds are tried on a copy of it. fleet: one whose clients take no step. say: what is told a person where
    a method cannot do its rounds without training, so that nothing is known before the first one.
    """
    try:
        _refuse_hopeless(parts, state, fleet)
    except (MethodFault, ClientFault) as fault:
        say(f"note: what a round asks of devices is not known before it: {fault}")


def _refuse_hopeless(parts: Experiment, state: object, fleet: LocalFleet) -> None:
    assert parts.devices is not None
    if fleet.filled > LOOKED_AT:
        return  # one of them may be faster or larger than all that would be looked at
    survey = Survey(parts.devices)
    fleet.emulation, fleet.account.prices.timed = survey, True
    copy = deepcopy(state)
    with parts.setting.server.untouched():
        for r in (0, 1)[: parts.setting.rounds + 1]:
            fleet.open(r)
            with survey.playing(r, 0):
                copy, _ = verbs.round(parts.method, parts.setting, copy, fleet, r)
            for exchange in survey.exchanges.get(r, []):
                _refuse(parts.devices, exchange, r, fleet)


def _refuse(rules: Rules, exchange: Exchange, r: int, fleet: LocalFleet) -> None:
    clients = np.array(fleet.draw(None, 0))
    devices, where = rules.mix.of(rules.seed, clients), f"round {r}: {exchange.work}"
    largest = int(np.argmax(devices.memory))
    if devices.memory[largest] < exchange.least:
        batches = " with batches of one image" if rules.unfit == "fit" else ""
        others = "" if rules.unfit == "fit" else '; devices.unfit = "fit" halves batches until they fit'
        raise BadInput(
            f"{where} needs {exchange.least:,} bytes{batches}, and no client has them: client {clients[largest]}"
            f" ({rules.mix.names[devices.kind[largest]]}) has most, {int(devices.memory[largest]):,}; take a smaller model,"
            f" a lower density, or devices with more memory{others}"
        )
    fits = np.flatnonzero(devices.memory >= exchange.least)
    seconds = clock.times(rules.mix, devices.take(fits), [exchange.quickest] * len(fits)).total
    first = int(np.argmin(seconds))
    if seconds[first] > rules.deadline:
        raise BadInput(
            f"{where} is done by no client before the deadline of {rules.deadline:g} s: client {clients[fits[first]]}"
            f" ({rules.mix.names[devices.kind[fits[first]]]}) is the fastest and needs {seconds[first]:.3g} s; raise cohort.deadline"
        )
