"""The server's side of co-training: gates for a cohort, and how the hypernetworks learn from it, on the server or on the clients.

Shapes: K clients of a cohort, n gates of the whole network, n' <= n of what a cut has left. Every draw is a function of (seed,
round, step, client, kind), so that server and clients, and any number of ranks, draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil

import torch
from torch import Tensor

from fedsim.core import keys, rng, tree
from fedsim.core.keys import COUNT, EMBEDDING, GATE, GATE_GRADIENT, GRADIENTS
from fedsim.core.tree import Tree
from fedsim.core.types import Feed
from fedsim.costs import profile
from fedsim.costs.server import ServerBill
from fedsim.errors import BadInput
from fedsim.federated.protocol import Fleet
from fedsim.pruning import hypernet_training
from fedsim.pruning.flops_constraint import FlopsConstraint
from fedsim.pruning.gated_training import GateGradient, HypernetStep
from fedsim.pruning.hypernet_training import HypernetTraining, Table

BLOCK = 4096  # clients whose gates are worked out at once
BACKWARD, FORWARD_AND_BACKWARD = 2, 3  # FLOPs, in forward passes


def reachable(flops: FlopsConstraint, name: str, share: float) -> None:
    """BadInput for a FLOPs share that cannot be met."""
    if not flops.least <= share <= 1:
        least = f"{ceil(flops.least * 10_000) / 10_000:.4f}"  # rounded up, since a little less cannot be reached
        raise BadInput(
            f"[method] {name} = {share} cannot be reached: with one channel left in every group the model still has {least} of its FLOPs;"
            f" choose {least} to 1"
        )


@dataclass(frozen=True)
class GateState:
    """The server's state of gates: both hypernetworks, the clients' embeddings, and the channels that the cut has left."""

    hyper: Tree  # theta_b and theta_d with AdamW's moments
    table: Table  # embeddings of the clients ever visited, with theirs
    base: Tensor  # (n,) bool, what the cut has left; all ones before it
    cut: bool = False


@dataclass(frozen=True)
class GateController:
    """How gates are chosen and learned."""

    rule: HypernetTraining
    seed: int
    targets: tuple[float, ...]  # p_d, one for all clients or one for each
    personal: bool
    lr: float
    decay: float
    sample: bool  # gates in use are hard draws; false: mean noise
    averaged: bool  # with clients that train copies, the table is averaged too
    server: ServerBill = field(default_factory=ServerBill)  # for the hypernetworks that the server runs

    def begin(self) -> GateState:
        return GateState(self.rule.fresh(self.seed, self.personal), Table.empty(), torch.ones(self.rule.flops.n, dtype=torch.bool))

    def check(self, clients: int) -> None:
        """BadInput for budgets that cannot be met."""
        targets = self.targets
        if len(targets) not in (1, clients):
            raise BadInput(f"[method] client_flops_share has {len(targets)} shares for {clients:,} clients: one for all, or one for each")
        for name, share in (("flops_share", self.rule.keep), *(("client_flops_share", share) for share in targets if self.personal)):
            reachable(self.rule.flops, name, share)
        if self.personal and max(targets) > self.rule.keep:
            raise BadInput(
                f"[method] client_flops_share = {max(targets)}: a client uses part of the base, which keeps {self.rule.keep} of the FLOPs"
            )

    # ---- gates

    def base(self, masks: GateState) -> Tensor:
        """(n,) bool v: the base in use, after the cut what is left of it."""
        if masks.cut:
            return masks.base
        o = self.rule.base(masks.hyper, self.rule.z(self.seed))
        self._charge(1)
        return self.rule.hard(o, None, rng.key(self.seed, "base in use")) if self.sample else self.rule.mean(o)

    def choices(self, masks: GateState, clients: Sequence[int]) -> Tensor:
        """(K, n) bool m_i in use, inside of the base."""
        base, parts = self.base(masks), []
        for begin in range(0, len(clients), BLOCK):
            block = list(clients[begin : begin + BLOCK])
            o = self.rule.choice(masks.hyper, self._rows(masks, block)[EMBEDDING])
            assert o is not None
            self._charge(len(block))
            draw_keys = rng.key(self.seed, "gates in use", torch.tensor(block))
            parts.append(self.rule.hard(None, o, draw_keys, base) if self.sample else self.rule.mean(o, base))
        return torch.cat(parts)

    def shares(self, masks: GateState, clients: Sequence[int]) -> dict[str, float]:
        """T / T_tot of the base in use, and the mean of the clients'; for the record alone, and so on no bill."""
        share = self.rule.flops.share
        with self.server.untouched():
            mine = {"client_flops_share": float(share(self.choices(masks, clients)).mean())} if self.personal else {}
            return {"base_flops_share": float(share(self.base(masks)))} | mine

    def steps(self, masks: GateState, clients: Sequence[int], r: int, steps: int) -> Tensor:
        """(K, S, n) bool, independent hard draws of v * u_i for every local step."""
        o, choice = self._logits(masks, clients)
        self._charge(1 + self._rows_of(clients))
        _, draw_keys = self._keys("train", clients, r)
        draw_keys = rng.fold(draw_keys.unsqueeze(1), torch.arange(steps))  # (K, S)
        return self.rule.hard(o, None if choice is None else choice.unsqueeze(1), draw_keys)

    def soft(self, masks: GateState, clients: Sequence[int], r: int) -> Tensor:
        """(K, n) soft u_i, to train under and learn from after the cut."""
        choice, (_, draw_keys) = self.rule.choice(masks.hyper, self._rows(masks, clients)[EMBEDDING]), self._keys("finetune", clients, r)
        assert choice is not None
        self._charge(len(clients))
        return self.rule.soft_choice(choice, draw_keys)

    # ---- learning

    def step_on_server(
        self, masks: GateState, fleet: Fleet, shared: Tree, clients: Sequence[int], when: tuple[int, int], feed: Feed, lr: float
    ) -> GateState:
        """After one step: clients report d_i, how their losses change with their soft gates. `lr` of the base, `when` round and step."""
        o, choice = self._logits(masks, clients)
        self._charge(FORWARD_AND_BACKWARD * (1 + self._rows_of(clients)))
        key, draw_keys = self._keys("learn", clients, *when)
        reply = fleet.run(GateGradient((feed,)), clients, shared, {GATE: self.rule.soft(o, choice, draw_keys)})
        clients = reply.clients or clients  # some may not have answered
        draw_keys = self._keys("learn", clients, *when)[1]
        d, z, targets = reply.each[GATE_GRADIENT].cpu(), self.rule.z(self.seed), self._targets(clients)
        return self._stepped(masks, clients, partial(self.rule.loss, z=z, draw_keys=draw_keys, key=key, targets=targets, d=d), lr)

    def step_on_clients(
        self, masks: GateState, fleet: Fleet, shared: Tree, clients: Sequence[int], when: tuple[int, int], feed: Feed, lr: float
    ) -> GateState:
        """After one step of every client's own copy, averaged."""
        key, draw_keys = self._keys("learn", clients, *when)
        rows = self._rows(masks, clients) if self.personal else {}
        own = {keys.SEED_KEYS: draw_keys, keys.TARGET: self._targets(clients)} | hypernet_training.sent_row(rows)
        sent = shared | masks.hyper | {keys.SEED_DRAW: self.rule.z(self.seed), keys.SEED_BASE: key}
        beside = profile.VALUE_BYTES * (tree.size(masks.hyper) + tree.size(tree.under(masks.hyper, keys.WEIGHTS)))
        spent = FORWARD_AND_BACKWARD * (1 + bool(rows)) * self.rule.forward_flops
        reply = fleet.run(HypernetStep((feed,), self.rule, lr, self.lr, self.decay, beside, spent), clients, sent, own)
        clients = reply.clients or clients  # some may not have answered
        rows = self._rows(masks, clients) if self.personal else {}
        total, every = (tree.each(lambda value: value.cpu(), part) for part in (reply.total, reply.each))
        hyper, mine = tree.mean(total | tree.renamed(total, GRADIENTS, ""), total[COUNT], masks.hyper), hypernet_training.apart(every)[1]
        if self.averaged:
            moved = tree.each(lambda new, old: old + (new - old) / len(clients), tree.under(mine, keys.WEIGHTS, keys.OPTIMISER), rows)
            mine = mine | moved
        return replace(masks, hyper=hyper, table=masks.table.put(clients, mine) if rows else masks.table)

    def step_in_finetuning(self, masks: GateState, clients: Sequence[int], r: int, d: Tensor) -> GateState:
        """After one step on the d (K, n') of soft gates that the weights were trained under, after the cut. `soft` was the forward pass."""
        self._charge(BACKWARD * len(clients))
        full = d.cpu().new_zeros(len(clients), self.rule.flops.n).index_copy(1, masks.base.nonzero().flatten(), d.cpu())
        draw_keys, targets = self._keys("finetune", clients, r)[1], self._targets(clients)
        return self._stepped(
            masks, clients, partial(self.rule.loss_within, within=masks.base, draw_keys=draw_keys, targets=targets, d=full), 0.0
        )

    def _stepped(self, masks: GateState, clients: Sequence[int], loss: Callable[[Tree], Tensor], lr: float) -> GateState:
        rows = self._rows(masks, clients) if self.personal else {}
        hyper, rows = hypernet_training.step(
            masks.hyper, rows, hypernet_training.gradient(loss, masks.hyper, rows), lr, self.lr, self.decay
        )
        return replace(masks, hyper=hyper, table=masks.table.put(clients, rows) if rows else masks.table)

    def _charge(self, passes: int) -> None:
        """Forward passes of a hypernetwork for one input; a backward pass costs BACKWARD of them."""
        self.server.charge("hypernetworks", passes * self.rule.forward_flops)

    def _rows_of(self, clients: Sequence[int]) -> int:
        """Inputs of the clients' hypernetwork."""
        return len(clients) if self.personal else 0

    def _logits(self, masks: GateState, clients: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rows = self._rows(masks, clients) if self.personal else {}
        return self.rule.base(masks.hyper, self.rule.z(self.seed)), self.rule.choice(masks.hyper, rows.get(EMBEDDING))

    def _rows(self, masks: GateState, clients: Sequence[int]) -> Tree:
        return masks.table.of(clients, self.rule.embeddings(self.seed, torch.tensor(clients)))

    def _keys(self, purpose: str, clients: Sequence[int], *when: int) -> tuple[Tensor, Tensor]:
        """A key for all, and one for each client (K,)."""
        key = rng.key(self.seed, purpose, *when)
        return key, rng.fold(key, torch.tensor(clients))

    def _targets(self, clients: Sequence[int]) -> Tensor:
        """(K,) p_i."""
        return torch.tensor([self.targets[client if len(self.targets) > 1 else 0] for client in clients])
