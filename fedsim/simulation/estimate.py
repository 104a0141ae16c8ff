"""`fedsim estimate`: checks a job and predicts bytes, FLOPs and memory, without training.

The job's own method runs on a fleet whose clients begin and end their work but take no step, one for all that are alike: what travels
and what is charged depends on shapes, masks and numbers of images alone, so the prediction is what the run file will say. Rounds that
only train are charged and not played. Not so where training decides:
where clients choose between models, it is for the first of them; where masks move, it cannot know which change, and so have their positions
sent (RigL and FedDST: bytes up to a fifth off).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job
from fedsim.core import keys
from fedsim.core.tree import Tree, under
from fedsim.costs import flops, memory
from fedsim.federated import aggregation, verbs
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.budgets import given_by_kind
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import Method, Setting
from fedsim.fleet.messages import Call, PackResult
from fedsim.reporting.formatting import quantity
from fedsim.simulation.devices import forecast
from fedsim.simulation.devices.forecast import Survey
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning.idle_fleet import OneForAllFleet
from fedsim.simulation.round_record import RoundRow, row_of

ALIKE = 0.05  # of a cost: a smaller change is not shown
MEASURED_FOR = 20.0  # seconds after which the rest of the rounds is taken to be like the last


def rows(parts: Experiment, survey: Survey | None = None) -> Iterator[RoundRow]:
    """Row after row as the run would charge them, if all clients of the plain draw took part. survey: notes what devices need for it."""
    setting, method = replace(parts.setting, costs_only=True), parts.method
    fleet = OneForAllFleet(parts.site, parts.account(), 1, time.perf_counter)
    fleet.emulation, fleet.account.prices.timed = survey, survey is not None
    state = verbs.init(method, setting, parts.population.public())
    masks = under(verbs.deploy(method, setting, state, fleet, [])[0], keys.MASKS)
    plain, row = PlainRounds(setting, fleet), None
    for r in range(setting.rounds + 1):
        fleet.open(r)
        said = recorded(method, setting, r) if survey is None and isinstance(state, AveragedState) else None
        if said is not None and plain.same(state, r):
            assert row is not None, "a first round is like no other"
            yield (row := replace(row, values=row.values | said | plain.rate(r)))
            continue
        if said is not None:
            found = said | plain.charged(state, r)
        else:
            with survey.playing(r, 0) if survey else nullcontext():
                state, found = verbs.round(method, setting, state, fleet, r)
            plain = PlainRounds(setting, fleet)  # the method may have changed its state in place
        shared, _, net = verbs.deploy(method, setting, state, fleet, [])
        row = row_of(parts.model_profile, fleet.account.bills, None, shared, row.masks if row else masks, found, net or setting.net)
        yield row


def recorded(method: Method[Any], setting: Setting, r: int) -> dict[str, float] | None:
    """What the method says of its round (`Method.plain`). A subclass may do more in it, and so may an aggregation of one's own."""
    own = "plain" in vars(type(method)) and type(setting.aggregate) in aggregation.NAMES.values()
    return method.plain(setting, r) if own else None


class PlainRounds:
    """Rounds that train the cohort and do no more: each is charged, and none is played, since without steps it changes nothing."""

    def __init__(self, setting: Setting, fleet: OneForAllFleet) -> None:
        self.setting, self.fleet = setting, fleet
        self._state: AveragedState | None = None
        self._sent: Tree = {}
        self._first: PackResult | None = None  # what one client of this state comes to
        self._last: tuple[list[int], ...] = ()  # clients of the last two rounds of this state

    def same(self, state: AveragedState, r: int) -> bool:
        """Whether round `r` costs what the one before cost: it is the third of the same clients, who hold already what they held then."""
        clients = self.fleet.pick(self.setting.cohort, r)
        return self._state is state and self._last == (clients, clients)

    def rate(self, r: int) -> dict[str, float]:
        """The rate of round `r`, as a method records it."""
        return {"lr": Train.at(self.setting, r).lr}

    def charged(self, state: AveragedState, r: int) -> dict[str, float]:
        """Charges round `r`, and says what every method would record."""
        setting, fleet = self.setting, self.fleet
        if self._state is not state:
            self._state, self._sent, self._first, self._last = state, setting.aggregate.shared(state.memory, state.shared), None, ()
        clients = fleet.pick(setting.cohort, r)
        call = Call(Train.at(setting, r), clients, self._sent, {}, setting.net)
        self._first = self._first or fleet.idle_first(call)
        fleet.charge_again(call, self._first)
        self._last = (*self._last[-1:], clients)
        return self.rate(r) | setting.server.take()


def estimate(job: Job, console: Console) -> list[dict[str, float]]:
    """Prints what the job will cost, and returns the rows of numbers that it follows from."""
    parts = build_experiment(job)
    began, seen = time.monotonic(), []
    survey = Survey(parts.devices, bool(given_by_kind(job.method.use))) if parts.devices else None
    for row in rows(parts, survey):
        seen.append(row.values)
        if time.monotonic() - began > MEASURED_FOR:
            break
    for line in _lines(parts):
        console.print(line, highlight=False, markup=False)
    console.print(_table(seen, parts.setting.cohort))
    if survey:
        console.print(forecast.table(survey, survey.rules.mix.names))
        if survey.rules.mix.own or survey.rules.mix.pool:
            console.print("note: the table has the figures of the kinds; files of devices give clients others", markup=False)
    if any("weights_swapped" in row for row in seen):
        console.print("note: training decides which weights move, if any; bytes may differ, since only masks that change are sent")
    for line in _summed(seen, parts.setting.rounds):
        console.print(line, highlight=False, markup=False)
    return seen


def _lines(parts: Experiment) -> Iterator[str]:
    job, setting, model_profile = parts.job, parts.setting, parts.model_profile
    yield f"{job.name}: {job.method.name} on {job.data.called}; the job is valid"
    sizes = parts.population.shards["train"].sizes()
    least, most = sizes.min(), sizes.max()
    yield f"{setting.clients:,} clients of {least:,} to {most:,} training images, {setting.cohort} a round, {setting.rounds} rounds"
    yield from (f"note: {note}" for note in parts.notes)
    yield f"{model_profile.parameters:,} parameters, {flops.forward_flops(model_profile) / 1e6:,.2f} MFLOP forward for an image"
    if normalising := flops.normalising_flops(model_profile):
        yield f"{normalising / 1e6:,.2f} MFLOP to normalise the weights once, in every pass of a batch; in no other figure"
    batch = setting.train.batch
    parts_of = memory.saved(model_profile, batch)
    terms = {"pruned inputs": parts_of["caches"], "signs of ReLUs": parts_of["signs"], "all else": parts_of["others"]}
    kept = (
        ", ".join(f"{name} {value / 1e6:,.2f} MB" for name, value in terms.items())
        if model_profile.keep
        else f"{parts_of.total / 1e6:,.2f} MB"
    )
    yield f"saved for the backward pass of a batch of {batch}: {kept}"


def _summed(seen: list[dict[str, float]], rounds: int) -> Iterator[str]:
    missing = rounds + 1 - len(seen)
    if missing > 0:
        yield f"rounds {len(seen)} to {rounds} are taken to be like round {len(seen) - 1}"
    up, down, flops = (sum(row[name] for row in seen) + missing * seen[-1][name] for name in ("bytes_up", "bytes_down", "train_flops"))
    server = sum(row["server_flops"] for row in seen) + missing * seen[-1]["server_flops"]
    of_server = f", {quantity(server, 'FLOP')} of the server itself" if server else ""
    yield f"whole run: {up / 1e6:,.1f} MB up, {down / 1e6:,.1f} MB down, {quantity(flops, 'FLOP')} of training{of_server}"


def _table(seen: list[dict[str, float]], cohort: int) -> Table:
    """A line wherever a cost changes by more than ALIKE."""
    title = f"per client and round; a new line where a cost changes by more than {ALIKE:.0%}"
    table = Table(title=title, title_justify="left")
    for name in ("rounds", "up, MB", "down, MB", "training, GFLOP (largest)", "memory, MB (largest)", "density"):
        table.add_column(name, justify="right")
    begin = 0
    for r in range(1, len(seen) + 1):
        if r == len(seen) or not _alike(seen[r], seen[begin]):
            table.add_row(f"{begin}" if r - 1 == begin else f"{begin} to {r - 1}", *_costs(seen[begin], cohort))
            begin = r
    return table


def _alike(row: dict[str, float], first: dict[str, float]) -> bool:
    names = ("bytes_up", "bytes_down", "max_client_flops", "max_client_memory", "density")
    return all(abs(row[name] - first[name]) <= ALIKE * first[name] for name in names)


def _costs(row: dict[str, float], cohort: int) -> tuple[str, ...]:
    return (
        f"{row['bytes_up'] / cohort / 1e6:,.3f}",
        f"{row['bytes_down'] / cohort / 1e6:,.3f}",
        f"{row['max_client_flops'] / 1e9:,.2f}",
        f"{row['max_client_memory'] / 1e6:,.2f}",
        f"{row['density']:.4f}",
    )
