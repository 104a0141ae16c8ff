"""`fedsim bench compaction`: what half of the channels of every group cost by compaction, over a hand-built network of these widths.

Training: a client's step as the serial fleet takes it, with a hard gate in its tree, over the step of ordinary torch layers and
torch.optim. Inference: the exported sub-network over the same layers. Both also over the full network. All runs take turns in one
process, on one thread; medians of the ratios of neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import models
from fedsim.bench.timing import interleaved
from fedsim.config.job import Job, load
from fedsim.core import tree
from fedsim.core.keys import GATE
from fedsim.core.types import Batch
from fedsim.errors import BadInput
from fedsim.federated.protocol import ClientInput
from fedsim.nn.channel_groups import Group
from fedsim.nn.channels import Channels
from fedsim.nn.subnetwork import ordinary
from fedsim.pruning.gated_training import TrainGated
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment

DEFAULT = ("jobs/bench/compaction.toml", "jobs/bench/medium.toml")
REPEATS = 15
FRESH = 8  # gates that take turns where every step has another one
LIMIT = 1.05
OF_DENSE = {"resnet56": 0.70, "cnn": 0.40}  # most of the whole network's step, as torch takes it

Run = Callable[[], Tensor]
Line = tuple[str, str, str, float | None]  # what is measured; its run, that of what it is compared with, the ratio not to pass

TRAINING: tuple[Line, ...] = (
    ("step, cut / built", "half", "hand-built half", LIMIT),
    ("step, cut / full", "half", "full", None),
    ("step, built / full", "hand-built half", "hand-built full", None),
    ("step, fresh / cut", "fresh", "half", None),
)
INFERENCE: tuple[Line, ...] = (
    ("inference, cut / built", "exported", "hand-built half", LIMIT),
    ("inference, cut / full", "exported", "full", None),
)
LEGEND = """cut: a client's gated training step, compacted; fresh: the same under another
gate at every step; built: a hand-built torch network of the same widths; full:
the whole network. Milliseconds, and their ratio: median, lowest and highest."""


def main(jobs: list[Job], console: Console) -> int:
    """Prints a table per job."""
    torch.set_num_threads(1)
    malloc.hold()
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        case = Case.of(build_experiment(job))
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("", "batch", "ms", "over", "ratio", "lowest", "highest", "target"):
            table.add_column(name, justify="right" if name else "left")
        model = f"{job.model.name or job.model.factory}{', standardised' if job.model.standardise else ''}"
        for batch, lines, runs in _measurements(case):
            for row in _compared(lines, interleaved(runs, case.device, REPEATS)):
                table.add_row(row[0], str(batch), *row[1:])
        head = f"{model}, half of the channels, one thread, median of {REPEATS}; torch {torch.__version__}"
        console.print(head, table, "", sep="\n", highlight=False)
    console.print(LEGEND, highlight=False)
    return 0


def _measurements(case: Case) -> Iterator[tuple[int, Sequence[Line], dict[str, Run]]]:
    """Batch, what is compared, and the runs to time for it."""
    dense = OF_DENSE.get(case.parts.job.model.name)
    yield len(case.y), (*TRAINING, ("step, cut / full built", "half", "hand-built full", dense)), case.training()
    for batch in sorted({len(case.y), 1}, reverse=True):
        yield batch, INFERENCE, case.inference(batch)


def _compared(lines: Sequence[Line], seconds: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    for what, own, other, target in lines:
        ratios = sorted(a / b for a, b in zip(seconds[own], seconds[other], strict=True))
        times = (f"{1000 * median(seconds[name]):.2f}" for name in (own, other))
        figures = (f"{ratio:.3f}" for ratio in (median(ratios), ratios[0], ratios[-1]))
        yield what, *times, *figures, f"≤ {target}" if target else ""


@dataclass(frozen=True)
class Case:
    """One job's network, a gate that keeps a random half of every group, and a batch of its images."""

    parts: Experiment
    module: nn.Module
    gate: Tensor  # (n,)
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, parts: Experiment) -> Case:
        data, batch, device = parts.population.train, parts.setting.train.batch, parts.site.device
        module = models.build(parts.job.model, data.shape, data.classes, parts.job.seed)
        try:
            gate = half(parts.setting.net.channels, 0)
        except ValueError as error:
            raise BadInput(f"{parts.job.name}: {error}") from error
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
        index = torch.arange(batch)
        x = (data.images(index).float() / 255 - mean) / std
        return cls(parts, module.to(device), gate.to(device), x.to(device), data.labels(index).to(device))

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def channels(self) -> Channels:
        return self.parts.setting.net.channels

    def hand_built(self) -> nn.Module:
        """The half by ordinary torch layers, with the same weights."""
        net, kept = self.parts.setting.net, self.channels.kept(self.gate)
        small = hand_built(self.module, self.channels.groups, {name: len(index) for name, index in kept.items()}).to(self.device)
        values = net.compact(net.initial, kept, removed=False)
        small.load_state_dict({key.partition("/")[2]: value for key, value in values.items()}, strict=False)
        return small

    def training(self) -> dict[str, Run]:
        """A step a call, which gives its loss: the engine's at one gate, at another each time and at none; torch's, half and full."""
        gates = [half(self.channels, 1 + i).to(self.device) for i in range(FRESH)]
        return {
            "half": self._engine([self.gate]),
            "hand-built half": self._by_torch(self.hand_built()),
            "full": self._engine([None]),
            "hand-built full": self._by_torch(copy.deepcopy(self.module)),
            "fresh": self._engine(gates),
        }

    def _engine(self, gates: Sequence[Tensor | None]) -> Run:
        """What the serial fleet does for a client, the gate of every step the next one in turn."""
        net, work = self.parts.setting.net, TrainGated.at(self.parts.setting, 1)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        bare = ClientInput(net.initial, {}, {}, zero, zero, zero)
        each = cycle([replace(bare, own={} if gate is None else {GATE: gate}) for gate in gates])
        batch, state = Batch(self.x, self.y, None, zero, zero, key=zero), tree.clone(work.init_state(net, bare))

        @torch.no_grad()
        def run() -> Tensor:
            nonlocal state
            state, loss = work.step(net, next(each), state, batch)
            return loss

        return run

    def _by_torch(self, module: nn.Module) -> Run:
        rate = self.parts.setting.train.at(1)
        optimiser = torch.optim.SGD(module.train().parameters(), rate.lr, rate.momentum, weight_decay=rate.decay)

        def run() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(module(self.x), self.y)
            loss.backward()
            optimiser.step()
            return loss.detach()

        return run

    def inference(self, batch: int) -> dict[str, Run]:
        """A forward pass a call, of exported modules and the hand-built one."""
        net, kept, hand = self.parts.setting.net, self.channels.kept(self.gate), ordinary(self.hand_built())
        exported = net.cut(kept).plain(net.compact(net.initial, kept))
        hand.load_state_dict(exported.state_dict())
        runs = {"exported": exported, "hand-built half": hand, "full": net.plain(net.initial)}
        return {name: _passing(module.to(self.device).eval(), self.x[:batch]) for name, module in runs.items()}


def _passing(module: nn.Module, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return module(x)

    return run


def half(channels: Channels, seed: int) -> Tensor:
    """(n,) bool, a random half of the channels of every group."""
    source = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(size, generator=source) < -(-size // 2) for size in channels.widths])


def hand_built(module: nn.Module, groups: Sequence[Group], widths: dict[str, int]) -> nn.Module:
    """The network as its author would write it with `widths` channels in the groups: fresh layers, values of their own."""
    small = copy.deepcopy(module)
    outside = {row.rpartition(".")[0]: widths[group.name] for group in groups for row in group.rows}
    inside = {column.rpartition(".")[0]: (group.size, widths[group.name]) for group in groups for column in group.columns}
    for name, layer in module.named_modules():
        if name in outside or name in inside:
            parent, _, slot = name.rpartition(".")
            setattr(small.get_submodule(parent), slot, _layer(layer, outside.get(name), *inside.get(name, (1, 1))))
    return small


def _layer(layer: nn.Module, outside: int | None, before: int, after: int) -> nn.Module:
    """A new one of its kind, with `outside` channels (None: its own), and `after` input channels for every `before` of its own."""
    if isinstance(layer, nn.Conv2d):
        out, into = outside or layer.out_channels, layer.in_channels * after // before
        filters = out if layer.groups > 1 else 1  # depth-wise: one a channel
        kind: Any = type(layer)
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return kind(out if filters > 1 else into, out, *shape, filters, layer.bias is not None)
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features * after // before, outside or layer.out_features, layer.bias is not None)
    if isinstance(layer, nn.GroupNorm):
        return nn.GroupNorm(1, outside or layer.num_channels, layer.eps)
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(outside or layer.num_features, layer.eps, layer.momentum)
    raise BadInput(f"the hand-built network has no {type(layer).__name__}; it has Conv2d, Linear, GroupNorm and BatchNorm2d")
