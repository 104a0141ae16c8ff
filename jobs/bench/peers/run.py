"""fedsim, pfl, Flower and a bare PyTorch loop on the same work, in turn: `python jobs/bench/peers/run.py --help`.

The peers do dense FedAvg. Of a job with another method they train the same network, undivided by masks, on the same images and with as
many steps; there a run's mean round counts, for some of its rounds adjust masks.

First each of them runs two rounds in which every client takes part with all of its images in one batch, so that neither the choice of
clients nor the order of images can matter, and all must end with the same weights. Then the timed runs, whose local steps are counted.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from environments import python_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from work import Work, write

from fedsim import models
from fedsim.bench.ranks import launch, rounds
from fedsim.config.job import Chosen, Job, load
from fedsim.config.method_registry import find
from fedsim.errors import BadInput
from fedsim.simulation.experiment import build_experiment
from fedsim.storage.reader import RunReader

HERE = Path(__file__).parent
JOBS = (HERE.parent / "small.toml", HERE.parent / "medium.toml")
BARE, DENSE = "bare loop", "fedavg"
WARM = 2  # rounds at the start of a run that are left out, as fedsim.bench.ranks does
SAME = 2e-3  # of the way that the weights have gone: how far apart they may end, for sums in float32; a step more or less is 0.25
SAME_NORMED = 5e-3  # the same with batch norm: there the bare loop in float32 ends 0.0033 away from itself in float64, fedsim 0.0028
LIKE_FEDSIM = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(HERE.parents[2]),  # for layers of fedsim's own, which need torch alone
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),  # what fedsim.simulation.malloc has glibc do for fedsim itself
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
# what the peers' scripts can do: of a job that asks for more they would do less work than fedsim
PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "optimiser": "sgd", "schedule": "constant", "aggregate": "fedavg", "steps": None}


@dataclass(frozen=True)
class Answer:
    """What a peer's run gave."""

    seconds: list[float]  # of every round
    steps: int  # local, in the first round, of the whole cohort
    last: dict[str, Tensor]


@dataclass(frozen=True)
class Runner:
    """One way to do the work."""

    name: str
    cores: int
    timed: Callable[[Job, Work], float]  # median seconds of a round
    last: Callable[[Job, Work], dict[str, Tensor]]  # final weights


def main() -> int:
    asked = _asked()
    console = Console()
    try:
        jobs = [_job(path, asked.rounds, asked.set) for path in asked.job or JOBS]
        dense_rounds = _more_than_warm("--dense-rounds", asked.dense_rounds or asked.rounds)
    except BadInput as error:
        console.print(str(error), markup=False)
        return 2
    runners = _runners(asked.environments, asked.bare)
    if unknown := [name for name in asked.without if name not in [runner.name for runner in runners] or name == BARE]:
        console.print(
            f"--without {unknown[0]!r}: there are {', '.join(runner.name for runner in runners if runner.name != BARE)}", markup=False
        )
        return 2
    runners = [runner for runner in runners if runner.name not in asked.without]
    for job in jobs if not asked.unchecked else ():
        with console.status(f"{job.name}: the same work?"):
            _check(job, runners, console)
    if not asked.check:
        table = _table(asked.repeats)
        for job in jobs:
            with console.status(f"{job.name}: {asked.repeats} turns"):
                _measure(job, runners, asked.repeats, dense_rounds, table)
        console.print(table)
    return 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fedsim, pfl, Flower and a bare PyTorch loop on the same work.")
    parser.add_argument("--job", type=Path, action="append", metavar="JOB.toml", help="may be given again; without it small and medium")
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"), metavar="FOLDER", help="two of 6 GB (.venv-peers)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn (5)")
    parser.add_argument("--rounds", type=int, default=12, help=f"of a run, {WARM} of them left out (12)")
    parser.add_argument("--dense-rounds", type=int, metavar="N", help="of the others' runs, whose rounds are all alike (as --rounds)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value of the jobs")
    parser.add_argument("--bare", action="store_true", help="fedsim and the bare PyTorch loop alone, which need no environments")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help='leave one out, such as "pfl, 2 workers"')
    parser.add_argument("--check", action="store_true", help="only make the environments and compare the final weights")
    parser.add_argument("--unchecked", action="store_true", help="only time: the same network and data were compared before")
    return parser.parse_args()


def _job(path: Path, rounds: int, changed: list[str]) -> Job:
    """BadInput for a job that the peers' scripts would not do in full."""
    job = load(path, (*changed, f"rounds={_more_than_warm('--rounds', rounds)}", "execution.device=cpu"))
    differing = {name: getattr(job.train, name) for name, value in PLAIN.items() if getattr(job.train, name) != value}
    if job.partition.name != "blocks" or job.model.factory or differing:
        raise BadInput(f'{path}: the peers do models of fedsim\'s own, partition "blocks", and in [train] {PLAIN}')
    return job


def _more_than_warm(option: str, rounds: int) -> int:
    if rounds <= WARM:
        raise BadInput(f"{option} {rounds}: the first {WARM} are left out; give at least {WARM + 1}")
    return rounds


def _runners(environments: Path, bare: bool) -> list[Runner]:
    alone = [_fedsim("fedsim, 1 rank", 1), _peer(BARE, 1, lambda: Path(sys.executable), "bare.py")]
    if bare:
        return alone
    pfl, flower = partial(python_of, "pfl", environments), partial(python_of, "flower", environments)
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return [
        *alone,
        _peer("pfl", 1, pfl, "with_pfl.py"),
        _fedsim("fedsim, 3 ranks", 3),
        _peer("pfl, 2 workers", 2, pfl, "with_pfl.py", several),
        _peer("Flower, 2 CPUs", 2, flower, "with_flower.py"),
    ]


def _fedsim(name: str, ranks: int) -> Runner:
    """Rank 0 of several serves, and has no core of its own."""

    def last(job: Job, work: Work) -> dict[str, Tensor]:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "run.h5"
            launch(job, ranks, [sys.executable, "-m", "fedsim", "run", "JOB", "--out", str(out)], Path(folder))
            return {key.removeprefix("w/").removeprefix("buf/"): value for key, value in RunReader(out).model().items()}

    return Runner(name, max(1, ranks - 1), lambda job, _: _middle(job, rounds(job, ranks)), last)


def _peer(name: str, cores: int, python: Callable[[], Path], script: str, launcher: tuple[str, ...] = ()) -> Runner:
    def run(work: Work) -> Answer:
        found = _answer([str(python()), *launcher, str(HERE / script)], work)
        steps = work.cohort * work.epochs * ceil(work.labels.shape[1] / work.batch)
        if found.steps != steps:
            raise RuntimeError(f"{name} took {found.steps} local steps in its first round; the work has {steps}")
        return found

    return Runner(name, cores, lambda job, work: _middle(job, run(work).seconds[WARM:]), lambda _, work: run(work).last)


def _middle(job: Job, seconds: list[float]) -> float:
    """The median round, or the mean one where rounds are unlike each other."""
    return median(seconds) if job.method.name == DENSE else fmean(seconds)


def _answer(command: list[str], work: Work) -> Answer:
    with TemporaryDirectory() as folder:
        given, answer = Path(folder) / "work.npz", Path(folder) / "answer.npz"
        write(work, given)
        done = subprocess.run(
            [*command, str(given), str(answer)], env=os.environ | LIKE_FEDSIM | QUIET, capture_output=True, text=True, check=False
        )
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        with np.load(answer) as found:
            if found["torch"] != torch.__version__:
                raise RuntimeError(f"{command[0]} has torch {found['torch']}, fedsim {torch.__version__}")
            last = {name.removeprefix("last/"): torch.from_numpy(found[name]) for name in found.files if name.startswith("last/")}
            return Answer(found["seconds"].tolist(), found["steps"].item(), last)


def _work(job: Job) -> Work:
    """The job's own images, normalised, and first weights."""
    parts = build_experiment(job)
    population, train = parts.population, parts.setting.train
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (population.train.mean, population.train.std))
    index = [torch.from_numpy(population.shards["train"].of(client)) for client in range(population.clients)]
    images = torch.stack([(population.train.images(own).float() / 255 - mean) / std for own in index])
    labels = torch.stack([population.train.labels(own) for own in index])
    module = models.build(job.model, population.train.shape, population.train.classes, job.seed).train()
    numbers = parts.setting.cohort, job.rounds, train.epochs, train.batch, train.lr
    return Work(images, labels, dict(module.state_dict()), _network(module), *numbers)


class _Tracer(fx.Tracer):
    """Layers of fedsim's own stay whole, as torch's do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fedsim.nn.layers") or super().is_leaf_module(m, module_qualified_name)


def _network(module: nn.Module) -> bytes:
    """The module as a traced one, so that whoever loads it needs no torchvision and none of fedsim's models."""
    graph, held = _Tracer().trace(module), io.BytesIO()
    graph._tracer_cls = None  # else it would be looked for where the module is loaded
    torch.save(fx.GraphModule(module, graph), held)
    return held.getvalue()


def _check(job: Job, runners: list[Runner], console: Console) -> None:
    """RuntimeError unless all end with the same weights where neither cohort nor order is left to chance."""
    clients, n = _work(job).labels.shape
    sections = {"cohort": {"size": clients}, "train": {"batch": n, "epochs": 2, "activation_keep": 1.0}}
    if job.method.name != DENSE:  # its dense twin, which is what the peers do
        job = job.model_copy(update={"method": Chosen(DENSE, find(DENSE)())})
    job = job.model_copy(update={name: getattr(job, name).model_copy(update=values) for name, values in sections.items()} | {"rounds": 2})
    work = _work(job)
    wanted, *others = [(runner.name, runner.last(job, work)) for runner in runners]
    way = _apart(wanted[1], work.first)
    most = way * (SAME_NORMED if any(name.endswith(STATISTICS) for name in work.first) else SAME)
    for name, last in others:
        apart = _apart(last, wanted[1])
        console.print(f"{job.name}: {name} ends {apart:.1e} away from {wanted[0]}, after a way of {way:.1e}", soft_wrap=True)
        if not apart < most:
            raise RuntimeError(f"{job.name}: {name} did other work than {wanted[0]}; the same ends at most {most:.1e} away")


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference; KeyError unless the names are the same.

    Without the statistics of batch norms, which no training step reads: pfl averages none and goes on with those of the last client.
    """
    one, other = ({name: value for name, value in held.items() if not name.endswith(STATISTICS)} for held in (one, other))
    if one.keys() != other.keys():
        raise KeyError(f"weights {sorted(one)} here, {sorted(other)} there")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _table(repeats: int) -> Table:
    title = f"seconds per round, median of {repeats} runs in turn, and over the bare loop's; torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for name in ("job", "cores", "who", "seconds", "ratio", "lowest", "highest"):
        table.add_column(name, justify="left" if name in ("job", "who") else "right")
    return table


def _measure(job: Job, runners: list[Runner], repeats: int, dense_rounds: int, table: Table) -> None:
    work = replace(_work(job), rounds=dense_rounds)
    runs = [{runner.name: runner.timed(job, work) for runner in runners} for _ in range(repeats)]
    for runner in runners:
        ratios = sorted(run[runner.name] / run[BARE] for run in runs)
        figures = (median(ratios), ratios[0], ratios[-1])
        middle = median(run[runner.name] for run in runs)
        table.add_row(job.name, str(runner.cores), runner.name, f"{middle:.4f}", *(f"{figure:.3f}" for figure in figures))
    table.add_section()


if __name__ == "__main__":
    sys.exit(main())
