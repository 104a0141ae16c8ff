"""Choosing the execution plan of a run: once, never from the number of ranks. The run file holds it, and a resumed run goes on under it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.config.job import resolved
from fedsim.core import keys, masks, rng
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree, under
from fedsim.errors import BadInput, ClientFault, naming_path
from fedsim.federated import verbs
from fedsim.federated.client_work import Train
from fedsim.fleet.cuda_graph import fleet
from fedsim.fleet.local_fleet import Engine
from fedsim.fleet.messages import Pack, WorkOrder
from fedsim.fleet.packing import cut_cohort, images
from fedsim.fleet.plan import STACKED, Plan
from fedsim.fleet.registry import FLEETS
from fedsim.fleet.serial import SerialFleet
from fedsim.kernels.sparse.cost_model import CostRow, always_sparse, to_rows
from fedsim.kernels.sparse.layers import missing
from fedsim.nn.net import Net
from fedsim.simulation.checking import start
from fedsim.simulation.experiment import Experiment
from fedsim.simulation.planning import cache, layer_timing
from fedsim.simulation.planning.timing import least_seconds

PACKS = (4, 8, 16)  # packs that are tried
TRIALS = 3  # timed runs of a candidate, after one that warms up


def resolve(parts: Experiment, tell: Callable[[str], None] = lambda line: None, state: Any = None) -> Plan:
    """The plan that the job's [execution] asks for; `auto` measures once per machine, torch and job, and remembers.

    state: the method's first, made where it is not given.
    """
    execution = parts.job.execution
    if execution.plan.endswith(".h5"):
        return _fit(parts, _taken(Path(execution.plan)))
    candidates = _that_work(parts, list(_candidates(parts)), tell)
    load = Load.of(parts, state) if execution.plan == "auto" else None
    if load is None or (len(candidates) == 1 and not load.may_be_sparse(parts)):
        return candidates[0]
    kept = _place(parts)
    if (remembered := _remembered(kept)) and not _unfit(parts, remembered):
        return remembered
    tell(f"measuring {len(candidates)} execution plans, once for this job on this machine")
    plan = fastest(parts, candidates, load)
    if load.may_be_sparse(parts) and not start.not_sparse(parts.job.model, parts.setting.net.original, parts.population.train):
        rows = to_rows(layer_timing.costs(parts.setting.net, load.batch(parts)))
        plain = [candidate for candidate in candidates if candidate.fleet == "serial" and not candidate.channels_last]
        plan = fastest(parts, [plan, *(replace(candidate, sparse=rows) for candidate in plain)], load)
    cache.remember(kept, plan.text())
    return plan


def _remembered(kept: Path) -> Plan | None:
    """The plan in the cache; None where there is none that can be read."""
    try:
        return Plan.of(text) if (text := cache.known(kept)) else None
    except BadInput:
        return None


def _unfit(parts: Experiment, plan: Plan) -> str:
    """Why a user's own model cannot be computed under the plan; empty where it can."""
    own = parts.job.model, parts.setting.net.original, parts.population.train
    if plan.fleet in STACKED and (fault := start.not_stacked(*own)):
        return fault
    return start.not_sparse(*own) if plan.sparse else ""


def _fit(parts: Experiment, plan: Plan) -> Plan:
    if fault := _unfit(parts, plan):
        way, given = 'kernels = "sparse"' if plan.sparse else f'fleet = "{plan.fleet}"', parts.job.execution.plan
        described = f'plan = "{given}", which has {way}' if given.endswith(".h5") else way
        raise BadInput(f"[execution] {described}: {start.title(parts.job.model)} cannot be computed so: {fault}; leave it out")
    return plan


def _that_work(parts: Experiment, candidates: list[Plan], tell: Callable[[str], None]) -> list[Plan]:
    """The candidates under which the model can be computed; BadInput where none is left."""
    faults = {kind: _unfit(parts, plan) for kind, plan in {plan.fleet: plan for plan in candidates}.items()}
    left = [plan for plan in candidates if not faults[plan.fleet]]
    if not left:
        _fit(parts, candidates[0])
    if len(left) < len(candidates):
        fault = next(filter(None, faults.values()))
        tell(f"note: clients are trained one after the other, since this model cannot be stacked: {fault}")
    return left


def unlike(plan: Plan, parts: Experiment) -> str:
    """In what the plan differs from what the job asks for and this machine has; empty where it does not."""
    execution, device = parts.job.execution, parts.site.device.partition(":")[0]
    layout = "channels_last" if plan.channels_last else "contiguous"
    asked: dict[str, tuple[object, object]] = {
        "fleet": (execution.fleet, plan.fleet),
        "packs": (execution.packs, plan.packs),
        "memory_format": (execution.memory_format, layout),
        "device": (device, plan.device),
        "kernels": (execution.kernels, "sparse" if plan.sparse else "dense"),
        "dtype": (execution.dtype, plan.dtype),
        "packed_conv": (execution.packed_conv, plan.packed_conv),
        "torch": (str(torch.__version__), plan.torch),
    }
    return ", ".join(f"{name} {wanted} (plan: {mine})" for name, (wanted, mine) in asked.items() if wanted not in (None, mine))


def _candidates(parts: Experiment) -> Iterator[Plan]:
    """Every plan that [execution] leaves open; the reference comes first."""
    execution, setting = parts.job.execution, parts.setting
    device, most = parts.site.device.partition(":")[0], setting.cohort
    reference = Plan(device=device, dtype=execution.dtype, packs=execution.packs or max(PACKS))
    if execution.kernels == "sparse":
        yield replace(reference, sparse=_always_sparse(parts))
        return
    free = execution.plan == "auto"
    several = ["serial", "packed", "cuda_graph"] if device == "cuda" else ["serial", "packed"]
    fleets = [execution.fleet] if execution.fleet else (several if free else ["serial"])
    layouts = [execution.memory_format] if execution.memory_format else (["contiguous", "channels_last"] if free else ["contiguous"])
    for kind in fleets:
        for layout in layouts if kind == "serial" or execution.memory_format else ["contiguous"]:
            for packs in _pack_counts(kind, execution.packs, most, free):
                plan = replace(reference, fleet=kind, channels_last=layout == "channels_last", packs=packs)
                yield from (
                    replace(plan, packed_conv=how)
                    for how in _stackings(kind, execution.packed_conv, device, free and not parts.job.train.keep())
                )


def _always_sparse(parts: Experiment) -> tuple[CostRow, ...]:
    """BadInput where the kernels do not reach."""
    execution, site = parts.job.execution, parts.site
    needs = {"fleet": "serial", "memory_format": "contiguous", "dtype": "float32"}
    for name, needed in needs.items():
        if (given := getattr(execution, name)) not in (None, needed):
            raise BadInput(f'[execution] kernels = "sparse" needs {name} = "{needed}"; the job says "{given}"')
    if fault := missing(site.device):
        raise BadInput(f'[execution] kernels = "sparse": there are none on {site.device} ({fault})')
    return to_rows(always_sparse(parts.setting.net.geometries))


def _stackings(fleet: str, chosen: str | None, device: str, free: bool) -> list[str]:
    """How packs convolve: on the CPU grouped convolutions are no slower."""
    if fleet not in STACKED:
        return ["grouped"]
    return [chosen] if chosen else ["grouped", "matmul"] if free and device == "cuda" else ["grouped"]


def _pack_counts(fleet: str, chosen: int | None, cohort: int, free: bool) -> list[int]:
    """One by one, the packs are only the portions of ranks; stacked, their size is what matters."""
    if chosen:
        return [chosen]
    if fleet == "serial":
        return [max(PACKS)]
    if fleet == "cuda_graph" and free:
        sizes = [max(PACKS) // 4 << power for power in range(13)]  # clients
        return sorted({-(-cohort // size) for size in sizes}, reverse=True)
    return [packs for packs in PACKS if packs <= max(cohort // 2, PACKS[0])] if free else [PACKS[0]]


@dataclass(frozen=True)
class Load:
    """What clients train while plans are compared: the model that the method begins with, under its gates and masks."""

    clients: list[int]
    shared: Tree
    own: Tree  # (clients, …)
    net: Net

    @classmethod
    def of(cls, parts: Experiment, state: Any) -> Load:
        """A method that has a density and no mask yet is taken to prune all layers alike."""
        setting, method = parts.setting, parts.method
        clients = [client for client in range(min(setting.clients, 4096)) if parts.population.size(client)][: setting.cohort]
        state = verbs.init(method, setting, parts.population.public()) if state is None else state
        fleet = SerialFleet(parts.site, parts.account(), 1, time.perf_counter)
        shared, own, net = verbs.deploy(method, setting, state, fleet, clients)
        density = method.density
        if isinstance(density, float) and density < 1 and not under(shared, keys.MASKS) and net is None:
            shared = shared | _uniform(setting.net, density)
        shared = setting.aggregate.shared(setting.aggregate.init_memory(setting.net.trained(shared)), shared)
        return cls(clients, shared, {key: value for key, value in own.items() if key == GATE}, net or setting.net)

    def may_be_sparse(self, parts: Experiment) -> bool:
        execution = parts.job.execution
        dense = execution.kernels or execution.dtype != "float32" or execution.memory_format == "channels_last"
        masked = execution.fleet in (None, "serial") and bool(under(self.shared, keys.MASKS))
        return masked and not dense and not missing(parts.site.device)

    def batch(self, parts: Experiment) -> Tensor:
        train = parts.population.train
        return torch.full((parts.setting.train.batch, *train.shape), 0.5, device=parts.site.device)


def _uniform(net: Net, density: float) -> Tree:
    """Random masks that leave every maskable layer the same share of its weights, the whole network `density`."""
    share = masks.budget(net.sizes, density) / sum(net.sizes[layer] for layer in net.maskable)
    draws = {layer: rng.key(0, "plan", i) for i, layer in enumerate(net.maskable)}
    kept = {layer: rng.uniform(key, net.sizes[layer]).view(net.shapes[layer]) < share for layer, key in draws.items()}
    return {keys.mask(layer): mask.to(net.initial[keys.weight(layer)].device) for layer, mask in kept.items()}


def fastest(parts: Experiment, candidates: Iterable[Plan], load: Load) -> Plan:
    """The plan with the least seconds per client. Packs of one program grow until that pays no more or memory is out."""
    found: dict[Plan, float] = {}
    last: dict[str, float] = {}
    ended: set[str] = set()
    for plan in candidates:
        if plan.fleet == "cuda_graph" and plan.packed_conv in ended:
            continue
        found[plan] = _if_it_fits(parts, plan, load)
        if plan.fleet == "cuda_graph":
            ended |= {plan.packed_conv} if found[plan] >= last.get(plan.packed_conv, inf) else set()
            last[plan.packed_conv] = found[plan]
    return min(found, key=lambda plan: found[plan])


def _if_it_fits(parts: Experiment, plan: Plan, load: Load) -> float:
    """Seconds per client; infinite where the memory does not suffice."""
    try:
        return seconds(parts, plan, load)
    except ClientFault as fault:
        if not isinstance(fault.__cause__, torch.OutOfMemoryError):
            raise
        return inf
    finally:
        fleet.forget()


def seconds(parts: Experiment, plan: Plan, load: Load) -> float:
    """Seconds per client of the job's own local training under a plan: the best of some runs of one pack."""
    site = plan.apply(parts.site)
    pack = max(cut_cohort(load.clients, plan.packs), key=len)
    pack = pack if plan.fleet in STACKED else pack[:2]
    nothing = [0] * len(pack)
    own = {key: value[: len(pack)] for key, value in load.own.items()}
    order = WorkOrder(_short(Train.at(parts.setting, 1)), load.net, load.shared, 1, sum(images(site, client) for client in pack))
    engine: Engine = FLEETS[plan.fleet].carry_out
    work = partial(engine, order, Pack(pack, own, [None for _ in pack], [nothing, nothing]), site)
    with torch.no_grad():
        return least_seconds(work, site.device, TRIALS) / len(pack)


def _short(work: Train) -> Train:
    """At most a few steps of the work, which are like all the others."""
    return replace(work, feeds=tuple(replace(feed, epochs=0, steps=(feed.steps and min(feed.steps, 5)) or 5) for feed in work.feeds))


def _taken(path: Path) -> Plan:
    from fedsim.storage.reader import RunReader

    with naming_path(f'[execution] plan = "{path}"'):
        there = path.exists()
    if not there:
        raise BadInput(f'[execution] plan = "{path}": no such run file')
    return Plan.of(RunReader(path).attributes["plan"])


def _place(parts: Experiment) -> Path:
    """Where the plan is kept: by the machine, torch, and the job but for its seed."""
    execution = parts.job.execution
    machine = [platform.node(), platform.machine(), os.cpu_count(), torch.__version__, parts.site.device, torch.get_num_threads()]
    left: list[object] = [execution.fleet, execution.packs, execution.memory_format, execution.kernels]
    left += [execution.dtype, execution.packed_conv, execution.gpu_memory_fraction]
    return cache.place("plans", machine, left, resolved(parts.job, ("execution", "seed", "name")))
