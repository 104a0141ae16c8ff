"""FedDP: "Heterogeneous Federated Learning using Dynamic Model Pruning and Adaptive Gradient", arXiv:2106.06921 v2, as its code does it.

After each local epoch the weights of convolutions that are not above theta become 0. No mask is kept: they may come back. What is
averaged is dense, and the server prunes nothing. The local rate falls with every epoch, and goes on falling from visit to visit.
(The paper's rule of salient gradients is in no public code, and not here.)

With `filters` it is soft filter pruning (He et al., IJCAI 2018, arXiv:1808.06866) in every client instead: before each local epoch the
filters of smallest L1 norm become 0, and may come back as well.

Paper -> code:  theta -> theta,  lr -> train.lr · decay^epochs,  E -> train.epochs,  1 - nnz / numel -> 1 - conv_density
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.tree import Tree, renamed, size, under
from fedsim.core.types import Batch, Data
from fedsim.core.validation import TINY, within
from fedsim.costs.profile import VALUE_BYTES
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import ClientInput, Fleet, Method, Report, Setting
from fedsim.nn.net import Net

KEPT_OPTIMISER = "own/opt/"  # what the client's optimiser holds, from visit to visit


@dataclass(frozen=True)
class TrainZeroing(Train):
    """Train whose small convolution weights become 0 at the end of each epoch; keep: the epochs so far and the optimiser."""

    theta: float = 0.0
    filters: float = 0.0  # share of every convolution's filters
    lr_decay_per_epoch: float = 1.0  # of the rate, with every epoch

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return super().init_kept(net, sent) | {keys.EPOCHS_DONE: torch.zeros((), device=sent.n.device)}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return super().init_state(net, sent) | renamed(sent.kept, KEPT_OPTIMISER, keys.OPTIMISER)

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        each = batch.T // self.feeds[0].epochs  # steps of an epoch
        state = state | {key: torch.where(batch.t % each == 0, _soft(state[key], self.filters), state[key]) for key in self._weak(net)}
        loss, gradient, buffers, _ = self.gradient(net, sent, state, batch)
        lr = self.lr * self.lr_decay_per_epoch ** (sent.kept[keys.EPOCHS_DONE] + batch.t // each)
        state = self.descend(net, sent, state | buffers, gradient, lr)
        ends, small = (batch.t + 1) % each == 0, {key: state[key].abs() <= self.theta for key in convolutions(net)}
        return state | {key: state[key].masked_fill(ends & where, 0.0) for key, where in small.items()}, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        kept = {keys.EPOCHS_DONE: sent.kept[keys.EPOCHS_DONE] + self.feeds[0].epochs} | renamed(state, keys.OPTIMISER, KEPT_OPTIMISER)
        return replace(report, each=report.each | {keys.NONZERO: nonzero(net, state)}, keep=report.keep | kept)

    def _weak(self, net: Net) -> list[str]:
        return convolutions(net) if self.filters else []


def convolutions(net: Net) -> list[str]:
    """The keys of their weights, but for frozen ones."""
    return [key for name, shape in net.shapes.items() if len(shape) > 2 and (key := keys.weight(name)) not in net.frozen]


def nonzero(net: Net, tree: Tree) -> Tensor:
    """(L,) of every convolution."""
    return torch.stack([(tree[key] != 0).sum() for key in convolutions(net)])


def _soft(w: Tensor, share: float) -> Tensor:
    """w (out, …) with the round(share · out) filters of smallest L1 norm 0; of equal ones the first."""
    weakest = w.abs().flatten(1).sum(1).sort(stable=True).indices[: round(share * len(w))]
    gone = torch.zeros(len(w), dtype=torch.bool, device=w.device).scatter(0, weakest, True)
    return w.masked_fill(gone.view(-1, *[1] * (w.dim() - 1)), 0.0)


@dataclass(frozen=True)
class FedDP(Method[AveragedState]):
    """Zeroes small weights of convolutions after each local epoch."""

    theta: float = 1e-3  # weights of convolutions that are not larger become 0
    filters: float = 0.0  # share of every convolution's filters that becomes 0 before each epoch; with theta = 0: soft filter pruning
    lr_decay_per_epoch: float = 0.99  # of the local rate, with every epoch that the client trains in all its visits

    def __post_init__(self) -> None:
        within(self, theta=(0, inf), filters=(0, 1), lr_decay_per_epoch=(TINY, 1))

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        if setting.train.steps:
            raise BadInput("[train] feddp prunes after each local epoch: set train.epochs = 20, in place of steps")
        if setting.aggregate.sgd and self.lr_decay_per_epoch < 1:
            raise BadInput(
                "[train] feddp lowers the learning rate every epoch, which fednova and scaffold assume constant;"
                ' use aggregate = "fedavg" or "fedprox", or method.lr_decay_per_epoch = 1'
            )
        if not convolutions(setting.net):
            raise BadInput("feddp zeroes weights of convolutions, and this model has none that is trained")
        return AveragedState.begin(setting, setting.net.initial)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return state, {}
        decay = self.lr_decay_per_epoch
        work = TrainZeroing.at(setting, r, theta=self.theta, filters=self.filters, lr_decay_per_epoch=decay)
        after, reply = trained(setting, fleet, state, r, work)
        return after, {"lr": work.lr, **self._zeros(setting.net, state.shared, after.shared, reply.each[keys.NONZERO])}

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None

    def _zeros(self, net: Net, sent: Tree, after: Tree, left: Tensor) -> dict[str, float]:
        """Shares of convolution weights that are not 0, weighted by weights and by layers: of what clients (K, L) and the server end with.

        Beside the dense bytes of the ledger: those of an index and a value for each of them, if they travelled so.
        """
        sizes = torch.tensor([net.sizes[keys.layer_of(key)] for key in convolutions(net)], device=left.device)
        server, down = nonzero(net, after), nonzero(net, sent).sum()
        rest = size(under(sent, keys.WEIGHTS, keys.BUFFERS)) - int(sizes.sum())
        rest_up = rest - sum(sent[key].numel() for key in net.frozen)  # frozen weights are not sent back
        return {
            "client_conv_density": float((left.double().sum(1) / sizes.sum()).mean()),
            "client_conv_density_layers": float((left.double() / sizes).mean()),
            "server_conv_density": float(server.sum() / sizes.sum()),
            "server_conv_density_layers": float((server.double() / sizes).mean()),
            "bytes_up_indexed": float(VALUE_BYTES * (2 * left.sum() + len(left) * rest_up)),
            "bytes_down_indexed": float(VALUE_BYTES * len(left) * (2 * down + rest)),
        }
