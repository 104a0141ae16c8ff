"""Works through gates: gradients of gates, training under gates, channels' energy, and hypernetworks that a client trains itself.

"gate/channels" (n,) is one gate for all of a work's steps, "gate/steps" (S, n) one for each. Hard ones are bool, soft ones float.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.core import keys, tree
from fedsim.core.keys import EMBEDDING, GATE, GATE_GRADIENT, GATE_STEPS, GRADIENTS
from fedsim.core.tree import Tree, row, under
from fedsim.core.types import Batch, Feed
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Report, Work
from fedsim.pruning import hypernet_training
from fedsim.pruning.hypernet_training import HypernetTraining

if TYPE_CHECKING:
    from fedsim.nn.net import Net

ENERGY_UNIT = 2.0**20  # of energies, whose sums over many images are large


@dataclass(frozen=True)
class GateGradient(Work):
    """The loss's gradient in the client's soft gate, the mean over the steps; each: grad/gates (n,). No weight moves."""

    feeds: tuple[Feed, ...]

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {GATE_GRADIENT: torch.zeros_like(sent.own[GATE])}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        loss, gradient, _, _ = net.gradient(sent.tree(state), batch, "gate")
        return {GATE_GRADIENT: state[GATE_GRADIENT] + gradient[GATE] / batch.T}, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({keys.COUNT: torch.ones_like(sent.n, dtype=torch.float64)}, state)


@dataclass(frozen=True)
class TrainGated(Train):
    """Train under gates, from the broadcast's momentum; total: its means' terms, and those of the momentum.

    A soft gate is learned from as well: each: grad/gates (n,), the mean over the steps.
    """

    uniform: bool = True  # clients count alike; false: by their number of images
    carried: bool = True  # the momentum goes on from round to round; false: it begins at 0
    norm_over: str = "kept"  # all: norms see closed channels too, as in published code; then nothing runs compacted

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        state = super().init_state(net, sent)
        if self.carried:
            state |= {key: value for key, value in under(sent.shared, keys.OPTIMISER).items() if key in state}
        return state | ({GATE_GRADIENT: torch.zeros_like(sent.own[GATE])} if _soft(sent) else {})

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        held = sent.tree(state)
        if GATE_STEPS in held:
            held[GATE] = held.pop(GATE_STEPS).index_select(0, batch.t.view(1))[0]
        if GATE in held and self.norm_over == "all":
            held[GATE] = held[GATE].to(batch.x.dtype)
        wrt = ("w", "gate") if _soft(sent) else "w"
        loss, gradient, buffers, _ = net.gradient(held, batch, wrt, extra=self.aggregate.extra(sent, state), compact=True)
        if _soft(sent):
            state = state | {GATE_GRADIENT: state[GATE_GRADIENT] + gradient.pop(GATE) / batch.T}
        return self.descend(net, sent, state | buffers, gradient), loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        n = torch.ones_like(sent.n) if self.uniform else sent.n
        report = self.aggregate.report(replace(sent, n=n), state)
        moved = tree.weigh(n, under(state, keys.OPTIMISER)) if self.carried else {}
        return Report(report.total | moved, report.each | under(state, GATE_GRADIENT), report.keep)


def _soft(sent: ClientInput) -> bool:
    return GATE in sent.own and sent.own[GATE].is_floating_point()


@dataclass(frozen=True)
class Energy(Work):
    """The squared activations of every channel, summed over positions; total: n · their mean over its images, in ENERGY_UNIT, and n."""

    feeds: tuple[Feed, ...]
    power: int = 2  # 1: of absolute values

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {keys.ENERGY: torch.zeros(net.channels.n, dtype=torch.float64, device=sent.n.device)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        found = net.energy(sent.tree({}), batch.x, batch.real, self.power).double()
        return {keys.ENERGY: state[keys.ENERGY] + found}, found.sum() * 0

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({keys.ENERGY: state[keys.ENERGY] / ENERGY_UNIT, keys.COUNT: sent.n.double()})


@dataclass(frozen=True)
class HypernetStep(Work):
    """One AdamW step of a client's own copy of the hypernetworks, on its own loss at soft gates that it draws itself.

    own: its embedding with AdamW's moments (`hypernet_training.sent_row`), "seed/draw_keys" (), "n/target" (). total: both hypernetworks
    and their moments under "grad/", clients alike; each: the embedding and its moments.
    """

    feeds: tuple[Feed, ...]
    rule: HypernetTraining
    lr_base: float
    lr_client: float
    decay: float
    extra_memory: int = 0  # bytes of the hypernetworks, their moments and gradients
    extra_flops: int = 0  # of their forward and backward pass

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return hypernet_training.apart(sent.shared)[0] | hypernet_training.sent_row(hypernet_training.apart(sent.own)[1])

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        hyper, mine = hypernet_training.apart(state)
        rows = {key: value.unsqueeze(0) for key, value in mine.items()}
        draw_keys, z = sent.own[keys.SEED_KEYS].view(1), sent.shared[keys.SEED_DRAW]
        m = self.rule.soft(self.rule.base(hyper, z), self.rule.choice(hyper, rows.get(EMBEDDING)), draw_keys)
        loss, gradient, _, _ = net.gradient(sent.shared | {GATE: m[0]}, batch, "gate")
        key, targets, d = sent.shared[keys.SEED_BASE], sent.own[keys.TARGET].view(1), gradient[GATE].unsqueeze(0)
        found = hypernet_training.gradient(partial(self.rule.loss, z=z, draw_keys=draw_keys, key=key, targets=targets, d=d), hyper, rows)
        hyper, rows = hypernet_training.step(hyper, rows, found, self.lr_base, self.lr_client, self.decay)
        return hyper | hypernet_training.sent_row(row(rows, 0)), loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        hyper, mine = hypernet_training.apart(state)
        # not under the keys of the broadcast, whose sums are rounded at a unit of 1e-10: second moments are smaller than that
        total = {key if key.startswith(keys.COUNTS) else GRADIENTS + key: value.double() for key, value in hyper.items()}
        return Report(total | {keys.COUNT: torch.ones_like(sent.n, dtype=torch.float64)}, hypernet_training.sent_row(mine))
