"""FL-PQSU: Xu et al., IEEE Access 2021. One cut of channels, transport in 8 bits, and uploads only where the loss has fallen.

"Accelerating Federated Learning for IoT in Big Data Analytics with Pruning, Quantization and Selective Updating".

P: before round 1 the server cuts the filters and units of smallest L1 norm, for good. Q: what travels has 8 bits an entry, in either
direction. SU: a client uploads only if the loss of its last batch is below that of its last upload. The server takes the plain mean
of what is uploaded; where nobody uploads, the model stays.

Paper -> code:  kept width -> keep,  q -> quantised,  s, z -> SCALES,  f_ld -> LAST_LOSS,  threshold -> THRESHOLD,  K -> cohort

Each tensor has one unit and one zero, and its range always contains 0, so that a tensor of one sign keeps its values. Filters are
ranked on the model's first values. In a network with additions only channels inside of blocks are cut, and none of convolutions whose
filters are normalised (norm = "nsconv"). The server needs what each client uploads by itself: one byte for each parameter of each client
of the cohort. `fedsim estimate`, which trains nobody, cannot know who is selected: it predicts that all upload, the dearest rounds there
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor, inf

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.keys import BYTES, COUNT, LAST_LOSS, SCALES, SELECTED, THRESHOLD
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch, Data
from fedsim.core.validation import TINY, read_where, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Method, Report, Setting
from fedsim.nn.net import Net

STEPS = 255  # between the smallest and the largest of 8 bits
UNTRAINED = -1.0  # the last loss of who has taken no step, as in `fedsim estimate`: below every loss, so that an upload is charged


def quantised(tree: Tree) -> Tree:
    """Every tensor in 8 bits under BYTES, and (2,) its unit and the entry that stands for 0 under SCALES. Fit for `vmap`."""
    found = {}
    for key, x in tree.items():
        low, high = x.amin().double().clamp(max=0), x.amax().double().clamp(min=0)
        unit = torch.where(high > low, (high - low) / STEPS, 1.0).float().double()
        zero = (-low / unit).round()
        found[BYTES + key] = ((x.double() / unit).round() + zero).clamp(0, STEPS).to(torch.uint8)
        found[SCALES + key] = torch.stack([unit, zero]).float()
    return found


def restored(tree: Tree, like: Tree) -> Tree:
    """The tree with what `quantised` made of tensors in their place, in the dtypes of `like`; rows of clients (K, …) as well."""
    found = {key: value for key, value in tree.items() if not key.startswith((BYTES, SCALES))}
    for key, bits in under(tree, BYTES).items():
        name = key.removeprefix(BYTES)
        unit, zero = tree[SCALES + name].double().unbind(-1)
        shape = [*unit.shape, *[1] * (bits.dim() - unit.dim())]
        value = (bits.double() - zero.view(shape)) * unit.view(shape)
        found[name] = (value if like[name].dtype.is_floating_point else value.round()).to(like[name].dtype)
    return found


@dataclass(frozen=True)
class TrainSelective(Train):
    """Train, from 8 bits where they are sent; each: the model, and whether it is uploaded."""

    quantise: bool = True
    select: bool = True
    first: float = 100.0

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return {THRESHOLD: torch.full((), self.first, dtype=torch.float64, device=sent.n.device)}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        none = torch.full((), UNTRAINED, dtype=torch.float64, device=sent.n.device)
        return super().init_state(net, _opened(net, sent)) | {LAST_LOSS: none}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        state, loss = super().step(net, _opened(net, sent), state, batch)
        return state | {LAST_LOSS: loss.double()}, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        held, last, before = under(state, keys.WEIGHTS, keys.BUFFERS), state[LAST_LOSS], sent.kept[THRESHOLD]
        selected = last < before if self.select else torch.ones_like(last, dtype=torch.bool)
        each = (quantised(held) if self.quantise else held) | {SELECTED: selected}
        return Report({COUNT: sent.n.double()}, each, {THRESHOLD: torch.where(selected & (last >= 0), last, before)})


def _opened(net: Net, sent: ClientInput) -> ClientInput:
    """The input with every tensor in full."""
    return replace(sent, shared=restored(sent.shared, net.initial))


@dataclass(frozen=True)
class State(AveragedState):
    kept: Tree = field(default_factory=dict)  # group -> positions of the channels that the cut has left


@dataclass(frozen=True)
class FLPQSU(Method[State]):
    """Cuts channels once before training, sends 8 bits an entry, and uploads only what has improved."""

    keep: float = 0.5  # share of the channels of every hidden layer that stay
    quantise: bool = True  # Q: 8 bits an entry in both directions; false: 32
    select: bool = True  # SU: upload only if the last batch's loss is below that of the last upload; false: always
    first_threshold: float = 100.0  # nat, loss below which a client uploads for the first time

    def __post_init__(self) -> None:
        within(self, keep=(TINY, 1), first_threshold=(TINY, inf))

    def unread(self) -> dict[str, str]:
        return read_where(self, "select", (True,), "first_threshold")

    def init(self, setting: Setting, public: Data | None) -> State:
        if not setting.aggregate.is_plain_mean:
            raise BadInput('[train] flpqsu takes the plain mean of what is uploaded: use aggregate = "fedavg" or "fedprox"')
        if setting.net.has_dynamic_gates:
            raise BadInput("[model] gate_keep chooses channels anew for every image; flpqsu cuts them for good: leave gate_keep out")
        try:
            channels = setting.net.channels
        except ValueError as error:
            raise BadInput(f"[model] {error}") from error
        values = under(setting.net.initial, keys.WEIGHTS, keys.BUFFERS)
        norms = {group.name: values[keys.weight(group.name)].abs().flatten(1).sum(1) for group in channels.groups}
        stay = {name: masks.top(norm.cpu(), max(1, floor(self.keep * len(norm) + 1e-9))) for name, norm in norms.items()}
        kept = channels.kept(torch.cat(list(stay.values())))
        return State.begin(setting, setting.net.compact(values, kept), kept=kept)

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        work = TrainSelective.at(setting, r, quantise=self.quantise, select=self.select, first=self.first_threshold)
        held = under(state.shared, keys.WEIGHTS, keys.BUFFERS)
        rest = {key: value for key, value in state.shared.items() if key not in held}
        sent = rest | (quantised(held) if self.quantise else held)
        each = fleet.run(work, fleet.pick(setting.cohort, r), sent, net=setting.net.cut(state.kept)).each
        uploads = each[SELECTED]
        found = {key: rows for key, rows in restored(each, state.shared).items() if key in state.shared}
        if bool(uploads.any()):
            mean = {key: rows[uploads].double().mean(0).to(rows.dtype) for key, rows in found.items()}
            state = replace(state, shared=state.shared | mean)
        return state, {"lr": work.lr, "uploads": float(uploads.sum())}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, setting.net.cut(state.kept)
