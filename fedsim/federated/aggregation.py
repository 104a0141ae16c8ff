"""Aggregation: how averaged weights become the next model, chosen by `train.aggregate` for every method that averages weights.

FedAvg: McMahan et al., AISTATS 2017: w <- sum_k n_k w_k / sum_k n_k over the cohort, running statistics of norms alike.
FedProx: Li et al., MLSys 2020: the same server; the local loss gains mu/2 · |w - w_t|^2.
FedNova: Wang et al., NeurIPS 2020, arXiv:2007.07481: the mean of what clients moved, each by the length a_k of its own path.
SCAFFOLD: Karimireddy et al., ICML 2020, arXiv:1910.06378: control variates take the clients' drift out of every local step.

Paper -> code:  p_k -> weight / total weight,  tau_k -> sent.steps[0],  rho -> momentum,  eta_l -> lr,
               c -> SCAFFOLD_CONTROL,  c_i -> SCAFFOLD_OWN
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from fedsim.core import entry_points, keys, masks, tree
from fedsim.core.keys import (
    COUNT,
    FEDNOVA_MOVE,
    FEDNOVA_PATH,
    FEDNOVA_WEIGHT,
    SCAFFOLD_CHANGE,
    SCAFFOLD_CONTROL,
    SCAFFOLD_OWN,
    SCAFFOLD_SINCE,
    SCAFFOLD_TURN,
    SCAFFOLD_VISIT,
)
from fedsim.core.tree import Tree, renamed, under
from fedsim.core.types import LocalOptimizer
from fedsim.errors import BadInput
from fedsim.federated.protocol import ClientInput, Report, Setting

if TYPE_CHECKING:
    from fedsim.nn.net import Net

PATH_UNIT = 2.0**20  # of path lengths, whose sums over many images are large


@dataclass(frozen=True)
class FedAvg:
    """The mean of the cohort's weights, by number of images: w <- sum_k n_k w_k / sum_k n_k. McMahan et al., AISTATS 2017.

    The other aggregations override some of its methods. In all of them `memory` is what the server keeps from round to round,
    `shared` the broadcast, `state` a client's tensors while it trains, and `total` the sum of the cohort's reports, in float64.

    >>> import torch
    >>> shared = {"w/a": torch.zeros(1), "mask/a": torch.ones(1, dtype=torch.bool)}
    >>> total = {"w/a": torch.tensor([3 * 1.0 + 1 * 5.0], dtype=torch.float64), COUNT: torch.tensor(4.0, dtype=torch.float64)}
    >>> after, memory = FedAvg().server({}, shared, total, setting=None)
    >>> after["w/a"]
    tensor([2.])
    """

    sgd: ClassVar[bool] = False  # its formulas are those of SGD

    @property
    def is_plain_mean(self) -> bool:
        """Whether clients report and the server averages as in FedAvg, so that a method may do this in a way of its own."""
        return type(self).report is FedAvg.report and type(self).server is FedAvg.server

    @property
    def called(self) -> str:
        """Its name in a job."""
        known = {kind: name for name, kind in NAMES.items()}
        return known.get(type(self), f"{type(self).__module__}:{type(self).__qualname__}")

    def at(self, rate: LocalOptimizer) -> FedAvg:
        """The aggregation of a round whose local optimiser is `rate`."""
        return self

    def init_memory(self, shared: Tree) -> Tree:
        """The server's memory before the first round, for a first broadcast `shared`."""
        return {}

    def shared(self, memory: Tree, shared: Tree) -> Tree:
        """The broadcast: `shared`, and what clients need of the memory."""
        return shared

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        """What a client keeps for its next visit, before its first one."""
        return {}

    def extra(self, sent: ClientInput, state: Tree) -> Tree | None:
        """ "w/NAME" -> tensor to add to the gradient of the loss; None: nothing."""
        return None

    def moved(self, sent: ClientInput, state: Tree, lr: float | Tensor) -> Tree:
        """The state, corrected after a step of the local optimiser; `state` may be overwritten. `lr`: the rate of the round."""
        return state

    def report(self, sent: ClientInput, state: Tree) -> Report:
        """What a client adds to the total: n · w, n · running statistics, and n under "n/images", all float64."""
        return Report(tree.weigh(sent.n, under(state, keys.WEIGHTS, keys.BUFFERS)) | {COUNT: sent.n.double()})

    def server(self, memory: Tree, shared: Tree, total: Tree, setting: Setting) -> tuple[Tree, Tree]:
        """(next broadcast, next memory); tensors that no client sent stay as they are."""
        return shared | tree.mean(total, total[COUNT], _sent(shared, total, keys.WEIGHTS, keys.BUFFERS)), memory


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients stay near the broadcast w_t: each adds mu (w - w_t) to its gradient. Li et al., MLSys 2020.

    fedprox_mu: mu, at least 0. The term is over kept weights alone, not over buffers.
    """

    fedprox_mu: float = 0.01

    def extra(self, sent: ClientInput, state: Tree) -> Tree | None:
        """mu (w - w_t); nothing at mu = 0, which is then FedAvg to the bit."""
        if self.fedprox_mu == 0:
            return None
        return tree.each(lambda w, broadcast: self.fedprox_mu * (w - broadcast), _sent(state, sent.shared, keys.WEIGHTS), sent.shared)


@dataclass(frozen=True)
class FedNova(FedAvg):
    """w <- w - (sum_k p_k a_k) · sum_k p_k (w - w_k) / a_k: a client with more steps has no more weight; running statistics by p_k.

    Where all clients take equally many steps it is FedAvg. Momentum that is carried from round to round counts as if it began at 0.
    """

    sgd: ClassVar[bool] = True

    momentum: float  # rho
    fednova_weights: str = "samples"  # p_k: by images; batches: by the client's local steps, as the authors' code

    def at(self, rate: LocalOptimizer) -> FedNova:
        return replace(self, momentum=rate.momentum)

    def path(self, steps: Tensor) -> Tensor:
        """a_k = (tau_k - rho (1 - rho^tau_k) / (1 - rho)) / (1 - rho), (); tau_k itself without momentum."""
        tau, rho = steps.double(), self.momentum
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)

    def report(self, sent: ClientInput, state: Tree) -> Report:
        """p · d with d = (w - w_k) / a, p · running statistics, p · a, p and n; p is the number of images or of local steps."""
        weight, path = sent.steps[0] if self.fednova_weights == "batches" else sent.n, self.path(sent.steps[0])
        found = tree.weigh(weight, under(state, keys.BUFFERS)) | tree.weigh(weight / PATH_UNIT, {FEDNOVA_PATH: path})
        move = tree.weigh(weight / path, _path(sent, state))
        return Report(found | renamed(move, keys.WEIGHTS, FEDNOVA_MOVE) | {FEDNOVA_WEIGHT: weight.double(), COUNT: sent.n.double()})

    def server(self, memory: Tree, shared: Tree, total: Tree, setting: Setting) -> tuple[Tree, Tree]:
        buffers = tree.mean(total, total[FEDNOVA_WEIGHT], _sent(shared, total, keys.BUFFERS))
        moves, length = (
            renamed(total, FEDNOVA_MOVE, keys.WEIGHTS),
            PATH_UNIT * total[FEDNOVA_PATH] / total[FEDNOVA_WEIGHT],
        )  # of the mean path
        before = masks.apply(_sent(shared, moves, keys.WEIGHTS), shared)
        after = tree.each(lambda w, move: (w.double() - length * move / total[FEDNOVA_WEIGHT]).to(w.dtype), before, moves)
        return shared | buffers | after, memory


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg whose clients step by c - c_k as well, outside of the momentum; c_k is what their steps were without that.

    Steps that a method takes at a rate of its own (FedMef's extrusion) count as taken at the round's. Controls begin at 0, of
    parameters alone; those of pruned weights are 0, and 0 again when a weight grows back: c is the mean of all clients' c_k. A client
    that was away sets its own to 0 on its next visit, where weights were pruned meanwhile.
    """

    sgd: ClassVar[bool] = True

    lr: float = field(repr=False)  # of the round; as a Work's own rate it is no part of what a program is made for

    def at(self, rate: LocalOptimizer) -> Scaffold:
        return replace(self, lr=rate.lr)

    def init_memory(self, shared: Tree) -> Tree:
        return renamed(tree.zeros(under(shared, keys.WEIGHTS)), keys.WEIGHTS, SCAFFOLD_CONTROL)

    def shared(self, memory: Tree, shared: Tree) -> Tree:
        return shared | masks.apply(under(memory, SCAFFOLD_CONTROL), shared) | _kept_since(memory, shared)

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        controls = under(sent.shared, SCAFFOLD_CONTROL)
        if not controls:
            raise ValueError("the broadcast has no control variates for SCAFFOLD: send aggregate.shared(memory, shared)")
        never = {SCAFFOLD_VISIT: torch.zeros_like(sent.shared[SCAFFOLD_TURN])} if SCAFFOLD_TURN in sent.shared else {}
        return renamed(tree.zeros(controls), SCAFFOLD_CONTROL, SCAFFOLD_OWN) | never

    def moved(self, sent: ClientInput, state: Tree, lr: float | Tensor) -> Tree:
        """w - lr (c - c_k), in place, after every local step."""
        c, own = self._controls(sent)
        for key, value in c.items():
            state[key].sub_(lr * (value - own[key]))
        return state

    def report(self, sent: ClientInput, state: Tree) -> Report:
        """FedAvg's, and c_k' - c_k; kept: c_k' = c_k - c + (w - w_k) / (tau_k lr). Where the rate is 0 nothing is learned."""
        c, own = self._controls(sent)
        later = own
        if self.lr:
            way, move = sent.steps[0].double() * self.lr, _path(sent, state)
            later = tree.each(lambda mine, c, moved: (mine.double() - c + moved / way).to(c.dtype), own, c, move)
        change = tree.each(lambda new, old: new.double() - old.double(), later, own)
        total = super().report(sent, state).total | renamed(change, keys.WEIGHTS, SCAFFOLD_CHANGE)
        visit = {SCAFFOLD_VISIT: sent.shared[SCAFFOLD_TURN]} if SCAFFOLD_TURN in sent.shared else {}
        return Report(total, keep=renamed(later, keys.WEIGHTS, SCAFFOLD_OWN) | visit)

    def server(self, memory: Tree, shared: Tree, total: Tree, setting: Setting) -> tuple[Tree, Tree]:
        """FedAvg's; c <- c + sum_k (c_k' - c_k) / K over the cohort, K all clients."""
        memory = memory | _kept_since(memory, shared)
        if SCAFFOLD_TURN in memory:
            memory[SCAFFOLD_TURN] = memory[SCAFFOLD_TURN] + 1
        shared, _ = super().server(memory, shared, total, setting)
        changes = renamed(total, SCAFFOLD_CHANGE, SCAFFOLD_CONTROL)
        averaged = tree.each(
            lambda c, change: (c.double() + change / setting.clients).to(c.dtype), _sent(memory, changes, SCAFFOLD_CONTROL), changes
        )
        return shared, masks.apply(memory | averaged, shared)

    def _controls(self, sent: ClientInput) -> tuple[Tree, Tree]:
        """c and c_k by their weights' keys, masked. c_k is 0 where a weight was pruned since the client's last visit, also if it is
        kept again, and everywhere if its shapes differ: channels were cut since."""
        held = sent.tree({})
        c, own = (
            masks.apply(renamed(part, slot, keys.WEIGHTS), held)
            for part, slot in ((sent.shared, SCAFFOLD_CONTROL), (sent.kept, SCAFFOLD_OWN))
        )
        fits = all(own[key].shape == value.shape for key, value in c.items())
        if not fits:
            return c, tree.zeros(c)
        since = renamed(sent.shared, SCAFFOLD_SINCE, keys.WEIGHTS)
        return c, {key: value * (since[key] <= sent.kept[SCAFFOLD_VISIT]) if key in since else value for key, value in own.items()}


def _kept_since(memory: Tree, shared: Tree) -> Tree:
    """Since which turn each masked weight is kept, and which turn it is; nothing without masks."""
    turn, found = memory.get(SCAFFOLD_TURN, torch.tensor(0)), {}
    for key, mask in under(shared, keys.MASKS).items():
        since = SCAFFOLD_SINCE + keys.name_of(key)
        before = memory.get(since, torch.zeros_like(mask, dtype=torch.int32))
        found[since] = torch.where(mask, torch.where(before < 0, turn.to(before), before), -1)
    return found | {SCAFFOLD_TURN: turn} if found else {}


def _sent(shared: Tree, total: Tree, *prefixes: str) -> Tree:
    """The tensors of `shared` under the prefixes whose keys are in `total` too."""
    return {key: value for key, value in under(shared, *prefixes).items() if key in total}


def _path(sent: ClientInput, state: Tree) -> Tree:
    """w - w_k in float64, from the weights as the client used them at first; 0 where they are pruned."""
    held = sent.tree({})
    before = masks.apply({key: held[key] for key in under(state, keys.WEIGHTS)}, held)
    return tree.each(lambda w, trained: w.double() - trained.double(), before, state)


NAMES: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fednova": FedNova, "scaffold": Scaffold}


def find(name: str) -> type[FedAvg]:
    """The aggregation of this name, or of the user's own, "package.module:Class". BadInput says what there is, or what the class lacks."""
    if name in NAMES:
        return NAMES[name]
    if ":" not in name:
        raise entry_points.unknown("[train] aggregate", name, NAMES, '; or "package.module:Class"')
    kind = entry_points.own(name, "[train] aggregate")
    frozen = "__dataclass_params__" in vars(kind) and vars(kind)["__dataclass_params__"].frozen  # its own, not its parent's
    parent = isinstance(kind, type) and issubclass(kind, FedAvg)
    needed = {"@dataclass(frozen=True)": frozen, "the base class fedsim.FedAvg": parent}
    if lacking := [what for what, has in needed.items() if not has]:
        raise BadInput(f"[train] aggregate = {name!r} is not an aggregation: it lacks {', '.join(lacking)}")
    return cast("type[FedAvg]", kind)
