"""`fedsim bench activations`: forward and backward of every layer with its input pruned, over the plain layer; and of whole steps.

Layer by layer on one thread, in turn with the plain layer: the same convolution, result and input gradient to the bit. A layer that
reads what another has read before ("again") shares its cache and only restores it. n: so many layers of the network are like it. Inputs
are what the model's own ReLUs give for random images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fedsim.bench.sparse import columns, images
from fedsim.bench.timing import interleaved
from fedsim.config.job import Job, load
from fedsim.errors import BadInput
from fedsim.kernels.activation_pruning.layers import Layer, form_of, operation, pruned
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning import layer_timing

DEFAULT = ("jobs/bench/activations.toml",)
REPEATS = 7
MOST = 1.3  # times the plain layer


def main(jobs: list[Job], console: Console) -> int:
    """Prints a table per job."""
    torch.set_num_threads(1)
    malloc.hold()
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        if job.train.keep() is None:
            raise BadInput(f"{job.name}: fedsim bench activations needs train.activation_keep below 1, for example 0.3")
        parts = build_experiment(job)
        table = columns("layer, ms", "n", "plain", "pruned", "ratio", "from", "to")
        for row in [*layers(parts), step(parts)]:
            table.add_row(*row)
        console.print(_title(parts), table, highlight=False, soft_wrap=True)
    return 0


def _title(parts: Experiment) -> str:
    job = parts.job
    how = f"batch {job.train.batch}, keep {job.train.activation_keep}, {parts.site.device}"
    return f"{job.name}: {job.model.name}, {how}; target at most {MOST}; torch {torch.__version__}"


def layers(parts: Experiment) -> list[tuple[str, ...]]:
    """A row for every layer but the first that is unlike those before it, and their sum over the network."""
    net, readers = parts.setting.net, set[int]()
    times: Counter[Any] = Counter()
    first: dict[Any, tuple[str, layer_timing.Weighted, Tensor, bool]] = {}
    for name, layer, x in layer_timing.seen(net, images(parts).x)[1:]:
        again = x.data_ptr() in readers
        readers.add(x.data_ptr())
        alike = (tuple(layer.weight.shape), tuple(x.shape), again)
        times[alike] += 1
        first.setdefault(alike, (name, layer, x.detach(), again))
    rows, sums = [], [0.0, 0.0]
    for alike, (name, layer, x, again) in first.items():
        both = _both(parts, layer, x, again)
        sums = [total + times[alike] * median(seconds) for total, seconds in zip(sums, both, strict=True)]
        size = f"{name} {layer.weight.shape[1]}→{layer.weight.shape[0]}{', again' if again else ''}"
        rows.append((size, str(times[alike]), *_figures(*both)))
    return [*rows, ("all layers", "", *(f"{1000 * total:.1f}" for total in sums), f"{sums[1] / sums[0]:.2f}", "", "")]


def _both(parts: Experiment, layer: layer_timing.Weighted, x: Tensor, again: bool) -> tuple[list[float], list[float]]:
    """Seconds of the plain layer and of the pruned one, in turn."""
    keep = parts.job.train.keep()
    assert keep is not None
    leaves = [x.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()]
    way, form = Layer(operation(layer), form=form_of(x, False)), form_of(x, False)
    held = pruned(leaves[0], None, keep, form)
    g = torch.randn_like(layer_timing.output(layer, *leaves))

    def plain() -> Tensor:
        return torch.autograd.grad(layer_timing.output(layer, *leaves), leaves, g)[0]

    def ours() -> Tensor:
        cache = held if again else pruned(leaves[0], None, keep, form)
        with torch.enable_grad():
            return torch.autograd.grad(way(leaves[0], cache, leaves[1], None), leaves, g)[0]

    seconds = interleaved({"plain": plain, "ours": ours}, x.device, REPEATS)
    return seconds["plain"], seconds["ours"]


def step(parts: Experiment) -> tuple[str, ...]:
    """A whole step's loss and gradients, ReLUs and pools that keep little included."""
    net, batch, keep = parts.setting.net, images(parts), parts.job.train.keep()

    def gradient(pruning: bool) -> Tensor:
        net.set_activation_pruning(keep if pruning else None)
        return net.gradient(net.initial, batch)[0]

    ways: dict[str, Callable[[], Tensor]] = {"plain": partial(gradient, False), "ours": partial(gradient, True)}
    seconds = interleaved(ways, batch.x.device, REPEATS)
    return f"a step of {parts.job.model.name} ({parts.job.model.norm})", "", *_figures(seconds["plain"], seconds["ours"])


def _figures(plain: list[float], ours: list[float]) -> tuple[str, ...]:
    ratios = sorted(b / a for a, b in zip(plain, ours, strict=True))
    shown = (1000 * median(plain), 1000 * median(ours))
    return *(f"{value:.1f}" for value in shown), *(f"{value:.2f}" for value in (median(ratios), ratios[0], ratios[-1]))
