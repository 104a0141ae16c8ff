"""`fedsim bench adp`: wall-clock of inference of a network whose gates see the image, and of the smaller ones made of it.

dense: the same backbone without gates. dynamic: the gated network, which computes every channel and multiplies by its gates.
skipped: the open channels alone, their filters gathered for each image (batch 1 only: the images of a batch open different ones).
live, folded: a client's network as `fedsim export` writes it, its gates looking at the image or become constants. by hand: ordinary
torch layers of the same widths, whose author added a block's fewer channels to the first ones of its stream. Evaluation mode, no
gradients, one thread on a CPU; all networks take turns, WARM calls before READINGS that are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedsim import models
from fedsim.bench.compaction import hand_built
from fedsim.bench.timing import interleaved
from fedsim.config.job import Job, load
from fedsim.errors import BadInput
from fedsim.models import settings
from fedsim.models.resnet import ResidualBlock
from fedsim.nn.dynamic_inference import Skipping
from fedsim.nn.subnetwork import folded, optimised_for_inference
from fedsim.pruning import dynamic_channels
from fedsim.pruning.dynamic_channels import Costs
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.exported.network import traced

DEFAULT = ("jobs/bench/adp_vgg11.toml", "jobs/bench/adp_resnet32.toml")
BATCHES = (1, 64)
WARM, READINGS = 20, 50
BUSY = 0.02  # seconds that one reading takes at least
TARGETS = {"vgg11": "folded, dense / it ≥ 1.6", "resnet32": "folded, by hand / it ≥ 0.95"}

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Line:
    """What one network takes for a batch."""

    name: str
    batch: int
    seconds: tuple[float, ...]  # of all readings, in order
    share: float  # of the dense network's multiply-adds

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Milliseconds a call."""
        low, middle, high = quantiles(self.seconds, n=4)
        return 1000 * low, 1000 * middle, 1000 * high

    def faster(self, than: Line) -> float:
        """How many times faster than another network, which took turns with it: the median over neighbouring readings."""
        return median(other / mine for mine, other in zip(self.seconds, than.seconds, strict=True))


def main(jobs: list[Job], console: Console) -> int:
    """Prints a table per job."""
    torch.set_num_threads(1)
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        parts = build_experiment(job)
        keep, target = job.model.gate_keep, TARGETS.get(job.model.name)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("", "batch", "ms", "quartiles", "dense / it", "by hand / it", "multiply-adds"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for batch in BATCHES:
            lines = {line.name: line for line in measured(parts, batch)}
            for line in lines.values():
                low, middle, high = line.quartiles
                ratios = (f"{line.faster(lines[name]):.2f}" for name in ("dense", "by hand"))
                table.add_row(line.name, str(batch), f"{middle:.2f}", f"{low:.2f} to {high:.2f}", *ratios, f"{line.share:.3f}")
        head = f"{job.model.name}, keep {keep}, one thread, {READINGS} readings; torch {torch.__version__}"
        console.print(head, table, *([f"target: {target}"] if target else []), "", sep="\n", highlight=False)
    return 0


def measured(parts: Experiment, batch: int, readings: int = READINGS) -> list[Line]:
    """Every network's line; the channels that the exported ones keep are drawn."""
    setting, device = parts.setting, torch.device(parts.site.device)
    if not setting.net.has_dynamic_gates:
        raise BadInput(f"{parts.job.name}: fedsim bench adp measures dynamic gates; set model.gate_keep")
    networks, shares = _networks(parts), _shares(parts)
    if batch > 1:
        networks.pop("skipped")
    x = torch.randn(batch, *parts.population.train.shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = interleaved({name: _passing(network, x) for name, network in networks.items()}, device, readings, BUSY, WARM)
    return [Line(name, batch, tuple(times[name]), shares[name]) for name in networks]


def _networks(parts: Experiment) -> dict[str, Any]:
    """By name, all with the same weights where they have them."""
    job, setting, data = parts.job, parts.setting, parts.population.train
    net, counts = setting.net, setting.net.selected
    source = torch.Generator().manual_seed(0)
    gate = torch.cat([torch.randperm(width, generator=source) < count for width, count in zip(net.channels.widths, counts, strict=True)])
    kept = net.channels.kept(gate)
    live = net.cut(kept).plain(net.compact(net.initial, kept))
    fold = folded(live, {name: torch.ones(len(index)) for name, index in kept.items()})
    plain = replace(job.model, **{name: getattr(settings.ModelSettings, name) for name in vars(job.model) if name.startswith("gate_")})
    dense = models.build(plain, data.shape, data.classes, job.seed)
    made = {
        "dense": dense,
        "dynamic": net.plain(net.initial),
        "live": optimised_for_inference(live),
        "folded": fold,
        "by hand": _by_hand(dense, net.channels.groups, {name: len(index) for name, index in kept.items()}),
    }
    made = {name: network.to(parts.site.device).eval() for name, network in made.items()}
    made |= {name: traced(made[name])[0] for name in ("live", "folded")}
    return made | {"skipped": Skipping(made["dynamic"])}


def _shares(parts: Experiment) -> dict[str, float]:
    """Multiply-adds over the dense network's; dynamic and skipped: with as many channels open as there may be."""
    channels, model_profile, counts = parts.setting.net.channels, parts.setting.model_profile, parts.setting.net.selected
    costs = Costs.of(channels, model_profile)
    whole, nominal = costs.dense.total, costs.nominal(counts)["nominal_share"]
    live, fold = (dynamic_channels.exported(channels, model_profile, counts, without) / whole for without in (False, True))
    every = 1 + costs.gates / whole
    return {"dense": 1.0, "dynamic": every, "skipped": nominal, "live": live, "folded": fold, "by hand": fold}


class CutBlock(nn.Module):
    """A residual block as its author would write it with fewer channels: they are added to the first ones of the stream."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2, self.shortcut = block.conv1, block.norm1, block.conv2, block.norm2, block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu_()))
        stream: Tensor = self.shortcut(x)
        stream[:, : y.shape[1]] += y
        return stream.relu_()


def _by_hand(dense: nn.Module, groups: Any, widths: dict[str, int]) -> nn.Module:
    small = hand_built(dense, groups, widths)
    for name, block in [(name, layer) for name, layer in small.named_modules() if isinstance(layer, ResidualBlock)]:
        parent, _, slot = name.rpartition(".")
        setattr(small.get_submodule(parent), slot, CutBlock(block))
    return small


def _passing(run: Run, x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def passed() -> Tensor:
        return run(x)

    return passed
