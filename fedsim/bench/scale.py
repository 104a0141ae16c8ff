"""`fedsim bench scale`: how a round grows with ranks and cohort, measured here, and projected to 1,024 ranks.

Many ranks: a real run of 65 of them, which needs some 20 GB, counts messages and bytes at rank 0 beside what small runs lead to expect.
Weak scaling: two client ranks with twice the cohort against one, by real `mpirun`s in turn, beside two processes that share nothing.
Traffic: messages and bytes that rank 0 really sent and received in a round, by ranks and cohort; counts, so that more ranks than
cores do not matter. Projection: the parts of a round from measured costs of one message, one reply and one client; no measurement.
`fedsim bench population` has a million registered clients.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedsim.bench.ranks import apart, launch, seconds
from fedsim.bench.timing import median_seconds
from fedsim.config.job import Job, check, load, resolved
from fedsim.core.validation import MAX_COHORT
from fedsim.federated.client_work import Train
from fedsim.fleet import serial
from fedsim.fleet.messages import Pack, PackResult, WorkOrder
from fedsim.fleet.mpi.reply import Reply
from fedsim.fleet.mpi.tree_buffer import flat
from fedsim.fleet.packing import Packs, images
from fedsim.reporting.formatting import duration, quantity
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.launch import connect
from fedsim.simulation.launch import main as run
from fedsim.storage.reader import RunReader

if TYPE_CHECKING:
    from fedsim.fleet.mpi.communicator import Communicator


DEFAULT = ("jobs/bench/scale.toml",)
REPEATS = 3
RANKS, COHORTS = (1, 2, 4, 8), (8, 32, 128)  # client ranks and cohorts whose traffic is counted
MANY_RANKS, REALLY = "jobs/bench/many_ranks.toml", 64  # a job and the client ranks on which it is run, on however few cores
PROJECTED = (1, 2, 16, 128, 1_024)  # client ranks
ECHO = 100  # tag
TIMES, QUIET = 200, 0.05  # messages that are timed; seconds after which a rank looks seldom


@dataclass(frozen=True)
class Messages:
    """What a message costs between two ranks, and what is done with it, in seconds."""

    awake: float  # a few bytes to a rank that has only begun to wait
    asleep: float  # to one that has waited for QUIET
    byte: float  # more, for every byte
    add: float  # a byte of partial sums added to another
    deal: float  # rank 0 dealing packs and writing down its part of an order, for each rank
    join: float  # a rank reading another's reply, and writing down one for both
    each: float  # more, for each of the clients
    model: int  # bytes of the broadcast model
    total: int  # bytes of the partial sums


@dataclass(frozen=True)
class Costs:
    """What the parts of a round cost, in seconds, when every rank has `clients` of its own."""

    messages: Messages
    clients: int
    compute: float  # of one rank's clients
    server: float  # rank 0's own work in a round of one rank's clients
    client: float  # the same for every further client
    header: float  # bytes of orders and replies for a client


def main(jobs: list[Job], console: Console) -> int:
    """Prints three tables per job."""
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        console.print(_weak(job), "")
        counted = {ranks: traffic(job, ranks) for ranks in RANKS}
        console.print(_counted(job, counted), "")
        console.print(_really(load(Path(MANY_RANKS))), "")
        console.print(_projection(job, costs(job, counted[1])))
    return 0


def sized(job: Job, cohort: int, rounds: int | None = None, clients: int | None = None) -> Job:
    """The job with another cohort, for as many rounds. clients: of the population, with as many images each as before."""
    table = tomllib.loads(resolved(job))
    if clients:
        images = table["data"]["train_images"] * clients // table["partition"]["clients"]
        table |= {"data": table["data"] | {"train_images": images}, "partition": table["partition"] | {"clients": clients}}
    return check(table | {"cohort": {"size": cohort}, "rounds": rounds or job.rounds})


def projected(costs: Costs, ranks: int) -> dict[str, float]:
    """Seconds of each part of a round on so many client ranks, each with clients of its own.

    Down the tree, every level waits for a message of the order to reach ranks that are asleep, and for one of the model; the order of a
    level is for half the ranks of the level before. Up the tree, for the replies of twice as many ranks each time, and for the partial
    sums and their addition. A run cuts its cohort into as many packs as ranks at least (execution.packs), of equal work, and nothing goes
    on beside anything else.
    """
    each, levels, clients = costs.messages, ranks.bit_length(), ranks * costs.clients
    passing = costs.header * clients * each.byte
    return {
        "broadcast": levels * (each.asleep + each.awake + each.model * each.byte) + passing + ranks * each.deal,
        "compute": costs.compute,
        "collect": levels * (each.awake + each.join) + passing + 2 * clients * each.each,
        "reduce": levels * (each.awake + each.total * (each.byte + each.add)),
        "server": costs.server + (clients - costs.clients) * costs.client,
    }


def at_rank_0(costs: tuple[float, int, int], ranks: int, clients: int) -> tuple[int, float]:
    """Messages and bytes of a round: two down and two up a level. costs: bytes for a client, of the model, of the partial sums."""
    header, model, total = costs
    down, up = ranks.bit_length(), ranks.bit_length()
    return 2 * (down + up), down * model + up * total + header * clients


def _weak(job: Job) -> Table:
    table = Table(title=f"weak scaling: seconds per round, median of {REPEATS} runs", title_justify="left")
    for name in ("job", "1 client rank", "2, twice the cohort", "efficiency", "lowest", "highest", "two processes apart"):
        table.add_column(name, justify="left" if name == "job" else "right")
    one, two = job, sized(job, 2 * _cohort(job))
    runs = [(seconds(one, 2), seconds(two, 3), seconds(one, 1), apart(one)) for _ in range(REPEATS)]
    ratios = sorted(run[0] / run[1] for run in runs)
    figures = (median(ratios), ratios[0], ratios[-1], median(alone / both for _, _, alone, both in runs))
    table.add_row(job.name, *(f"{median(run[i] for run in runs):.4f}" for i in range(2)), *(f"{figure:.3f}" for figure in figures))
    return table


def traffic(job: Job, ranks: int, cohorts: Sequence[int] = COHORTS) -> dict[int, tuple[int, int]]:
    """Cohort -> messages and bytes that rank 0 sends and receives in a round beside so many client ranks."""
    with TemporaryDirectory() as folder:
        for cohort in cohorts:
            (Path(folder) / f"{cohort}.toml").write_text(resolved(sized(job, cohort, 2)), encoding="utf-8")
        launch(job, ranks + 1, [sys.executable, "-m", "fedsim.bench.scale", "count", "JOB", folder], Path(folder))
        readers = {cohort: RunReader(Path(folder) / f"{cohort}.h5") for cohort in cohorts}
        return {cohort: (int(run.column("rank0_messages")[-1]), int(run.column("rank0_bytes")[-1])) for cohort, run in readers.items()}


def _counted(job: Job, counted: dict[int, dict[int, tuple[int, int]]]) -> Table:
    model = flat(build_experiment(job).setting.net.initial).nbytes
    table = Table(title=f"{job.name}: at rank 0 in a round; the model has {model:,} bytes", title_justify="left")
    for name in ("client ranks", "cohort", "messages", "bytes", "in models"):
        table.add_column(name, justify="right")
    for ranks, found in counted.items():
        for cohort, (messages, size) in found.items():
            table.add_row(str(ranks), str(cohort), str(messages), f"{size:,}", f"{size / model:.2f}")
    return table


def _really(job: Job) -> Table:
    """A run of many ranks beside what follows from small runs of the same job."""
    few = traffic(job, 1)
    small, large = min(COHORTS), max(COHORTS)
    header = (few[large][1] - few[small][1]) / (large - small)
    parts = build_experiment(job)
    model, cohort = flat(parts.setting.net.initial).nbytes, parts.setting.cohort
    total = few[small][1] - round(small * header) - model
    table = Table(title=f"{job.name}: at rank 0 of {REALLY} client ranks, in a round of {cohort:,} clients", title_justify="left")
    for name in ("", "messages", "bytes", "in models"):
        table.add_column(name, justify="right" if name else "left")
    for name, (messages, size) in {
        "projected": at_rank_0((header, model, total), REALLY, cohort),
        "counted in a real run": traffic(job, REALLY, (cohort,))[cohort],
    }.items():
        table.add_row(name, str(messages), f"{size:,.0f}", f"{size / model:.2f}")
    return table


def costs(job: Job, alone: dict[int, tuple[int, int]]) -> Costs:
    """Of the job's cohort on one client rank; `alone`: the traffic of one client rank by cohort."""
    cohort = _cohort(job)
    mine = _parts(job, cohort)
    tiny = load(Path(MANY_RANKS))  # what rank 0 spends on a client does not depend on the model
    own = {size: _own(_parts(sized(tiny, size, tiny.rounds + 2, size), size)) for size in (_cohort(tiny), MAX_COHORT)}
    small, large = min(COHORTS), max(COHORTS)
    return Costs(
        messages=_messages(job),
        clients=cohort,
        compute=mine["compute"],
        server=_own(mine) - mine["broadcast"] - mine["reduce"],
        client=(own[MAX_COHORT] - own[_cohort(tiny)]) / (MAX_COHORT - _cohort(tiny)),
        header=(alone[large][1] - alone[small][1]) / (large - small),
    )


def _own(figures: dict[str, float]) -> float:
    """Seconds of a round in which rank 0 works and no other rank does."""
    return figures["seconds"] - figures["compute"]


def _projection(job: Job, costs: Costs) -> Table:
    parts = {ranks: projected(costs, ranks) for ranks in PROJECTED}
    title = f"{job.name}: PROJECTED seconds of a round by client ranks of {costs.clients} clients, from costs measured here"
    table = Table(title=title, title_justify="left", caption=_caption(costs), caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("ranks", "cohort", *parts[1], "round", "efficiency"):
        table.add_column(name, justify="right")
    for ranks, found in parts.items():
        whole = sum(found.values())
        figures = (f"{part:.4f}" for part in (*found.values(), whole))
        table.add_row(f"{ranks:,}", f"{ranks * costs.clients:,}", *figures, f"{sum(parts[1].values()) / whole:.3f}")
    return table


def _caption(costs: Costs) -> str:
    each = costs.messages
    names = {"a message": each.awake, "to a rank asleep": each.asleep, "joining two replies": each.join}
    names |= {"and a client of these": each.each, "dealing packs to a rank": each.deal}
    said = ", ".join(f"{name} {duration(value)}" for name, value in names.items())
    return (
        f"{said}, {quantity(1 / each.byte, 'B/s')} between ranks, {quantity(1 / each.add, 'B/s')} added;"
        f" a client: {duration(costs.client)} of rank 0 and {costs.header:.0f} bytes of headers"
    )


def _cohort(job: Job) -> int:
    return build_experiment(job).setting.cohort


def _parts(job: Job, cohort: int) -> dict[str, float]:
    """Median seconds of a round on one client rank, and of its phases; the first rounds, which warm up, are left out."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.h5"
        launch(sized(job, cohort), 2, [sys.executable, "-m", "fedsim", "run", "JOB", "--out", str(out)], Path(folder))
        reader = RunReader(out)
        phases = {name: reader.timing(name) for name in ("broadcast", "compute", "reduce")} | {"seconds": reader.column("seconds")}
        return {name: median(values[2:].tolist()) for name, values in phases.items()}


def _messages(job: Job) -> Messages:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "messages.json"
        launch(job, 2, [sys.executable, "-m", "fedsim.bench.scale", "messages", "JOB", str(out)], Path(folder))
        return Messages(**json.loads(out.read_text()))


# ---- what the ranks do
def _count(folder: Path) -> int:
    """One run for each cohort, on this process's ranks."""
    return max(run(load(job), job.with_suffix(".h5"), "never") for job in sorted(folder.glob("[0-9]*.toml")))


def _exchange(job: Job, out: Path) -> int:
    """Rank 0 measures, rank 1 answers."""
    torch.set_num_threads(1)
    link, parts = connect(), build_experiment(job)
    if link is None:
        return 2
    if link.rank:
        _answers(link)
    else:
        out.write_text(json.dumps(asdict(_asks(link, parts, _answer(parts)))))
    return 0


def _answer(parts: Experiment) -> PackResult:
    """What a rank has when its clients are done."""
    site, setting = parts.site, parts.setting
    clients = list(range(setting.cohort))
    order = WorkOrder(Train.at(setting, 1), setting.net, setting.net.initial, 1, sum(images(site, client) for client in clients))
    nothing = [0] * len(clients)
    with torch.no_grad():
        return serial.carry_out(order, Pack(clients, {}, [None] * len(clients), [nothing, nothing]), site)


def _asks(link: Communicator, parts: Experiment, answer: PackResult) -> Messages:
    total = link.transfer.outgoing_sum(answer.total)
    word, model = np.zeros(1, np.uint8), flat(parts.setting.net.initial)
    awake = _echo(link, word, TIMES)
    asleep = 2 * _echo(link, word, TIMES // 10, QUIET) - awake  # the way back is awake
    large = _echo(link, model, TIMES // 10)
    add = median_seconds(lambda: total + total, TIMES // 10)
    one, many = _replies(answer, 1), _replies(answer, max(PROJECTED) // 2)
    join = median_seconds(lambda: _join(*one), TIMES)
    each = (median_seconds(lambda: _join(*many), TIMES // 10) - join) / (2 * len(many[0].clients))
    sizes = {"model": model.nbytes, "total": total.nbytes}
    deal = _deal(link, parts) / max(PROJECTED)
    return Messages(awake, asleep, max(large - awake, 0.0) / model.nbytes, add / total.nbytes, deal, join, max(each, 0.0), **sizes)


def _replies(answer: PackResult, ranks: int) -> tuple[Reply, Reply]:
    """Of so many ranks that have answered alike, twice."""
    found = []
    for first in (1, 1 + ranks):
        reply = Reply.of(answer, first, False)[0]
        for rank in range(first + 1, first + ranks):
            reply.join(Reply.of(answer, rank, False)[0], 0)
        found.append(reply)
    return found[0], found[1]


def _join(one: Reply, other: Reply) -> None:
    """What a rank does that has answered, once another's answer is there."""
    mine = replace(one)
    mine.join(Reply.read(other.coded()), 0)


def _deal(link: Communicator, parts: Experiment) -> float:
    """Seconds in which rank 0 deals as many packs as all ranks together would get, and writes all parts of the order."""
    from fedsim.fleet.mpi.fleet import MPIFleet
    from fedsim.fleet.mpi.parts import parts_of

    ranks, setting = max(PROJECTED), parts.setting
    clients = [client % setting.clients for client in range(ranks * setting.cohort)]  # each in a pack of its own
    packs = Packs(clients, np.arange(len(clients) + 1), {}, {}, [np.zeros(len(clients), np.int64)] * 2)
    order = WorkOrder(Train.at(setting, 1), setting.net, setting.net.initial, 1, 1)
    fleet = MPIFleet(parts.site, parts.account(), 1, link)
    return median_seconds(lambda: parts_of(packs, fleet.dealt(order, packs, ranks)[1]), REPEATS)


def _answers(link: Communicator) -> None:
    for _ in range(TIMES + 2 * (TIMES // 10)):
        link.send({0: link.receive(0, ECHO)}, ECHO)


def _echo(link: Communicator, buffer: np.ndarray, times: int, quiet: float = 0.0) -> float:
    """Median seconds of one way, there and back after some quiet."""

    def there_and_back() -> None:
        link.send({1: buffer}, ECHO)
        link.receive(1, ECHO)

    return median_seconds(there_and_back, times, quiet) / 2


if __name__ == "__main__":
    what, job, where = sys.argv[1], load(sys.argv[2]), Path(sys.argv[3])
    sys.exit(_count(where) if what == "count" else _exchange(job, where))
