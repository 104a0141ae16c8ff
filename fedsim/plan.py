"""The execution plan: how a run is computed, resolved once, never from the number of ranks, and kept in the run file (DESIGN promise 8)."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from fedsim.assemble import Parts
from fedsim.fault import BadInput
from fedsim.fleet.local import Engine
from fedsim.fleet.order import Order, Pack, cut, images
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.serial import SerialFleet
from fedsim.job import resolved
from fedsim.works import Train

FLEETS = {"serial": SerialFleet, "packed": PackedFleet}
PACKS = (4, 8, 16)  # packs that are tried
TRIALS = 3  # timed runs of a candidate, after one that warms up


@dataclass(frozen=True)
class Plan:
    """How clients are carried out."""

    fleet: str = "serial"  # serial | packed
    packs: int = 16  # that a cohort is cut into
    channels_last: bool = False
    device: str = "cpu"  # kind
    dtype: str = "float32"
    torch: str = str(torch.__version__)

    def unlike(self, parts: Parts) -> str:
        """In what the plan differs from what the job asks for and this machine has; empty where it does not."""
        execution, device = parts.job.execution, parts.site.device.partition(":")[0]
        layout = "channels_last" if self.channels_last else "contiguous"
        asked: dict[str, tuple[object, object]] = {
            "fleet": (execution.fleet, self.fleet),
            "pack": (execution.pack, self.packs),
            "layout": (execution.layout, layout),
            "device": (device, self.device),
            "torch": (str(torch.__version__), self.torch),
        }
        return ", ".join(f"{name} {wanted} (plan: {mine})" for name, (wanted, mine) in asked.items() if wanted not in (None, mine))

    def pack(self, cohort: int) -> int:
        """Clients that are trained at once."""
        return -(-cohort // self.packs) if self.fleet == "packed" else 1

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str) -> Plan:
        return cls(**json.loads(text))


def resolve(parts: Parts, tell: Callable[[str], None] = lambda line: None) -> Plan:
    """The plan that the job's [execution] asks for; `auto` measures once per machine, torch and job, and remembers."""
    execution = parts.job.execution
    if execution.plan.endswith(".h5"):
        return _taken(Path(execution.plan))
    candidates = list(_candidates(parts))
    if len(candidates) == 1:
        return candidates[0]
    cache = _cache() / f"{_mark(parts)}.json"
    if cache.exists():
        return Plan.of(cache.read_text())
    tell(f"measuring {len(candidates)} execution plans, once for this job on this machine")
    plan = min(candidates, key=lambda plan: seconds(parts, plan))
    _remember(cache, plan)
    return plan


def _candidates(parts: Parts) -> Iterator[Plan]:
    """Every plan that [execution] leaves open; the reference comes first."""
    execution, setting = parts.job.execution, parts.setting
    device, most = parts.site.device.partition(":")[0], setting.cohort
    reference = Plan(device=device, packs=execution.pack or max(PACKS))
    free = execution.plan == "auto"
    fleets = [execution.fleet] if execution.fleet else (["serial", "packed"] if free else ["serial"])
    layouts = [execution.layout] if execution.layout else (["contiguous", "channels_last"] if free else ["contiguous"])
    for fleet in fleets:
        for layout in layouts if fleet == "serial" or execution.layout else ["contiguous"]:
            for packs in _pack_counts(fleet, execution.pack, most, free):
                yield replace(reference, fleet=fleet, channels_last=layout == "channels_last", packs=packs)


def _pack_counts(fleet: str, chosen: int | None, cohort: int, free: bool) -> list[int]:
    """One by one, the packs are only the portions of ranks; stacked, their size is what matters."""
    if chosen:
        return [chosen]
    if fleet == "serial":
        return [max(PACKS)]
    return [packs for packs in PACKS if packs <= max(cohort // 2, PACKS[0])] if free else [PACKS[0]]


def seconds(parts: Parts, plan: Plan) -> float:
    """Seconds per client of the job's own local training under a plan: the best of some runs of one pack."""
    site = replace(parts.site, channels_last=plan.channels_last)
    clients = [client for client in range(min(parts.setting.clients, 4096)) if parts.population.size(client)][: parts.setting.cohort]
    pack = max(cut(clients, plan.packs), key=len)
    pack = pack if plan.fleet == "packed" else pack[:2]
    nothing = [0] * len(pack)
    shared = parts.setting.net.initial
    order = Order(_short(Train.at(parts.setting, 1)), parts.setting.net, shared, 1, sum(images(site, client) for client in pack))
    engine: Engine = FLEETS[plan.fleet].carry_out
    times = []
    with torch.no_grad():
        for _ in range(TRIALS + 1):
            begin = time.perf_counter()
            engine(order, Pack(pack, {}, [None for _ in pack], [nothing, nothing]), site)
            if site.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return min(times[1:]) / len(pack)


def _short(work: Train) -> Train:
    """At most a few steps of the work, which are like all the others."""
    return replace(work, feeds=tuple(replace(feed, epochs=0, steps=(feed.steps and min(feed.steps, 5)) or 5) for feed in work.feeds))


def _taken(path: Path) -> Plan:
    from fedsim.record import Reader

    if not path.exists():
        raise BadInput(f'[execution] plan = "{path}": no such run file')
    return Plan.of(Reader(path).attributes["plan"])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedsim" / "plans"


def _mark(parts: Parts) -> str:
    """The machine, torch, and the job but for its seed."""
    execution = parts.job.execution
    machine = [platform.node(), platform.machine(), os.cpu_count(), torch.__version__, parts.site.device, torch.get_num_threads()]
    left = [execution.fleet, execution.pack, execution.layout]
    return sha256(json.dumps([machine, left, resolved(parts.job, ("execution", "seed", "name"))]).encode()).hexdigest()[:32]


def _remember(cache: Path, plan: Plan) -> None:
    """A cache that cannot be written costs a measurement next time, no more."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_suffix(f".{os.getpid()}")
        aside.write_text(plan.text())
        aside.replace(cache)
    except OSError:
        pass
