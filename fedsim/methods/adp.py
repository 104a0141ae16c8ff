"""ADP: "Adaptive Dynamic Pruning for Non-IID Federated Learning", arXiv:2106.06921 v1. Gates choose channels anew for every image.

Every gated convolution keeps at most a share d of its output channels for an image, by a small gate that looks at its input; the
gates are trained and averaged like weights. The gated network is the model's: set model.gate_keep (d), and where wanted
model.gate_sigmoid, gate_bias, gate_l1, gate_choice and gate_place; methods that average weights train it too. This one gives, after the
last round, every client a network that is physically smaller: the channels that its own training images open most often (our addition
to the paper).

Paper -> code:  d -> model.gate_keep,  K -> clients,  g -> fedsim.nn.layers.input_gate,  f_{l,c} -> own/frequency,  m_k -> gate/channels

The dense reference is the same model without model.gate_keep under the method fedavg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import ACTIVE_CONVS, COUNT, FREQUENCY, GATE, VARYING_CHANNELS
from fedsim.core.tree import Tree, under
from fedsim.core.types import Data
from fedsim.core.validation import within
from fedsim.errors import BadInput
from fedsim.federated import personal_model
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.protocol import ClientInput, Fleet, Method, Setting
from fedsim.nn.layers.input_gate import SHIFTS_MODULE
from fedsim.nn.layers.nsconv import WHOLE
from fedsim.nn.net import Net
from fedsim.pruning import channel_frequency, dynamic_channels
from fedsim.pruning.channel_frequency import MeasureChannelFrequency, TrainLocal
from fedsim.pruning.dynamic_channels import Costs

SHIFTS = f"{keys.WEIGHTS}{SHIFTS_MODULE}."
WHY = "adp gives clients plain or standardised convolutions, whose results pass on by activations, pools, and additions to a stream"


@dataclass(frozen=True)
class State(AveragedState):
    mask: Tensor | None = None  # (n,) bool, with export = "global" after the last round


@dataclass(frozen=True)
class ADP(Method[State]):
    """Trains a network whose gates see the image, and gives each client the part that its own images use."""

    gates: Literal["averaged", "local"] = "averaged"  # local: they stay with the client; the global test set then sees the first ones
    bn: Literal["averaged", "local"] = "averaged"  # scales, shifts and running statistics of batch norms
    export: Literal["client", "global", "none"] = "client"  # channels used at the end: each client's, one set for all, each image's
    export_gate: Literal["live", "folded"] = "live"  # gates of the kept channels go on seeing the image, or become their mean
    align: int = 1  # channels kept are rounded up to a multiple
    personalise: int = 0  # epochs that a client trains for its own use before that

    def __post_init__(self) -> None:
        within(self, align=(1, inf), personalise=(0, inf))
        if self.export_gate == "folded" and self.export != "client":
            raise BadInput(f'[method] export_gate = "folded" takes a client\'s own means: it needs export = "client", not {self.export!r}')
        if self.align > 1 and self.export == "none":
            raise BadInput(f'[method] align = {self.align} is of exported networks: leave it out, or export = "none"')

    @property
    def stays(self) -> str:
        """What clients have of their own beside their channels, and no run file holds."""
        parts = {"gates": self.gates == "local", "batch norms": self.bn == "local", "weights": self.personalise > 0}
        return " and ".join(name for name, mine in parts.items() if mine)

    def init(self, setting: Setting, public: Data | None) -> State:
        if not setting.net.has_dynamic_gates:
            raise BadInput("[method] adp trains a network with gates that see the image: set model.gate_keep = 0.7")
        if unfit := self._unfit(setting.net):
            raise BadInput(f"[model] the channels behind {', '.join(unfit)} cannot be cut: {WHOLE if setting.net.normalised else WHY}")
        if self.bn == "local" and not under(setting.net.initial, keys.BUFFERS):
            raise BadInput('[method] bn = "local" needs batch norms: set model.norm = "batch"')
        shared = setting.net.initial
        return replace(State.begin(setting, self._sent(setting.net, shared)), shared=shared)

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, Costs.of(setting.net.channels, setting.model_profile).nominal(setting.net.selected)
        work = TrainLocal.at(setting, r, local=self._local(setting.net))
        travels = replace(state, shared=self._sent(setting.net, state.shared))
        after, _ = trained(setting, fleet, travels, r, work)
        state, columns = replace(after, shared=state.shared | after.shared), {"lr": work.lr}
        return self._measured(setting, state, fleet, columns) if r == setting.rounds else (state, columns)

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        mask = {GATE: state.mask} if state.mask is not None and self.export == "global" else {}
        return under(state.shared, keys.WEIGHTS, keys.BUFFERS) | mask, {}, None

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        if FREQUENCY in sent.kept and self.export == "client":
            return channel_frequency.model_of(net, sent, self._counts(net), self.export_gate == "folded")
        held = sent.tree({})
        return held | (personal_model.personal(held) if self.personalise else {})

    def variants(self) -> dict[str, Method[State]]:
        """How else the clients could use what has been learned: each form's accuracy is recorded as well after the last round."""
        by_image = replace(self, export="none", export_gate="live", align=1)
        forms: dict[str, Method[State]] = {"gated": replace(by_image, personalise=0), "personal": by_image}
        return {name: form for name, form in forms.items() if form != self and (name == "gated" or self.personalise)}

    def _measured(self, setting: Setting, state: State, fleet: Fleet, columns: dict[str, float]) -> tuple[State, dict[str, float]]:
        """Every client with images measures what these use; the server learns no more than the masks' sum, if it is wanted."""
        costs, counts = Costs.of(setting.net.channels, setting.model_profile), self._counts(setting.net)
        own = {"local": self._local(setting.net), "counts": counts, "shared": self.export == "global", "costs": costs}
        work = MeasureChannelFrequency.after(setting, setting.rounds, self.personalise, self.export_gate == "folded", **own)
        total = personal_model.by_all(setting, fleet, work, self._sent(setting.net, state.shared))
        convs = float(total[ACTIVE_CONVS] / total[COUNT])
        active = (convs * costs.dense["convs"] + costs.gates + costs.others) / costs.dense.total
        columns |= {"active_convs_share": convs, "active_share": active, "varying_share": float(total[VARYING_CHANNELS] / total[COUNT])}
        if self.export != "none":
            small = dynamic_channels.exported(setting.net.channels, setting.model_profile, counts, self.export_gate == "folded")
            columns["export_share"] = small / costs.dense.total
        if self.export == "global":
            mask = dynamic_channels.kept(total[keys.FREQUENCY_SUM], total[keys.GATE_SUM], setting.net.channels.widths, counts)
            state = replace(state, mask=mask)
        return state, columns

    # ---- what it is made of

    def _local(self, net: Net) -> tuple[str, ...]:
        """Beginnings of the keys of what stays with the client."""
        norms = [key.removeprefix(keys.BUFFERS).removesuffix("running_mean") for key in net.initial if key.endswith(".running_mean")]
        mine = [f"{kind}{norm}" for norm in norms for kind in (keys.WEIGHTS, keys.BUFFERS, SHIFTS)] if self.bn == "local" else []
        return (*(["w/gates."] if self.gates == "local" else []), *mine)

    def _sent(self, net: Net, shared: Tree) -> Tree:
        """What travels of a model."""
        local = self._local(net)
        return {key: value for key, value in shared.items() if not key.startswith(local)}

    def _unfit(self, net: Net) -> list[str]:
        """Gates whose channels are in no group by themselves."""
        try:
            free = {group.gate for group in net.channels.groups}
        except ValueError:
            free = set()
        return [gate for gate in net.dynamic_gates if gate not in free]

    def _counts(self, net: Net) -> tuple[int, ...]:
        """Channels that an exported network keeps of every layer."""
        return dynamic_channels.aligned(net.selected, net.channels.widths, self.align)
