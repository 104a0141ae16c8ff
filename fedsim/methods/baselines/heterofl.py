"""HeteroFL: Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning …", ICLR 2021.

A client of rate r_k trains the first ceil(r_k W) of the W channels of every hidden layer. The server averages each weight over the
clients of the cohort that have it; a weight that none of them has keeps its value. Clients use their own width; the whole network is
evaluated on the global test set.

Paper -> code:  r_k -> WIDTH_RATE,  W -> channels.widths,  W_l^p without W_l^(p+1) -> COVER,  Scaler -> scaler,  sBN -> static_norm,
                masked cross-entropy -> mask_classes,  C -> cohort,  E -> train.epochs,  B -> train.batch,  eta -> train.lr

The scaler stands between a layer and its norm, so it is exact to divide the layer's weight and bias by r_k; a soft gate would stand
behind the norm. A norm takes the division back. Where a layer has none, such as a hidden linear layer, a step of SGD at the rate eta
moves its outputs as one at eta / r_k^2 would without the scaler: narrow clients need a small eta, or
scaler = false.

Statistics of batch norms are means over images, gathered from all clients for the whole network and for each width.

Differences from the paper:
- Only channels that fedsim can cut are nested. In a network with additions the residual stream, the first layer and the layer before
  the classifier stay whole, and so do the scales of their norms: a sub-network has more than r_k^2 of the weights. So do convolutions
  whose filters are normalised (norm = "nsconv").
- Clients draw their rates alike from `rates`; to give a rate a larger share, name it more often.
- The paper tests the whole network alone, without the scaler. A client's own network keeps it, since it was trained so.
  Its logits of classes that the client does not have stay 0 as well: these rows of the classifier are 0 in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.core import keys, rng, tree
from fedsim.core.keys import COUNT, COVER, GATE, OWNED_CLASSES, WIDTH_RATE
from fedsim.core.tree import Tree, under
from fedsim.core.types import Data, Feed
from fedsim.core.validation import read_where, summed_at_once, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.budgets import OfClients
from fedsim.federated.protocol import ClientInput, Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning.nested_widths import FindClasses, GatherStatistics, TrainNested, mean_over_owners, nested, scaled, with_classes


@dataclass(frozen=True)
class State(AveragedState):
    classes: Tensor | None = None  # (clients, classes) bool: of which a client has training images
    round: int = 0  # the last one that was trained
    statistics: tuple[Tree, ...] = ()  # of norms, for each of `HeteroFL.widths`; empty before they are first gathered


@dataclass(frozen=True)
class HeteroFL(Method[State]):
    """Every client trains and uses the first channels of the network, as many as its rate allows."""

    rates: tuple[float, ...] | dict[str, float] = (1.0, 0.5, 0.25, 0.125, 0.0625)  # r_k, shares of the channels; or one by kind of device
    assignment: Literal["fix", "dynamic"] = "fix"  # one rate for each client, or drawn anew every round
    weights: Literal["uniform", "samples"] = "uniform"  # how the owners of a weight are averaged
    scaler: bool = True  # in training the outputs of narrowed layers are divided by r_k, before their norms
    static_norm: bool = True  # sBN: norms use statistics of batches in training; for evaluation those of all clients are gathered
    statistics_every: int = 1  # rounds between two such gatherings, evaluations between them use the last; the last round always gathers
    mask_classes: bool = True  # logits of classes that a client does not have are 0 in training, and their rows are not averaged

    def __post_init__(self) -> None:
        within(self, statistics_every=(1, inf))
        rates = list(self.rates.values() if isinstance(self.rates, dict) else self.rates)
        if not rates or not all(0 < rate <= 1 for rate in rates):
            raise BadInput(f"[method] rates = {rates}: each should be above 0 and at most 1, such as [1.0, 0.5, 0.25]")

    @property
    def stays(self) -> str:
        """What a client has at its own width."""
        parts = {"batch norms": self.static_norm, "scaled weights": self.scaler, "classes": self.mask_classes}
        return " and ".join(name for name, mine in parts.items() if mine)

    @property
    def widths(self) -> list[float]:
        """The rates whose networks are evaluated, the whole network first."""
        return sorted({1.0, *map(float, self.rates)}, reverse=True)

    def unread(self) -> dict[str, str]:
        return read_where(self, "static_norm", (True,), "statistics_every")

    def init(self, setting: Setting, public: Data | None) -> State:
        self._check(setting)
        return State.begin(setting, under(setting.net.initial, *self._sent()))

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        classifier = self._classifier(setting.net) if self.mask_classes else ""
        if r == 0:
            return replace(state, classes=self._classes(setting, fleet, classifier)) if classifier else state, {}
        cohort = fleet.pick(setting.cohort, r)
        rates = self.rates_of(setting, cohort, r)
        own = {WIDTH_RATE: rates} | ({} if state.classes is None else {OWNED_CLASSES: state.classes[cohort]})
        how: dict[str, Any] = {"uniform": self.weights == "uniform", "scaler": self.scaler, "static_norm": self.static_norm}
        work = TrainNested.at(setting, r, classifier=classifier, **how)
        total = fleet.run(work, cohort, setting.aggregate.shared(state.memory, state.shared), own).total
        like = {key: value for key, value in state.shared.items() if key in total}
        state = replace(state, shared=state.shared | mean_over_owners(total, like), round=r)
        if self.static_norm and (r % self.statistics_every == 0 or r == setting.rounds):
            state = replace(state, statistics=tuple(self._statistics(setting, state.shared, fleet, rate) for rate in self.widths))
        untouched = sum(int((total[COVER + key] == 0).sum()) for key in under(like, keys.WEIGHTS))
        share = untouched / tree.size(under(like, keys.WEIGHTS))
        return state, {"lr": work.lr, "mean_width_rate": float(rates.mean()), "untouched_share": share}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        whole = state.statistics[0] if state.statistics else {}
        shared, own = under(setting.net.initial, keys.BUFFERS) | state.shared | whole, {}
        if len(cohort):
            rates = self.rates_of(setting, sorted(cohort), state.round)
            rows = [state.statistics[self.widths.index(rate)] for rate in rates.tolist()] if whole else []
            own = tree.stack(rows) | {GATE: nested(setting.net.channels.widths, rates), WIDTH_RATE: rates}
            own |= {} if state.classes is None else {OWNED_CLASSES: state.classes[sorted(cohort)]}
        return shared, own, None

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        held = sent.tree({})
        held |= scaled(net, held, held[WIDTH_RATE]) if self.scaler and WIDTH_RATE in held else {}
        return held | (with_classes(held, self._classifier(net), held[OWNED_CLASSES]) if OWNED_CLASSES in held else {})

    def rates_of(self, setting: Setting, clients: Sequence[int], r: int) -> Tensor:
        """(K,) float64, the rates of clients in round `r`."""
        if isinstance(self.rates, OfClients):
            return torch.tensor([self.rates[client] for client in clients], dtype=torch.float64)
        drawn = rng.key(setting.seed, "width", r if self.assignment == "dynamic" else 0, torch.tensor(clients))
        return torch.tensor(list(map(float, self.rates)), dtype=torch.float64)[rng.integers(drawn, 1, len(self.rates))[:, 0]]

    def _classifier(self, net: Net) -> str:
        """The layer that makes the logits."""
        return list(net.sizes)[-1]

    def _sent(self) -> tuple[str, ...]:
        """Beginnings of the keys that are broadcast and averaged."""
        return (keys.WEIGHTS,) if self.static_norm else (keys.WEIGHTS, keys.BUFFERS)

    def _classes(self, setting: Setting, fleet: Fleet, classifier: str) -> Tensor:
        clients, classes = fleet.pick(None, 0), setting.net.shapes[classifier][0]
        work = FindClasses((self._feed(setting),), self, classes)
        found = [fleet.run(work, part, {}).each[OWNED_CLASSES].cpu() for part in summed_at_once(clients)]
        return torch.zeros(setting.clients, classes, dtype=torch.bool).index_copy(0, torch.tensor(clients), torch.cat(found))

    def _statistics(self, setting: Setting, shared: Tree, fleet: Fleet, rate: float) -> Tree:
        """Statistics of the network of this rate over the training images of all clients; nothing without batch norms."""
        buffers = under(setting.net.initial, keys.BUFFERS)
        if not buffers:
            return {}
        width = torch.tensor(rate, dtype=torch.float64)
        small = (
            {}
            if rate == 1
            else {GATE: nested(setting.net.channels.widths, width)} | (scaled(setting.net, shared, width) if self.scaler else {})
        )
        work, sent = GatherStatistics((self._feed(setting),)), shared | buffers | small
        totals = [fleet.run(work, part, sent).total for part in summed_at_once(fleet.pick(None, 0))]
        total = {key: torch.stack([part[key] for part in totals]).sum(0) for key in totals[0]}
        return tree.mean(total, total[COUNT].clamp(min=1), buffers)

    def _feed(self, setting: Setting) -> Feed:
        return Feed("probe", epochs=1, batch=setting.train.batch, augment=False, cost="forward")

    def _check(self, setting: Setting) -> None:
        """BadInput for an aggregation without a mean over owners, and for models that cannot be narrowed or scaled."""
        net = setting.net
        if not setting.aggregate.is_plain_mean:
            raise BadInput(
                "[train] heterofl averages each weight over the clients that have it, for which fednova and scaffold have no rule:"
                ' use aggregate = "fedavg" or "fedprox"'
            )
        if net.has_dynamic_gates:
            raise BadInput(
                "[model] gate_keep chooses channels anew for every image; heterofl gives each client its own: leave gate_keep out"
            )
        try:
            layers = {group.name for group in net.channels.groups}
        except ValueError as error:
            raise BadInput(f"[model] {error}") from error
        if self.scaler and (same := sorted(layers & net.channels.standardised)):
            raise BadInput(
                f"[model] {same[0]} standardises its filters, which undoes the scaler's division: set model.standardise = false,"
                " or method.scaler = false"
            )
        if self.scaler and not self.static_norm and under(net.initial, keys.BUFFERS):
            raise BadInput(
                "[method] static_norm = false keeps running statistics of training, and with scaler = true these are of outputs divided"
                " by the rate, which no evaluation sees: take static_norm = true, or scaler = false"
            )
