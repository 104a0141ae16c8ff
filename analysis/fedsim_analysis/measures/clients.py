"""Clients: how their accuracy is spread, the worst of them, who holds images of which class, and when their devices worked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.colours import Style
from fedsim_analysis.measures.groups import Group, groups
from fedsim_analysis.measures.layers import Heat
from fedsim_analysis.measures.nodes import Lacking, Numbers, column, labels, needed, node, of_run, place_of, round_numbers

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

STATUS = ("answered", "late", "failed", "unfit", "unavailable")  # codes of the column clients/status
SHOWN_ROUNDS = 3
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
AT_ONCE = 2**26  # bytes of a column that are held at once


@dataclass(frozen=True)
class Distribution:
    """Quantiles over clients of a column in each round: of each run, then their mean over the runs of the group."""

    label: str
    method: str
    rounds: NDArray[np.int64]  # (points,) in which a run of the group has measured the column
    levels: tuple[float, ...]  # of the quantiles: 0 is the worst client, 0.5 the median
    quantiles: Numbers  # (levels, points)
    clients: NDArray[np.int64]  # (points,) the most clients that a run has measured
    n: NDArray[np.int64]  # (points,) runs
    runs: tuple[str, ...]
    style: Style
    title: str
    units: str
    share: bool


@dataclass(frozen=True)
class ClientValues:
    """A column of every client of one run after one round. `values` (clients,) without clients that were not measured."""

    run: str
    label: str  # of its group
    method: str
    round: int
    clients: tuple[str, ...]
    values: Numbers
    title: str
    units: str
    share: bool

    @property
    def worst(self) -> str:
        """The client of the lowest value, the first of equals."""
        return self.clients[int(np.argmin(self.values))]


def distribution(runs: Runs, name: str = "accuracy") -> list[Distribution]:
    """The spread over clients of a column of the node `clients`, for each group that has measured it.

    Lacking where no run has measured it.
    """
    title, units, share = about(runs, name)
    found = [one for group in groups(runs, "clients") if (one := _of_group(runs, group, name, (title, units, share))) is not None]
    if not found:
        raise Lacking(f"no run has measured clients/{name}")
    return found


def _of_group(runs: Runs, group: Group, name: str, shown: tuple[str, str, bool]) -> Distribution | None:
    each, counts = [], []
    for i in group.places:
        quantiles, count = _of_one(runs, name, i)
        each.append(quantiles)
        counts.append(count)
    held, clients = np.stack(each), np.stack(counts)  # (runs, levels, rounds), (runs, rounds)
    n = (clients > 0).sum(axis=0)
    points = n > 0
    if not points.any():
        return None
    mean = np.nansum(held[:, :, points], axis=0) / n[points]
    line = (round_numbers(runs, "clients")[points], LEVELS, mean, clients.max(axis=0)[points], n[points])
    return Distribution(group.label, group.method, *line, group.runs, group.style, *shown)


def _of_one(runs: Runs, name: str, i: int) -> tuple[Numbers, NDArray[np.int64]]:
    """(levels, rounds) quantiles over clients of run `i`, and (rounds,) clients measured."""
    found = node(runs, "clients")
    rounds, step = found.sizes["round"], max(1, AT_ONCE // (8 * max(1, found.sizes["client"])))
    quantiles, count = np.full((len(LEVELS), rounds), np.nan), np.zeros(rounds, np.int64)
    for begin in range(0, rounds, step):
        rows = of_run(runs, "clients", name, i, slice(begin, begin + step))  # (rounds, clients)
        there = np.isfinite(rows).sum(axis=1)
        count[begin : begin + step] = there
        for r in np.flatnonzero(there):
            quantiles[:, begin + r] = np.quantile(rows[r][np.isfinite(rows[r])], LEVELS)
    return quantiles, count


def of_clients(runs: Runs, run: str | None = None, name: str = "accuracy") -> ClientValues:
    """The column of every client in the last round in which it was measured; of one run, by default the first that has measured it."""
    names = labels(runs, "clients", "run")
    places = range(len(names)) if run is None else [place_of(runs, "clients", run)]
    shown = about(runs, name)
    for i in places:
        counts = _of_one(runs, name, i)[1]
        if counts.any():
            r = int(np.flatnonzero(counts)[-1])
            row = of_run(runs, "clients", name, i, slice(r, r + 1))[0]
            there = np.isfinite(row)
            group = next(group for group in groups(runs, "clients") if i in group.places)
            called = np.array(client_names(runs, "clients"), dtype=object)[there]
            number = int(round_numbers(runs, "clients")[r])
            return ClientValues(names[i], group.label, group.method, number, tuple(map(str, called)), row[there], *shown)
    raise Lacking(f"{'no run' if run is None else f'the run {run}'} has measured clients/{name}")


def about(runs: Runs, name: str) -> tuple[str, str, bool]:
    """What a column of the node `clients` shows, its unit, and whether it is a share."""
    found = node(runs, "clients")
    units = str(found[name].attrs.get("units", "1")) if name in found.data_vars else "1"
    share = units == "1" and name.endswith(("accuracy", "density", "share", "open"))
    return f"{name.replace('_', ' ').capitalize()} of clients", units, share


def client_names(runs: Runs, place: str) -> list[str]:
    """The clients' names, where the data set has some, else their numbers."""
    return _called(runs, place, "client")


def _called(runs: Runs, place: str, dimension: str) -> list[str]:
    found = node(runs, place)
    name = f"{dimension}_name"
    return labels(runs, place, name if name in found.coords else dimension)


def partition(runs: Runs, run: str | None = None) -> Heat:
    """(clients, classes) training images that each client holds of each class, in one run, by default the first that has stored them.

    Lacking where none has: runs with very many clients leave them out.
    """
    counts = needed(runs, "partition", "counts")  # (run, client, class)
    names = labels(runs, "partition", "run")
    measured = np.asarray(np.isfinite(counts).any(axis=(1, 2)))
    i = int(np.flatnonzero(measured)[0]) if run is None else place_of(runs, "partition", run)
    if not measured[i]:
        raise Lacking(f"the run {run} has not stored partition/counts")
    held, kept = np.isfinite(counts[i]).any(axis=1), np.isfinite(counts[i]).any(axis=0)
    clients = tuple(np.array(_called(runs, "partition", "client"), dtype=object)[held])
    classes = tuple(np.array(_called(runs, "partition", "class"), dtype=object)[kept])
    values = counts[i][held][:, kept]
    return Heat(names[i], values, clients, classes, "Client", "Class", "Training images", "1", False, 1)


@dataclass(frozen=True)
class Timeline:
    """When the devices of one run worked in some rounds, by the virtual clock: a bar for each client that was asked, (bars,) each."""

    run: str
    label: str  # of its group
    rounds: NDArray[np.int64]  # (rounds,) that are shown
    ends: Numbers  # (rounds,) seconds since the start at which each of them ended
    round_of: NDArray[np.int64]
    clients: NDArray[np.int64]  # number of the client
    begun: Numbers  # seconds since the start
    ended: Numbers
    status: NDArray[np.int64]  # of STATUS

    @property
    def counts(self) -> dict[str, int]:
        """Bars of each status that occurs."""
        return {name: n for code, name in enumerate(STATUS) if (n := int((self.status == code).sum()))}


def timeline(runs: Runs, run: str | None = None, rounds: Sequence[int] | None = None) -> Timeline:
    """The timeline of one run, by default the first with devices, in some rounds, by default the last three.

    Lacking where no run has devices, or where no client was asked in these rounds.
    """
    begun = node(runs, "rounds")
    at = _with_devices(runs) if run is None else place_of(runs, "rounds", run)
    numbers = round_numbers(runs, "rounds")
    clock, lasted = (of_run(runs, "rounds", name, at) for name in ("clock", "round_time"))
    there = numbers[np.isfinite(clock) & (numbers > 0)]
    wanted = there[-SHOWN_ROUNDS:] if rounds is None else np.asarray(rounds, dtype=np.int64)
    if unknown := [int(r) for r in wanted if r not in numbers[np.isfinite(clock)]]:
        raise Lacking(f"the run has no round {unknown[0]}; it has 0 to {numbers[np.isfinite(clock)].max()}")
    places = np.flatnonzero(np.isin(numbers, wanted))
    start, end, status = (of_run(runs, "clients", name, at, places) for name in ("begun", "ended", "status"))
    row, client = np.nonzero(np.isfinite(start) & np.isfinite(end))
    if not len(row):
        raise Lacking("no client was asked in these rounds")
    began = (clock - lasted)[places]
    spans = (began[row] + start[row, client], began[row] + end[row, client])
    label = next(group.label for group in groups(runs) if at in group.places)
    codes = status[row, client].astype(np.int64)
    name = str(begun["run"].values[at])
    return Timeline(name, label, numbers[places], clock[places], numbers[places][row], client.astype(np.int64), *spans, codes)


def _with_devices(runs: Runs) -> int:
    clock = np.isfinite(column(runs, "rounds", "clock")).any(1)
    if not clock.any():
        raise Lacking("no run has devices with a clock: [devices] of a job gives them")
    return int(np.argmax(clock))
