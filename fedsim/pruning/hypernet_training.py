"""Co-training of gates: how two hypernetworks draw them for a cohort, and what their parameters learn from (specs: DWFNP, 3.3 to 3.9).

Symbols as in the paper: v the base's gates, u_i a client's choice, m_i = v * u_i what it uses, o logits, theta_b and theta_d the two
hypernetworks' parameters ("w/base/…", "w/client/…"), e_i embeddings ("w/embedding", a row a client), z the base's fixed input.
The same functions serve a server with K clients and a client that is alone with its hypernetworks (K = 1), on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import keys, rng
from fedsim.core.keys import EMBEDDING, VISITS
from fedsim.core.tree import Tree, renamed, row, stack, under, zeros
from fedsim.nn import optim
from fedsim.pruning import gates, hypernetwork
from fedsim.pruning.flops_constraint import FlopsConstraint, regulariser

EFFECTIVE = 2.0  # the loss takes twice the regulariser


@dataclass(frozen=True)
class HypernetTraining:
    """Plain numbers, so that a Work may hold it."""

    flops: FlopsConstraint
    tau: float = 0.4  # Gumbel temperature
    bias: float = 3.0  # b, added to every logit
    keep: float = 0.8  # p, FLOPs share of the base
    slope: float = 1.0  # s, of the regulariser below its target
    two_sided: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        return self.flops.widths

    @property
    def forward_flops(self) -> int:
        """Of one hypernetwork, either one, for one input."""
        return hypernetwork.flops(self.widths)

    # ---- parameters

    def fresh(self, seed: int, personal: bool = True) -> Tree:
        """Both hypernetworks (the base alone where nothing is personal) before their first AdamW step."""
        base = hypernetwork.fresh(self.widths, rng.key(seed, "base hypernetwork"), normalised=True)
        client = hypernetwork.fresh(self.widths, rng.key(seed, "client hypernetwork"), normalised=False) if personal else {}
        w = {keys.BASE_NETWORK + name: value for name, value in base.items()} | {
            keys.CLIENT_NETWORK + name: value for name, value in client.items()
        }
        return _begun(w, torch.zeros((), dtype=torch.float64))

    def z(self, seed: int) -> Tensor:
        """(64 L,) the base's input."""
        return hypernetwork.orthogonal(len(self.widths), rng.key(seed, "z"))

    def embeddings(self, seed: int, clients: Tensor) -> Tree:
        """(K, 64 L) first embeddings, and their rows of AdamW."""
        e = hypernetwork.embedding(len(self.widths), rng.key(seed, "embedding", clients))
        return _begun({EMBEDDING: e}, torch.zeros(len(clients), 1, dtype=torch.float64))

    # ---- gates

    def base(self, hyper: Tree, z: Tensor) -> Tensor:
        """(n,) logits of v."""
        return hypernetwork.logits(renamed(hyper, keys.BASE_NETWORK, ""), z, self.widths)

    def choice(self, hyper: Tree, e: Tensor | None) -> Tensor | None:
        """(K, n) logits of u_i; None where nothing is personal."""
        return None if e is None else hypernetwork.logits(renamed(hyper, keys.CLIENT_NETWORK, ""), e, self.widths)

    def _drawn(self, o: Tensor, draw_keys: Tensor, kind: str) -> Tensor:
        """(…, n) soft draws, one for each key."""
        return gates.soft(o, gates.gumbel(rng.fold(draw_keys, kind), self.flops.n).to(o.dtype), self.tau, self.bias)

    def soft(self, o: Tensor, choice: Tensor | None, draw_keys: Tensor) -> Tensor:
        """(K, n) m_i = v * merge(v, u_i), soft and differentiable; draw_keys (K,)."""
        v = self._drawn(o, draw_keys, "v")
        return v if choice is None else v * gates.merge(v, self._drawn(choice, draw_keys, "u"))

    def hard(self, o: Tensor | None, choice: Tensor | None, draw_keys: Tensor, within: Tensor | None = None) -> Tensor:
        """(…, n) bool m_i = v * u_i for draw_keys (…); within (n,): the base after its cut, in the place of a drawn v."""
        y = None if o is None else self._drawn(o, draw_keys, "v")
        v = within if y is None else gates.never_empty(y >= 0.5, y, self.widths)
        if choice is None:
            assert v is not None, "either a base or a choice is drawn"
            return v
        u = self._drawn(choice, draw_keys, "u")
        return gates.never_empty(u >= 0.5, u, self.widths, v)

    def soft_choice(self, choice: Tensor, draw_keys: Tensor) -> Tensor:
        """(K, n) soft u_i alone, for a base that is cut."""
        return self._drawn(choice, draw_keys, "u")

    def mean(self, o: Tensor, within: Tensor | None = None) -> Tensor:
        """(…, n) bool mean-noise gates."""
        return gates.mean(o, self.bias, self.widths, within)

    # ---- learning

    def penalty(self, gate: Tensor, target: Tensor | float) -> Tensor:
        """(…,) 2 R(T(m) / T_tot, target)."""
        return EFFECTIVE * regulariser(self.flops.share(gate), target, self.slope, two_sided=self.two_sided)

    def loss(self, w: Tree, z: Tensor, draw_keys: Tensor, key: Tensor, targets: Tensor, d: Tensor) -> Tensor:
        """mean_i <d_i, m_i> + 2 R(T(v'), p) + mean_i 2 R(T(sg(v'') * merge(v'', u''_i)), p_i), before the cut.

        d (K, n) gradients of the clients' losses at the soft gates of the same `draw_keys` (K,); targets (K,) p_i; key () of v'.
        """
        o, choice = self.base(w, z), self.choice(w, w.get(EMBEDDING))
        loss = (d * self.soft(o, choice, draw_keys)).sum(-1).mean()
        v = gates.straight(self._drawn(o, key, "base"), self.widths)
        loss = loss + self.penalty(v, self.keep)
        if choice is None:
            return loss
        y = self._drawn(o, draw_keys, "base of client").detach()
        held = gates.never_empty(y >= 0.5, y, self.widths)
        u = gates.straight(self._drawn(choice, draw_keys, "client"), self.widths, held)
        return loss + self.penalty(held * gates.merge(held.to(u.dtype), u), targets).mean()

    def loss_within(self, w: Tree, within: Tensor, draw_keys: Tensor, targets: Tensor, d: Tensor) -> Tensor:
        """mean_i <d_i, u_i> + mean_i 2 R(T(v * u'_i), p_i), after the cut to v = `within` (n,); d is 0 outside of it."""
        choice = self.choice(w, w.get(EMBEDDING))
        assert choice is not None, "only clients' gates learn after the cut"
        loss = (d * self.soft_choice(choice, draw_keys)).sum(-1).mean()
        u = gates.straight(self._drawn(choice, draw_keys, "client"), self.widths, within)
        return loss + self.penalty(within * u, targets).mean()


def gradient(loss: Callable[[Tree], Tensor], hyper: Tree, rows: Tree) -> Tree:
    """Of `loss(w)` in both hypernetworks, and in every client's embedding by its own terms: without the mean's 1 / K."""
    w = under(hyper, keys.WEIGHTS) | under(rows, keys.WEIGHTS)
    found: Tree = torch.func.grad(loss)(w)
    if EMBEDDING in found:
        found[EMBEDDING] = found[EMBEDDING] * len(found[EMBEDDING])
    return found


def step(hyper: Tree, rows: Tree, found: Tree, lr_base: float, lr_client: float, decay: float) -> tuple[Tree, Tree]:
    """Both after one step of AdamW along `found`; nothing is overwritten."""
    hyper, rows = (_copied(part) for part in (hyper, rows))
    base, client = under(found, keys.BASE_NETWORK), under(found, keys.CLIENT_NETWORK)
    stepped = optim.adam(hyper, base, lr_base, decay, decoupled=True)
    optim.adam(hyper, client, lr_client, decay, decoupled=True)
    if EMBEDDING not in found:
        return stepped, rows
    return stepped, optim.adam(rows, {EMBEDDING: found[EMBEDDING]}, lr_client, decay, decoupled=True)


def apart(held: Tree) -> tuple[Tree, Tree]:
    """Both hypernetworks with their moments, and a client's embedding with its own, of a tree that may hold a model besides."""
    hyper = {key: value for key, value in held.items() if "/base/" in key or "/client/" in key or key == keys.ADAM_STEPS}
    mine = {key: value for key, value in held.items() if key.endswith("/embedding")}
    return hyper, mine | ({keys.ADAM_STEPS: held[VISITS]} if VISITS in held else {})


def sent_row(mine: Tree) -> Tree:
    """An embedding with its moments, as it travels beside the hypernetworks: its steps have a name of their own."""
    return {VISITS if key == keys.ADAM_STEPS else key: value for key, value in mine.items()}


def _begun(w: Tree, steps: Tensor) -> Tree:
    """Parameters and the state of an Adam that has taken no step."""
    return (
        w
        | renamed(zeros(w), keys.WEIGHTS, keys.FIRST_MOMENT)
        | renamed(zeros(w), keys.WEIGHTS, keys.SECOND_MOMENT)
        | {keys.ADAM_STEPS: steps}
    )


def _copied(tree: Tree) -> Tree:
    return {key: value.clone() for key, value in tree.items()}


@dataclass(frozen=True)
class Table:
    """A row for every client that was ever visited: memory grows with the visits, not with the population."""

    clients: Tensor  # (V,) rising
    rows: Tree  # (V, …)

    @classmethod
    def empty(cls) -> Table:
        return cls(torch.zeros(0, dtype=torch.int64), {})

    def of(self, clients: Sequence[int], fresh: Tree) -> Tree:
        """(K, …) the clients' rows; those of `fresh` (K, …) where a client was never visited."""
        known = {client: i for i, client in enumerate(self.clients.tolist())}
        places = [(known.get(client), i) for i, client in enumerate(clients)]
        return stack(row(fresh, i) if old is None else row(self.rows, old) for old, i in places) if clients else fresh

    def put(self, clients: Sequence[int], rows: Tree) -> Table:
        """The table with these rows in it."""
        new = dict(zip(clients, range(len(clients)), strict=True))
        old = {client: i for i, client in enumerate(self.clients.tolist()) if client not in new}
        every = sorted([*new, *old])
        return Table(torch.tensor(every), stack(row(rows, new[k]) if k in new else row(self.rows, old[k]) for k in every))
