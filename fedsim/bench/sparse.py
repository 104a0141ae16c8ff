"""`fedsim bench sparse`: what truly sparse layers save, alone and in a whole training step, at masks of equal density.

A layer's forward pass and both gradients over torch's dense ones; a step of the engine, which chooses layer by layer what runs
sparse as a run's plan does, over the step of an ordinary torch module with torch.optim.SGD, and over the engine's own with masked
dense layers. Runs take turns in one process, on one thread; medians of the ratios of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fedsim import models
from fedsim.bench.compaction import Run
from fedsim.bench.timing import interleaved
from fedsim.config.job import Job, load
from fedsim.core import keys, rng
from fedsim.core.tree import Tree, clone, under
from fedsim.core.types import Batch
from fedsim.kernels.sparse.cost_model import Cost
from fedsim.kernels.sparse.layers import conv2d, linear
from fedsim.kernels.sparse.pattern import Geometry, Pattern
from fedsim.kernels.sparse.walk import walk_of
from fedsim.nn.optim import fresh
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning import layer_timing

DEFAULT = ("jobs/bench/sparse.toml",)
REPEATS = 7
DENSITIES = (0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
LAYERS = (0.1, 0.05, 0.02, 0.01)  # densities at which single layers are timed
OF_LAYER = {0.1: 1.3, 0.05: 2.5, 0.01: 10.0}  # least times faster than dense
OF_STEP = {0.1: 1.1, 0.05: 1.8, 0.01: 5.0}
MOST = 1.03  # of the masked dense step, at any density
LEGEND = """Layers: dense milliseconds, and dense over sparse seconds at each density.
Steps: sparse: layers that the plan would run so; milliseconds of an ordinary
dense torch module with torch.optim.SGD and of the engine; torch over engine,
median, lowest and highest; the engine over itself with masked dense layers;
rebuilding the index over a step."""


def main(jobs: list[Job], console: Console) -> int:
    """Prints three tables per job."""
    torch.set_num_threads(1)
    malloc.hold()
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        parts = build_experiment(job)
        batch = parts.setting.train.batch
        console.print(
            f"{job.model.name or job.model.factory}, batch {batch}, one thread, median of {REPEATS}; torch {torch.__version__}",
            highlight=False,
        )
        for table in (layers(parts), steps(parts)):
            console.print(table, "", sep="\n", highlight=False)
    console.print(LEGEND, highlight=False)
    return 0


def masked(parts: Experiment, density: float) -> Tree:
    """Masks of equal density in every maskable layer."""
    net = parts.setting.net
    draws = {layer: rng.key(0, "bench", i) for i, layer in enumerate(net.maskable)}
    kept = {layer: rng.uniform(key, net.sizes[layer]).view(net.shapes[layer]) < density for layer, key in draws.items()}
    return {keys.mask(layer): mask.to(parts.site.device) for layer, mask in kept.items()}


def images(parts: Experiment) -> Batch:
    """A batch of random images."""
    train, count = parts.population.train, parts.setting.train.batch
    x = rng.normal(rng.key(0, "bench", "x"), count * train.images(torch.zeros(1, dtype=torch.int64)).numel()).view(count, *train.shape)
    y = torch.arange(count) % train.classes
    zero, device = torch.zeros((), dtype=torch.int64), parts.site.device
    return Batch(x.float().to(device), y.to(device), None, zero, zero + 1, key=zero.to(device))


def columns(*names: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


# ---- single layers
def layers(parts: Experiment) -> Table:
    """A row for every layer that is unlike those before: how many times faster it is sparse, and how far its gradients are off."""
    table = columns("layer, at density", "ms", *map(str, LAYERS), "off by")
    known = set()
    for name, layer, x in layer_timing.seen(parts.setting.net, images(parts).x):
        alike = (tuple(layer.weight.shape), tuple(x.shape))
        if name in parts.setting.net.maskable and alike not in known:
            known.add(alike)
            table.add_row(*_layer(name, layer, x.detach(), parts.setting.net.geometries[name]))
    table.add_row("target", "", *(f"≥{OF_LAYER[density]:g}" if density in OF_LAYER else "" for density in LAYERS), "≤1e-05", style="dim")
    return table


def _layer(name: str, layer: layer_timing.Weighted, x: Tensor, geometry: Geometry) -> tuple[str, ...]:
    weight = layer.weight
    dense = Way(lambda x, w: layer_timing.output(layer, x, w), x, weight)
    patterns = {
        density: Pattern(rng.uniform(rng.key(0, name), weight.numel()).view(weight.shape) < density, geometry) for density in LAYERS
    }
    call = conv2d if x.dim() == 4 else linear
    inside = x.movedim(0, -1).contiguous().movedim(-1, 0)
    ways = {d: Way(partial(call, bias=None, pattern=p), inside, p.values(weight.detach())) for d, p in patterns.items()}
    seconds = interleaved({"dense": dense.run} | {str(d): way.run for d, way in ways.items()}, x.device, REPEATS)
    off = max(_off(layer, x, weight, ways[d], patterns[d]) for d in LAYERS)
    size = f"{name} {weight.shape[1]}→{weight.shape[0]}" + (f", {x.shape[2]}×{x.shape[3]}" if x.dim() == 4 else "")
    times = (median(a / b for a, b in zip(seconds["dense"], seconds[str(d)], strict=True)) for d in LAYERS)
    return size, f"{1000 * median(seconds['dense']):.1f}", *(f"{value:.1f}" for value in times), f"{off:.0e}"


class Way:
    """Forward and both gradients of a layer, one after the other."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor) -> None:
        self.call, self.leaves = call, [x.detach().requires_grad_(), values.detach().requires_grad_()]
        self.g = torch.ones_like(self.output())

    def output(self) -> Tensor:
        with torch.enable_grad():
            return self.call(*self.leaves)

    def run(self) -> Tensor:
        return torch.autograd.grad(self.output(), self.leaves, self.g)[1]


def _off(layer: layer_timing.Weighted, x: Tensor, weight: Tensor, way: Way, pattern: Pattern) -> float:
    """The largest difference of output and gradients from the masked dense layer's, over the largest value of each."""
    dense = Way(lambda x, w: layer_timing.output(layer, x, w), x, weight * pattern.mask)
    ours, theirs = way.output(), dense.output()
    g = rng.normal(rng.key(0, "g"), ours.numel()).view(ours.shape).to(ours.dtype)
    found, wanted = (torch.autograd.grad(out, leaves, g) for out, leaves in ((ours, way.leaves), (theirs, dense.leaves)))
    pairs = [(ours.detach(), theirs.detach()), (found[0], wanted[0]), (pattern.spread(found[1]), wanted[1] * pattern.mask)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# ---- whole steps
def steps(parts: Experiment) -> Table:
    """A row for every density."""
    net, batch = parts.setting.net, images(parts)
    costs = layer_timing.costs(net, batch.x)
    table = columns("density", "sparse", "torch", "engine", "times", "lowest", "highest", "target", f"masked, ≤{MOST}", "index")
    torchs = _by_torch(parts, batch)
    for density in DENSITIES:
        tree = net.initial | masked(parts, density)
        chosen = Engine(parts, tree, batch, costs)
        runs: dict[str, Run] = {
            "torch": torchs,
            "chosen": chosen.step,
            "masked": Engine(parts, tree, batch, {}).step,
            "index": chosen.rebuilt,
        }
        seconds = interleaved(runs, batch.x.device, REPEATS)
        faster, over = _ratios(seconds, "torch", "chosen"), _ratios(seconds, "chosen", "masked")[0]
        table.add_row(
            str(density),
            str(len(chosen.patterns)),
            *(f"{1000 * median(seconds[name]):.0f}" for name in ("torch", "chosen")),
            *(f"{value:.2f}" for value in faster),
            f"≥{OF_STEP[density]}" if density in OF_STEP else "",
            f"{over:.2f}",
            f"{median(seconds['index']) / median(seconds['chosen']):.2f}" if chosen.patterns else "",
        )
    return table


def _ratios(seconds: dict[str, list[float]], one: str, other: str) -> tuple[float, float, float]:
    found = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
    return median(found), found[0], found[-1]


class Engine:
    """A client's training step as the serial fleet takes it, under masks."""

    def __init__(self, parts: Experiment, tree: Tree, batch: Batch, costs: dict[str, Cost]) -> None:
        self.net, self.batch, self.train = parts.setting.net.to(batch.x.device), batch, parts.setting.train
        self.net.set_sparse_costs(costs)
        self.shared, self.patterns = under(tree, keys.MASKS), self.net.sparse(tree)
        w = self.net.effective(tree)
        self.state = clone(w | under(tree, keys.BUFFERS) | fresh(w, self.train.momentum))

    def step(self) -> Tensor:
        loss, gradient, buffers, _ = self.net.gradient(self.shared | self.state, self.batch)
        self.state = self.net.descend(self.state | buffers, gradient, self.train.lr, self.train.momentum, self.train.decay)
        return loss

    def rebuilt(self) -> Tensor:
        """Every index anew, as after masks have changed."""
        for old in self.patterns.values():
            new = Pattern(old.mask, old.geometry)
            for size in old.walks:
                walk_of(new, (new.inputs, *size))
        return self.batch.y


def _by_torch(parts: Experiment, batch: Batch) -> Run:
    data, train = parts.population.train, parts.setting.train
    module = models.build(parts.job.model, data.shape, data.classes, parts.job.seed).train()
    optimiser = torch.optim.SGD(module.parameters(), train.lr, train.momentum, weight_decay=train.decay)

    def run() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(module(batch.x), batch.y)
        loss.backward()
        optimiser.step()
        return loss

    return run
