"""`fedsim bench cuda`: programs captured as CUDA graphs, over the one-by-one eager loop of the same engine, and over the machine's roof.

medium200: seconds per round one by one and graphed, in turn, in one process, for every dtype; the share of the nearer roof, by the
ledger's FLOPs and by the least that a step reads and writes (`row.speeds`); the allocator's peak. cifar_standard: a whole run, from
the job file to the last row. The plan is what `auto` chooses among packs of a program; other jobs are measured as medium200.

Without a CUDA device nothing is timed: the same programs run on the CPU as they are written, for a few clients in float64, and must
agree with the one-by-one engine to 1e-9.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from fedsim.bench.engine_overhead import engine
from fedsim.config.job import Job, load
from fedsim.core import keys
from fedsim.core.tree import Tree, under
from fedsim.fleet.cuda_graph import fleet
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import make_fleet
from fedsim.simulation import launch
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning import roofline
from fedsim.simulation.planning.plan import resolve
from fedsim.simulation.planning.timing import seconds_of
from fedsim.simulation.round_record import speeds

FOLDER = Path("jobs/bench")
COMPARED, WHOLE = FOLDER / "medium200.toml", FOLDER / "cifar_standard.toml"
DTYPES = ("float32", "tf32", "bfloat16")
REPEATS = 7
LIMIT = 1e-9  # of the largest magnitude, between two engines after a round


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job and dtype, and the whole run's seconds where no job is named."""
    if not torch.cuda.is_available():
        return _agreeing(jobs or [load(COMPARED), load(WHOLE)], console)
    table = Table(title=f"{torch.cuda.get_device_name()}, seconds per round, median of {REPEATS}; torch {torch.__version__}")
    for name in ("job", "plan", "dtype", "one by one", "cuda_graph", "times faster", "roof", "share", "peak memory, GB"):
        table.add_column(name, justify="left" if name in ("job", "plan", "dtype", "roof") else "right")
    for job in jobs or [load(COMPARED)]:
        for dtype in DTYPES:
            table.add_row(*_compared(_with(job, {"execution": {"dtype": dtype, "device": "cuda", "fleet": "cuda_graph"}}), console))
    console.print(table)
    if not jobs:
        _whole(load(WHOLE), console)
    return 0


def _with(job: Job, change: dict[str, dict[str, object]]) -> Job:
    sections = {name: getattr(job, name).model_copy(update=fields) for name, fields in change.items()}
    return job.model_copy(update=sections)


def _compared(job: Job, console: Console) -> tuple[str, ...]:
    parts = build_experiment(job)
    plan = resolve(parts, console.print)
    alone = replace(plan, fleet="serial", packs=16)
    fleets = [_fleet(parts, chosen) for chosen in (alone, plan)]
    rounds = [engine(parts, fleet) for fleet in fleets]
    for run in rounds:
        run()
    torch.cuda.reset_peak_memory_stats()
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for run, seconds in zip(rounds, times, strict=True):
            seconds.append(seconds_of(run, parts.site.device))
    slow, fast = (median(seconds) for seconds in times)
    what, share = _nearer_roof(parts, plan, fleets[1], fast)
    peak = torch.cuda.max_memory_allocated() / 1e9
    figures = (f"{slow:.4f}", f"{fast:.4f}", f"{slow / fast:.1f}", what, f"{share:.2f}", f"{peak:.1f}")
    return job.name, f"{plan.packs} packs", plan.dtype, *figures


def _fleet(parts: Experiment, plan: Plan) -> LocalFleet:
    return make_fleet(plan, parts.site, parts.account(), time.perf_counter)


def _nearer_roof(parts: Experiment, plan: Plan, fleet: LocalFleet, seconds: float) -> tuple[str, float]:
    """The roof of which a round reaches the larger share, and that share."""
    peaks = roofline.peaks(parts.site.device, plan.dtype)
    found = speeds(fleet.account.bills, parts.setting.train.batch, {"compute": seconds}, {})
    shares = {"arithmetic": found["compute_flops"] / peaks.flops, "memory": found["compute_bytes"] / peaks.bytes}
    return max(shares.items(), key=lambda entry: entry[1])


def _whole(job: Job, console: Console) -> None:
    """A whole run: data, plan, rounds, records, the stored model."""
    job = _with(job, {"execution": {"device": "cuda"}})
    resolve(build_experiment(job), console.print)  # a plan is measured once for a machine, and kept
    fleet.forget()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        code = launch.main(job, Path(folder) / "run.h5", "never")
        seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e9
    console.print(f"{job.name}: {job.rounds:,} rounds in {seconds:.1f} s (exit code {code}), peak memory {peak:.1f} GB", highlight=False)


def _agreeing(jobs: list[Job], console: Console) -> int:
    """A round of a few clients on the CPU, by programs and one by one; 1 where they do not agree."""
    console.print("there is no CUDA device here: nothing is timed. The same programs on the CPU, against one client after the other:")
    table = Table(box=None, pad_edge=False)
    for name in ("job", "largest difference", "allowed"):
        table.add_column(name, justify="left" if name == "job" else "right")
    differences = {job.name: _difference(_few(job)) for job in jobs}
    for name, found in differences.items():
        table.add_row(name, f"{found:.1e}", f"{LIMIT:.0e}")
    console.print(table)
    return int(not all(found <= LIMIT for found in differences.values()))


def _few(job: Job) -> Experiment:
    """In float64: where a maximum is all but tied, float32's rounding decides which pixel learns, by either engine."""
    parts = build_experiment(_with(job, {"cohort": {"size": 4}, "execution": {"device": "cpu"}}))
    net = parts.setting.net.to("cpu", torch.float64)
    return replace(parts, setting=replace(parts.setting, net=net), site=replace(parts.site, net=net, dtype=torch.float64))


def _difference(parts: Experiment) -> float:
    """Between the weights after a round by two engines, over their largest magnitude."""
    one, other = (_weights(parts, fleet) for fleet in ("serial", "cuda_graph"))
    largest = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[key]).abs().max()) for key, value in one.items()) / largest


def _weights(parts: Experiment, fleet: str) -> Tree:
    made = _fleet(parts, Plan(fleet=fleet, packs=2))
    state = parts.method.init(parts.setting, parts.population.public())
    made.open(1)
    state, _ = parts.method.round(parts.setting, state, made, 1)
    return under(parts.method.deploy(parts.setting, state, made, [])[0], keys.WEIGHTS)
