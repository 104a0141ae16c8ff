"""LotteryFL: Li et al., SEC 2021, arXiv:2008.03371. Each client prunes a mask of its own, step by step, and rewinds to the first weights.

Paper -> code:  m_k -> mask/NAME (kept by client k),  r_k -> rates, by n/prunes,  r_target -> target,  a_thr -> threshold,  p -> prune,
               w0 -> net.initial,  E -> train.epochs,  B -> train.batch,  eta -> train.lr

A client of the cohort measures w * m_k on its held-out images. Where more than a_thr of them are right and r_k is above r_target, it
drops the share p of smallest |w| from every layer's kept weights, lowers r_k to max((1 - p) r_k, r_target), and begins again from w0 * m_k;
then it trains and uploads. The last prune ends at floor(r_target n_l) weights of a layer with n_l, whatever rounding left. The server
averages each weight over the clients that hold it; where none does it keeps its value. Only weights rewind: running statistics stay those
of the broadcast. w0 follows from the job's seed and does not travel; a mask travels up, when it has changed.

The authors open the gate by accuracy on test images, and average without weights; here weights = "samples" or "uniform". Accuracy on
the clients' images is that of w * m_k, and accuracy on the global test set that of the server's dense w. `fedsim estimate`, which trains
nobody, cannot know when clients prune: it predicts rounds in which none does, the dearest there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, inf
from typing import Literal

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.keys import CORRECT, COUNT
from fedsim.core.tree import Tree, mean, under, weigh
from fedsim.core.types import Batch, Data, Feed
from fedsim.core.validation import TINY, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.client_work import Loss, Train
from fedsim.federated.protocol import ClientInput, Fleet, Method, Reply, Report, Setting
from fedsim.nn.net import Net
from fedsim.pruning.sparsity import masked_averaging

PRUNES, PRUNED, HELD = "n/prunes", "n/pruned", "n/held"  # of a client in all its visits, in this one; its held-out images
MEASURE = Loss(())


@dataclass(frozen=True)
class PruneRewindTrain(Train):
    """Feed 0 measures the client's masked model on held-out images, feed 1 trains it, pruned and rewound where it was accurate enough."""

    threshold: float = 0.0  # a_thr
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # layer -> kept weights after 0, 1, … prunes
    alike: bool = False  # whether all clients count alike in the mean

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        ones = {keys.mask(layer): torch.ones_like(net.initial[keys.weight(layer)], dtype=torch.bool) for layer in self.counts}
        return super().init_kept(net, sent) | ones | {PRUNES: torch.zeros_like(sent.n)}

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        mine = under(sent.kept, keys.MASKS) | {PRUNES: sent.kept[PRUNES]}
        return super().init_state(net, sent) | mine | MEASURE.init_state(net, sent)

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        if batch.feed:
            return super().step(net, sent, state, batch)
        sums, loss = MEASURE.step(net, sent, {key: state[key] for key in (keys.LOSS_SUM, CORRECT, COUNT)}, batch)
        return state | sums, loss

    def begin_feed(self, net: Net, sent: ClientInput, state: Tree, feed: int) -> Tree:
        if feed == 0:
            return state
        last = max(len(after) for after in self.counts.values()) - 1
        prunes = (state[CORRECT] > self.threshold * state[COUNT]) & (state[PRUNES] < last)
        done = state[PRUNES] + prunes
        held, mine = sent.tree(state), {}
        for layer, after in self.counts.items():
            k = torch.tensor(after, device=done.device).gather(0, done.view(1)).view(())
            mine[keys.mask(layer)] = masks.largest_kept(held[keys.weight(layer)], held[keys.mask(layer)], k)
        rewound = masks.apply({key: net.initial[key] for key in under(state, keys.WEIGHTS)}, mine)
        w = {key: torch.where(prunes, value, state[key]) for key, value in rewound.items()}
        return state | w | mine | {PRUNES: done}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        weight, mine = torch.ones_like(sent.n) if self.alike else sent.n, under(state, keys.MASKS)
        total = weigh(weight, under(state, keys.WEIGHTS, keys.BUFFERS)) | {COUNT: weight.double()}
        seen = {CORRECT: state[CORRECT], HELD: state[COUNT], PRUNED: (state[PRUNES] - sent.kept[PRUNES]).double()}
        return Report(total | seen, each=mine | {COUNT: weight}, keep=mine | {PRUNES: state[PRUNES]})


@dataclass(frozen=True)
class LotteryFL(Method[AveragedState]):
    """Clients train a dense model of the server under masks of their own, which they prune where accuracy allows it."""

    target: float = 0.1  # r_target, kept share of each masked layer's weights that a client ends with; the authors' CIFAR-10: 0.5
    threshold: float = 0.2  # a_thr, share of its held-out images that a client must exceed to prune; above 1: never
    prune: float = 0.2  # p, share of a layer's kept weights that one prune drops
    weights: Literal["samples", "uniform"] = "samples"  # of clients in the mean: their training images, or all alike (the authors' way)
    mask_first: bool = False  # whether the first layer is pruned as well; false: it stays dense
    mask_classifier: bool = True  # whether the last layer is pruned

    def __post_init__(self) -> None:
        within(self, target=(TINY, 1), threshold=(0, inf), prune=(0.001, 1))

    @property
    def stays(self) -> str:
        return "masks"

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        if not setting.holdout:
            raise BadInput("[partition] holdout = 0: lotteryfl measures models on held-out images; set partition.holdout = 0.2")
        if not setting.aggregate.is_plain_mean:
            name = setting.aggregate.called
            raise BadInput(f'[train] aggregate = "{name}": lotteryfl averages weights over their holders; it needs "fedavg" or "fedprox"')
        if not self._layers(setting.net):
            raise BadInput("[method] lotteryfl finds no layer to prune: set mask_first = true or mask_classifier = true, or a deeper model")
        return AveragedState.begin(setting, setting.net.initial)

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r == 0:
            return state, {}
        train = setting.train.feed()
        feeds = (Feed("held", epochs=1, batch=train.batch, augment=False, cost="forward"), train)
        counts = {layer: kept_after(setting.net.sizes[layer], self.prune, self.target) for layer in self._layers(setting.net)}
        own = {"feeds": feeds, "threshold": self.threshold, "counts": counts, "alike": self.weights == "uniform"}
        work = PruneRewindTrain.at(setting, r, None, **own)
        after, reply = trained(setting, fleet, state, r, work)
        total = reply.total
        columns = {"lr": work.lr, "clients_pruned": float(total[PRUNED]), "client_density": _density(setting.net, reply)}
        if total[HELD] > 0:
            columns["held_accuracy"] = float(total[CORRECT] / total[HELD])
        return replace(after, shared=after.shared | _over_holders(state.shared, reply)), columns

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None

    def _layers(self, net: Net) -> tuple[str, ...]:
        return masked_averaging.masked_layers(net, self.mask_first, self.mask_classifier)


def kept_after(size: int, prune: float, target: float) -> tuple[int, ...]:
    """Kept weights of a layer after 0, 1, … prunes, down to floor(target · size), at least 1.

    >>> kept_after(30, prune=0.2, target=0.5)
    (30, 24, 20, 16, 15)
    """
    least, rate, after = max(1, floor(target * size + 1e-9)), 1.0, [size]
    while rate > target:
        rate = max((1 - prune) * rate, target)
        if rate < target + 1e-9:
            rate = target
        after.append(least if rate == target else max(after[-1] - floor(prune * after[-1] + 1e-9), least))
    return tuple(after)


def _over_holders(before: Tree, reply: Reply) -> Tree:
    """The masked weights, each the mean over the clients that hold it, and as it was where none does."""
    found = {}
    for key, rows in under(reply.each, keys.MASKS).items():
        w, held = keys.weight_of(key), torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
        if w not in reply.total:  # a frozen weight
            continue
        for weight, row in zip(reply.each[COUNT].double(), rows, strict=True):
            held += weight * row
        averaged = mean(reply.total, held.clamp(min=1), {w: before[w]})[w]
        found[w] = torch.where(held > 0, averaged, before[w])
    return found


def _density(net: Net, reply: Reply) -> float:
    """Kept conv and linear weights of a client of the cohort over all of them, the mean."""
    held = under(reply.each, keys.MASKS)
    pruned = sum((~rows.flatten(1)).sum(1).double().mean() for rows in held.values())
    return 1 - float(pruned) / sum(net.sizes.values())
