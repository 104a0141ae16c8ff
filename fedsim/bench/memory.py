"""`fedsim bench memory`: what one training step holds, measured, for the plain network, FedTiny's and FedMef's.

Saved: the bytes that autograd keeps for the backward pass, by saved-tensor hooks, each storage once; those of weights' size stand
apart. Whole: the state (weights, masks) and by how much the allocator's level rises in a step, on a CPU by torch's profiler, on CUDA
by its own count. Resident: the state and by how much the process's resident memory rises in a step. Every line is measured in a
process of its own. BN: batch norm, which keeps two full tensors a layer. ledger: its figure over the measured one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsim.bench.mask_adjustment import rise
from fedsim.bench.sparse import columns, images, masked
from fedsim.config.job import Job, check, load, resolved
from fedsim.core import masks
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.costs import memory
from fedsim.errors import BadInput
from fedsim.nn.net import Net
from fedsim.simulation.experiment import build_experiment

DEFAULT = ("jobs/bench/activations.toml", "jobs/bench/activations_mobilenet.toml")
DENSITY = 0.1
MMAP_THRESHOLD = -3  # of glibc's mallopt(3)
SMALL = 1 << 16  # bytes; larger tensors go back to the system when they are freed


@dataclass(frozen=True)
class Way:
    """A line of the table."""

    name: str
    norm: str
    masked: bool
    pruned: bool


WAYS = (
    Way("plain, BN", "batch", False, False),
    Way("plain, nsconv", "nsconv", False, False),
    Way("FedTiny", "batch", True, False),
    Way("FedMef, not pruned", "nsconv", True, False),
    Way("BN, pruned", "batch", True, True),
    Way("FedMef", "nsconv", True, True),
)


@dataclass(frozen=True)
class Held:
    """Bytes."""

    activations: int  # saved for the backward pass
    weights: int  # of them tensors of weights' size, not in `activations`
    counted: int  # activations by the ledger
    whole: int  # the state, and the allocator's rise in a step
    executed: int  # the same by the ledger
    resident: int  # the state, and the rise of resident memory


def main(jobs: list[Job], console: Console) -> int:
    """Prints a table per job."""
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        keep = job.train.keep()
        if keep is None:
            raise BadInput(f"{job.name}: fedsim bench memory needs train.activation_keep below 1, for example 0.3")
        console.print(
            f"{job.model.name}, batch {job.train.batch}, keep {keep.share}, density {DENSITY} where masked; MB; torch {torch.__version__}",
            highlight=False,
        )
        found = {way.name: measured(job, way) for way in WAYS}
        plain, normalised, tiny = (found[name] for name in ("plain, BN", "plain, nsconv", "FedTiny"))
        kept = columns("saved", "MB", "ledger", "of BN's", "of nsconv's", "of weights")
        whole = columns("whole", "MB", "ledger", "of FedTiny's", "resident", "of FedTiny's")
        for name, held in found.items():
            mine = (held.activations, held.counted / held.activations, held.activations / plain.activations)
            kept.add_row(name, *_figures(*mine, held.activations / normalised.activations, held.weights))
            rest = (held.whole, held.executed / held.whole, held.whole / tiny.whole, held.resident, held.resident / tiny.resident)
            whole.add_row(name, *_figures(*rest))
        console.print(kept, whole)
    return 0


def _figures(*values: float) -> Iterator[str]:
    """Bytes as MB, and ratios."""
    return (f"{value / 1e6:.2f}" if isinstance(value, int) else f"{value:.3f}" for value in values)


def measured(job: Job, way: Way) -> Held:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (resolved(job), way))


def _measured(text: str, way: Way) -> Held:
    torch.set_num_threads(1)
    os.environ["KINETO_LOG_LEVEL"] = "99"
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, SMALL)
    table = tomllib.loads(text)
    table["model"]["norm"] = way.norm
    table["train"]["activation_keep"] = table["train"]["activation_keep"] if way.pruned else 1.0
    parts = build_experiment(check(table))
    net, batch = parts.setting.net, images(parts)
    held = masked(parts, DENSITY) if way.masked else {}
    tree = masks.apply(net.initial, held) | held

    def step() -> None:
        _, gradient, _, _ = net.gradient(tree, batch)
        net.descend(tree, gradient, 0.0)

    step()
    state = sum(value.numel() * value.element_size() for value in tree.values())
    activations, weights = saved(net, tree, batch)
    executed = memory.executed_memory(
        parts.model_profile, len(batch.y), {key.removesuffix(".weight"): n for key, n in masks.ones(held).items()}
    ).total
    whole = state + (rise(step) if batch.x.device.type == "cpu" else _risen(step))
    return Held(activations, weights, memory.saved(parts.model_profile, len(batch.y)).total, whole, executed, state + _resident(step))


def saved(net: Net, tree: Tree, batch: Batch) -> tuple[int, int]:
    """Bytes that a step saves: of activations, and of tensors of weights' size; what the tree itself holds is in neither."""
    held: list[Any] = []  # so that a storage's address stays its own
    found: dict[int, tuple[int, bool]] = {}
    own = {value.untyped_storage()._cdata for value in tree.values()}
    shapes = {shape for key in net.weights if len(shape := tuple(net.initial[key].shape)) > 1}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
    shapes |= {(kept,) for kept in masks.ones(tree).values()}  # kept values alone

    def pack(value: torch.Tensor) -> torch.Tensor:
        held.append(value)
        storage = value.untyped_storage()
        if storage._cdata not in own:
            found.setdefault(storage._cdata, (storage.nbytes(), tuple(value.shape) in shapes))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        net.gradient(tree, batch)
    return sum(size for size, weight in found.values() if not weight), sum(size for size, weight in found.values() if weight)


def _risen(step: Callable[[], None]) -> int:
    """The rise of CUDA's allocator in a step."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _resident(step: Callable[[], None]) -> int:
    """The rise of this process's resident memory in a step, as Linux tells it."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
