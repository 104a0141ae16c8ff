"""Aggregation: how averaged weights become the next model, chosen by `train.aggregate` for every method that averages weights.

FedAvg: McMahan et al., AISTATS 2017: w <- sum_k n_k w_k / sum_k n_k over the cohort, running statistics of norms alike.
FedProx: Li et al., MLSys 2020: the same server; the local loss gains mu/2 · |w - w_t|^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim import tree
from fedsim.core import Report, Sent, Setting
from fedsim.tree import Tree, under

if TYPE_CHECKING:
    from fedsim.net import Net

COUNT = "n/images"  # the total that weighted sums are divided by


@dataclass(frozen=True)
class FedAvg:
    """The mean of the cohort's weights, by number of images."""

    def begin(self, shared: Tree) -> Tree:
        """The server's memory."""
        return {}

    def shared(self, memory: Tree, shared: Tree) -> Tree:
        """What is added to the broadcast."""
        return shared

    def fresh(self, net: Net, sent: Sent) -> Tree:
        """Kept state of a client never visited."""
        return {}

    def extra(self, sent: Sent, state: Tree) -> Tree | None:
        """A gradient to add to the loss's."""
        return None

    def report(self, sent: Sent, state: Tree) -> Report:
        """n · w and n · running statistics, and n."""
        return Report(tree.weigh(sent.n, under(state, "w/", "buf/")) | {COUNT: sent.n.double()})

    def server(self, memory: Tree, shared: Tree, total: Tree, setting: Setting) -> tuple[Tree, Tree]:
        """The next broadcast and memory."""
        return shared | tree.mean(total, total[COUNT], under(shared, "w/", "buf/")), memory


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients are held near the broadcast: gradient + mu (w - w_t) over the kept weights, not over buffers."""

    mu: float = 0.01

    def extra(self, sent: Sent, state: Tree) -> Tree | None:
        """mu (w - w_t); nothing at mu = 0, which is then FedAvg to the bit."""
        if self.mu == 0:
            return None
        return tree.each(lambda w, broadcast: self.mu * (w - broadcast), under(state, "w/"), sent.shared)


NAMES = {"fedavg": FedAvg, "fedprox": FedProx}
