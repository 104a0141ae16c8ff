"""`fedsim bench extrusion`: the loss right after the marked weights are pruned, with and without extrusion.

A run is followed to each of its adjusting rounds. There the same clients train on the same batches from the same model once for each
penalty, and the average is judged on the global test set as it is, and again with the marked weights pruned and nothing grown. So what
differs is the penalty alone. Everything is paired by round and seed; the run itself goes on with the job's own penalty.

norm: of the marked weights after the round over before it; before, after: the loss as it is, and with them pruned; damage: the
difference; less: how much of the damage without extrusion there is no more.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from scipy.stats import t as student
from torch import Tensor

from fedsim.bench.sparse import columns
from fedsim.config.job import Job, check, load, resolved
from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.pretraining import images
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import make_fleet
from fedsim.methods.fedmef import FedMef
from fedsim.nn.loss import cross_entropy
from fedsim.pruning.extrusion import marked, norm_of
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning.plan import resolve

DEFAULT = ("jobs/fedmef_digits.toml", "jobs/bench/extrusion_shapes.toml")
SEEDS = 5
PENALTIES = (0.0, 1e-4, 1e-2, 1e-1, 1.0)
BATCH = 256  # test images at once
Seen = dict[float, tuple[float, float, float]]  # penalty -> shrinking of the marked weights, loss before and after pruning them


def main(jobs: list[Job], console: Console) -> int:
    """Prints a table per job."""
    torch.set_num_threads(1)
    malloc.hold()
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        if not isinstance(job.method.use, FedMef):
            raise BadInput(f'{job.name}: fedsim bench extrusion needs [method] name = "fedmef"; it is {job.method.name!r}')
        found = {seed: list(_followed(job, seed, console)) for seed in range(SEEDS)}
        rounds = sum(len(seen) for seen in found.values())
        title = f"{job.name}: {rounds} adjusting rounds of {SEEDS} seeds; ± the 95 % interval over seeds"
        table = columns("penalty", "norm", "before", "after", "damage", "less, %")
        for penalty in PENALTIES:
            table.add_row(*_row(penalty, found))
        console.print(title, table, highlight=False, soft_wrap=True)
    return 0


def _row(penalty: float, found: Mapping[int, list[Seen]]) -> tuple[str, ...]:
    """Means over rounds, then over seeds."""
    each = {seed: [seen[penalty] for seen in rounds] for seed, rounds in found.items()}
    shrunk, before, after = (fmean(fmean(row[i] for row in rows) for rows in each.values()) for i in range(3))
    damage = [fmean(row[2] - row[1] for row in rows) for rows in each.values()]
    plain = [fmean(seen[0.0][2] - seen[0.0][1] for seen in rounds) for rounds in found.values()]
    less = [100 * (1 - mine / other) for mine, other in zip(damage, plain, strict=True)]
    figures = (f"{shrunk:.4f}", f"{before:.4f}", f"{after:.4f}", f"{fmean(damage):+.4f}")
    return f"{penalty:g}", *figures, "" if not penalty else f"{fmean(less):.1f} ± {_interval(less):.1f}"


def _interval(values: list[float]) -> float:
    mean = fmean(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return float(student.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5)


def _followed(job: Job, seed: int, console: Console) -> Iterator[Seen]:
    """What every adjusting round of a run would have become under each penalty."""
    parts = build_experiment(check(tomllib.loads(resolved(job)) | {"seed": seed}))
    plan = resolve(parts, console.print)
    method, setting, fleet = parts.method, parts.setting, _fleet(parts, plan)
    state = method.init(setting, parts.population.public())
    for r in range(setting.rounds + 1):
        fleet.open(r)
        extrusion = method.extrusion(setting.net, state.shared, r) if r else None
        if extrusion is not None and extrusion.moves:
            yield {penalty: _tried(parts, replace(method, penalty=penalty), state, fleet, r) for penalty in PENALTIES}
            fleet.open(r)
        state, _ = method.round(setting, state, fleet, r)


def _tried(parts: Experiment, method: FedMef, state: AveragedState, fleet: LocalFleet, r: int) -> tuple[float, float, float]:
    fleet.open(r)
    extrusion = method.extrusion(parts.setting.net, state.shared, r)
    after, _ = trained(parts.setting, fleet, state, r, method.training(parts.setting, r, extrusion))
    marks = marked(state.shared, extrusion.moves)
    low = [norm_of(shared, marks) for shared in (state.shared, after.shared)]
    pruned = after.shared | {
        keys.mask(name): _without(after.shared[keys.mask(name)], index)
        for key, index in marks.items()
        if (name := key.removeprefix(keys.MARKED))
    }
    return float(low[1] / low[0]), loss(parts, after.shared), loss(parts, pruned)


def _without(mask: Tensor, index: Tensor) -> Tensor:
    return mask.flatten().index_fill(0, index, False).view(mask.shape)


def loss(parts: Experiment, shared: Tree) -> float:
    """Mean cross-entropy on the global test set."""
    x, y = images(parts.setting, parts.population.test)
    with torch.no_grad():
        pieces = zip(x.split(BATCH), y.split(BATCH), strict=True)
        sums = [float(cross_entropy(parts.setting.net(shared, a)[0], b, None)) * len(b) for a, b in pieces]
    return sum(sums) / len(y)


def _fleet(parts: Experiment, plan: Plan) -> LocalFleet:
    return make_fleet(plan, parts.site, parts.account(), time.perf_counter)
