"""Small methods that use what the shipped ones do not use yet: masks, kept state, held-out feeds, probes, rows of each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsim.core import keys, rng
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, mean, under, weigh
from fedsim.core.types import Batch, Data, Feed
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Method, Report, Setting, Work
from fedsim.nn.net import Net
from fedsim.pruning import gates


@dataclass(frozen=True)
class State:
    shared: Tree


def trained(setting: Setting, shared: Tree, total: Tree) -> Tree:
    return shared | mean(total, total[COUNT], under(shared, "w/", "buf/"))


@dataclass(frozen=True)
class StaticMask(Method[State]):
    """Masked FedAvg from a random mask, which changes once, at round 2."""

    density: float = 0.3

    def init(self, setting: Setting, public: Data | None) -> State:
        return State(self._masked(setting.net.initial, 0))

    def _masked(self, shared: Tree, change: int) -> Tree:
        layers = [key for key, value in under(shared, "w/").items() if value.dim() > 1][1:]
        masks = {}
        for place, key in enumerate(layers):
            order = rng.permutation(rng.key(change, place), shared[key].numel())
            masks["mask/" + key[2:]] = (order < int(self.density * shared[key].numel() * 0.8)).view(shared[key].shape)
        return shared | {"w/" + key[5:]: shared["w/" + key[5:]] * mask for key, mask in masks.items()} | masks

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        reply = fleet.run(Train.at(setting, r), fleet.pick(setting.cohort, r), state.shared)
        shared = trained(setting, state.shared, reply.total)
        return State(self._masked(shared, 1) if r == 2 else shared), {}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None


@dataclass(frozen=True)
class TrainKept(Train):
    """Trains on held-out images, then on its own, and keeps a personal mask and a count of its visits."""

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        mask = rng.uniform(sent.key, 10 * 128).view(10, 128) < 0.5
        return {"mask/fc2.weight": mask, "n/visits": torch.zeros((), device=sent.n.device)}

    def begin_feed(self, net: Net, sent: ClientInput, state: Tree, feed: int) -> Tree:
        if feed == 0:
            return state
        return state | {"w/fc2.weight": state["w/fc2.weight"] * 0.5}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        visits = sent.kept["n/visits"] + 1
        mask = sent.kept["mask/fc2.weight"] & (state["w/fc2.weight"].abs() > 1e-3)
        return replace(report, each={"n/visits": visits}, keep={"mask/fc2.weight": mask, "n/visits": visits})


@dataclass(frozen=True)
class Keeper(Method[State]):
    """Personal masks that stay with the client, as LotteryFL's do."""

    def init(self, setting: Setting, public: Data | None) -> State:
        return State(setting.net.initial)

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        train = Train.at(setting, r)
        feeds = (Feed("held", epochs=1, batch=2), *train.feeds)
        work = TrainKept(feeds, train.lr, train.momentum, train.decay, train.aggregate)
        reply = fleet.run(work, fleet.pick(setting.cohort, r), state.shared)
        return State(trained(setting, state.shared, reply.total)), {"visits": float(reply.each["n/visits"].sum())}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None


@dataclass(frozen=True)
class Probe(Work):
    """The largest entries of one layer's dense gradient on a fixed share of the client's images, scaled by a number of its own."""

    feeds: tuple[Feed, ...]
    layer: str
    k: int

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        device = sent.n.device
        return {"top/index": torch.zeros(self.k, dtype=torch.int64, device=device), "top/value": torch.zeros(self.k, device=device)}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        def tap(layer: str, g: Tensor) -> Tree:
            index = (g.flatten().abs() * 1e6).round().sort(descending=True, stable=True).indices[: self.k]
            return {"top/index": index, "top/value": g.flatten()[index] * sent.own["n/scale"]}

        loss, _, _, taps = net.gradient(sent.tree(state), batch, wrt=None, tap=tap, layers=(self.layer,))
        return taps, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(weigh(sent.n, {"grad/sum": state["top/value"]}), each=state)


@dataclass(frozen=True)
class Prober(Method[State]):
    """Trains, then probes the same cohort in the same round, with a tensor of its own for each client."""

    k: int = 5

    def init(self, setting: Setting, public: Data | None) -> State:
        return State(setting.net.initial)

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        if r == 0:
            return state, {}
        cohort = fleet.pick(setting.cohort, r)
        shared = trained(setting, state.shared, fleet.run(Train.at(setting, r), cohort, state.shared).total)
        work = Probe((Feed("probe", steps=1, batch=6, share=0.5, augment=False, dense_gradient_layers=("fc1",)),), "fc1", self.k)
        reply = fleet.run(work, cohort, shared, {"n/scale": torch.arange(1.0, len(cohort) + 1)})
        moved = shared["w/fc1.weight"].flatten().index_add(0, reply.each["top/index"].flatten(), -0.01 * reply.each["top/value"].flatten())
        return State(shared | {"w/fc1.weight": moved.view(shared["w/fc1.weight"].shape)}), {}

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None


@dataclass(frozen=True)
class GatedState:
    shared: Tree
    kept: Tree  # group -> channels left for good; empty before the cut


@dataclass(frozen=True)
class Gated(Method[GatedState]):
    """Every client trains a fixed sub-network of its own; what none may use is cut for good after round 2."""

    keep: float = 0.75  # of every group's channels, for good
    own: float = 0.6  # chance of a channel in a client's sub-network

    def init(self, setting: Setting, public: Data | None) -> GatedState:
        return GatedState(setting.net.initial, {})

    def net(self, setting: Setting, state: GatedState) -> Net:
        return setting.net.cut(state.kept) if state.kept else setting.net

    def base(self, setting: Setting) -> Tensor:
        """(n,) the channels that stay, the same ones in every run."""
        channels = setting.net.channels
        order = [rng.permutation(rng.key(setting.seed, "base", place), size) for place, size in enumerate(channels.widths)]
        return torch.cat([mine < max(2, int(self.keep * size)) for mine, size in zip(order, channels.widths, strict=True)])

    def gates(self, setting: Setting, state: GatedState, cohort: Sequence[int]) -> Tree:
        """Within what stays; after the cut its channels alone."""
        if not cohort:
            return {}
        within = self.base(setting)
        u = rng.uniform(rng.key(setting.seed, "own", 0, 0, torch.tensor(sorted(cohort))), setting.net.channels.n)
        hard = gates.never_empty(u < self.own, u, setting.net.channels.widths, within.expand(len(u), -1))
        return {keys.GATE: hard[:, within] if state.kept else hard}

    def round(self, setting: Setting, state: GatedState, fleet: Fleet, r: int) -> tuple[GatedState, dict[str, float]]:
        if r == 0:
            return state, {}
        cohort, net = fleet.pick(setting.cohort, r), self.net(setting, state)
        reply = fleet.run(Train.at(setting, r), cohort, state.shared, self.gates(setting, state, cohort), net)
        state = replace(state, shared=trained(setting, state.shared, reply.total))
        if r == 2:
            kept = net.channels.kept(self.base(setting))
            state = GatedState(net.compact(state.shared, kept), kept)
        return state, {}

    def deploy(self, setting: Setting, state: GatedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, self.gates(setting, state, cohort), self.net(setting, state) if state.kept else None


def with_dropout(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network whose layers draw in training."""
    first, second = nn.Conv2d(shape[0], 4, 3, padding=1), nn.Conv2d(4, 8, 3)
    return nn.Sequential(
        *(first, nn.ReLU(), nn.Dropout2d(0.2), second, nn.Dropout(0.1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, classes)),
    )
