"""How images are dealt to clients: each scheme is a function of labels, plain numbers and a generator.

All but the size rules return the owner of each image: (n,) int64 in 0 … N-1, or -1 where a scheme drops images on purpose.
N clients, n images, C classes present. Sources stand at each scheme; the cut, the ties and the repairs are our own.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedsim.data.client_indices import Ints
from fedsim.errors import BadInput

Floats = NDArray[np.float64]
Weights = Ints | Floats


def apportion(total: Ints, weight: Weights, tie: Floats | None = None) -> Ints:
    """(R, M) integers in proportion to each row of `weight` (R, M) that sum to `total` (R,), by largest remainder.

    Equal remainders go to the smaller `tie`, then to the lower column. A row without weight gets nothing. Whole-number weights are
    shared without rounding.
    """
    whole = weight.sum(1, keepdims=True)
    divide: Any = _divided if np.issubdtype(weight.dtype, np.integer) else _divided_floats
    part, remainder = divide(total[:, None], weight, whole)
    rest = np.where(whole[:, 0] > 0, total - part.sum(1), 0)
    order = np.lexsort((np.zeros(weight.shape) if tie is None else tie, -remainder), axis=-1)
    bonus = np.arange(weight.shape[1]) < rest[:, None]
    part[np.arange(len(part))[:, None], order] += bonus
    return part


def _divided(total: Ints, weight: Weights, whole: Weights) -> tuple[Ints, Ints]:
    """total · weight / whole as whole parts and what remains of them, in parts of `whole`."""
    large = int(total.max(initial=0)) * int(weight.max(initial=0)) > np.iinfo(np.int64).max
    product = total.astype(object if large else np.int64) * weight
    divisor = np.maximum(whole, 1)
    return (product // divisor).astype(np.int64), (product % divisor).astype(np.int64)


def _divided_floats(total: Ints, weight: Weights, whole: Weights) -> tuple[Ints, Floats]:
    """total · weight / whole as whole parts and the fractions that remain."""
    exact = np.divide(total * weight, whole, out=np.zeros(weight.shape), where=whole > 0)
    part = np.floor(exact).astype(np.int64)
    return part, exact - part


def equal_sizes(n: int, clients: int) -> Ints:
    """(N,) sizes within 1 of each other; the first n mod N get one more."""
    return n // clients + (np.arange(clients) < n % clients).astype(np.int64)


def dirichlet_sizes(n: int, clients: int, beta: float, rng: Generator) -> Ints:
    """(N,) sizes in proportion to q ~ Dir(beta · 1_N)."""
    return apportion(np.array([n]), _dirichlet(np.full(clients, beta), 1, rng))[0]


def lognormal_sizes(n: int, clients: int, sigma: float, rng: Generator) -> Ints:
    """(N,) sizes in proportion to exp(sigma · z), z standard normal."""
    z = rng.standard_normal(clients)
    return apportion(np.array([n]), np.exp(sigma * (z - z.max()))[None])[0]


def iid(sizes: Ints, rng: Generator) -> Ints:
    """A random permutation cut into parts of the given sizes."""
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def cut(q: Floats, n: int) -> Ints:
    """Sizes of n images cut at floor(cumsum(q) · n); q need not sum to 1, the last share ends at n."""
    edge = np.cumsum(q)
    return np.diff(np.floor(edge / edge[-1] * n).astype(np.int64), prepend=0)


def dirichlet_class(labels: Ints, clients: int, alpha: float, balance: bool, rng: Generator) -> tuple[Ints, Floats]:
    """Class-wise Dirichlet: each class is cut among the clients by q ~ Dir(alpha · 1_N) (as in FedML and NIID-Bench).

    With `balance`, a client that already holds n / N images gets none of the later classes; classes come in the order 0 … C-1.
    Returns the owners and the shares q (C, N) after balancing.
    """
    owner, size, drawn = np.empty_like(labels), np.zeros(clients, np.int64), []
    for c in np.unique(labels):
        member = rng.permutation(np.flatnonzero(labels == c))
        q = _dirichlet(np.full(clients, alpha), 1, rng)[0]
        q = _balanced(q, size < len(labels) / clients) if balance else q
        count = cut(q, len(member))
        owner[member] = np.repeat(np.arange(clients), count)
        size += count
        drawn.append(q)
    return owner, np.stack(drawn)


def dirichlet_client(labels: Ints, sizes: Ints, alpha: float, prior: str, rng: Generator) -> tuple[Ints, Floats]:
    """Client-wise Dirichlet: each client draws its class shares pi_k ~ Dir(alpha · prior) and takes that many, without replacement.

    prior = "shares": the class shares of the data (Hsu et al., arXiv:1909.06335); "ones": 1 for each class. Clients come in
    random order; when a class runs out, the rest comes from the classes still there. Returns the owners and pi (N, C).
    """
    classes, inverse, left = np.unique(labels, return_inverse=True, return_counts=True)
    concentration = alpha * (left / len(labels) if prior == "shares" else np.ones(len(classes)))
    pi = _dirichlet(concentration, len(sizes), rng)
    want = apportion(sizes, pi)
    stock = [rng.permutation(np.flatnonzero(inverse == c)) for c in range(len(classes))]
    owner = np.full_like(labels, -1)
    for k in rng.permutation(len(sizes)):
        got = _taken(want[k], pi[k], left)
        for c in np.flatnonzero(got):
            owner[stock[c][left[c] - got[c] : left[c]]] = k
        left -= got
    return owner, pi


def shards(labels: Ints, clients: int, pieces: int, drop_rest: bool, rng: Generator) -> Ints:
    """Images sorted by label and cut into `pieces`, dealt without replacement (McMahan et al., AISTATS 2017).

    Piece sizes differ by at most 1. With `drop_rest` all pieces are equal, each client gets pieces // N, the rest is dropped.
    """
    order = np.argsort(labels, kind="stable")
    size = np.full(pieces, len(labels) // pieces) if drop_rest else equal_sizes(len(labels), pieces)
    dealt = np.full(pieces, -1)
    dealt[rng.permutation(pieces)[: pieces // clients * clients]] = np.repeat(np.arange(clients), pieces // clients)
    owner = np.full_like(labels, -1)
    owner[order[: size.sum()]] = np.repeat(dealt, size)
    return owner


def class_owners(clients: int, classes: int, per_client: int, rng: Generator) -> NDArray[np.bool_]:
    """(N, C), whether client k owns class c: k mod C and others at random, `per_client` in all (NIID-Bench, "#label")."""
    order = rng.random((clients, classes))
    order[np.arange(clients), np.arange(clients) % classes] = -1
    owns = np.zeros((clients, classes), bool)
    np.put_along_axis(owns, np.argsort(order, axis=1)[:, :per_client], True, axis=1)
    return owns


def classes_per_client(labels: Ints, clients: int, per_client: int, rng: Generator) -> Ints:
    """Each client owns `per_client` classes; a class is split evenly at random among its owners.

    A class without an owner goes to the client with the fewest classes (lowest number on ties).
    """
    present, inverse = np.unique(labels, return_inverse=True)
    owns = class_owners(clients, len(present), per_client, rng)
    for orphan in np.flatnonzero(~owns.any(0)):
        owns[owns.sum(1).argmin(), orphan] = True
    owner = np.empty_like(labels)
    for c in range(len(present)):
        member, holders = rng.permutation(np.flatnonzero(inverse == c)), np.flatnonzero(owns[:, c])
        owner[member] = np.repeat(holders, equal_sizes(len(member), len(holders)))
    return owner


def few_per_class(labels: Ints, clients: int, per_client: int, images: int, rng: Generator) -> Ints:
    """As `classes_per_client`, but with a fixed number of images per class and client (LotteryFL); the others are dropped."""
    present, inverse, count = np.unique(labels, return_inverse=True, return_counts=True)
    owns = class_owners(clients, len(present), per_client, rng)
    owner = np.full_like(labels, -1)
    for c, held in enumerate(count):
        holders = np.flatnonzero(owns[:, c])
        if len(holders) * images > held:
            asked = f"{len(holders)} clients x {images} images of class {present[c]}, which has {held}"
            raise BadInput(f"[partition] few_per_class asks for {asked}: lower images_per_class, clients or classes_per_client")
        owner[rng.permutation(np.flatnonzero(inverse == c))[: len(holders) * images]] = np.repeat(holders, images)
    return owner


def natural(users: Ints, clients: int, least: int, rng: Generator) -> Ints:
    """One client per user, or (clients > 0) users in random order dealt to that many clients. Users with fewer than `least`
    images are merged first, in the order of their numbers.
    """
    _, inverse, count = np.unique(users, return_inverse=True, return_counts=True)
    group = merged(count, least)
    groups = int(group.max()) + 1
    if clients > groups:
        has = f"the data have {groups} users of at least {least} images"
        raise BadInput(f"[partition] clients = {clients}, but {has}; 0 gives one client each")
    seat = np.empty(groups, np.int64)
    seat[rng.permutation(groups) if clients else np.arange(groups)] = np.arange(groups) % (clients or groups)
    return seat[group][inverse]


def merged(count: Ints, least: int) -> Ints:
    """(users,) group of each user, such that every group has at least `least` images (if there are as many)."""
    group, small, total = np.arange(len(count)), -1, 0
    for user in np.flatnonzero(count < least).tolist():
        small = user if small < 0 else small
        group[user] = small
        total += int(count[user])
        if total >= least:
            small, total = -1, 0
    if small >= 0:  # the last merger is still too small: it joins the smallest other group
        size = np.bincount(group, count, minlength=len(count))
        others = np.flatnonzero((size > 0) & (np.arange(len(count)) != small))
        group[group == small] = others[size[others].argmin()] if len(others) else small
    return np.unique(group, return_inverse=True)[1]


def repair(owner: Ints, labels: Ints, clients: int, least: int, rng: Generator) -> int:
    """Move images, in place, until every client has `least`; the number moved, which is the smallest possible.

    While a client has too few, the smallest takes from the largest one image of the largest's most frequent class. Needs
    N · least <= the images dealt: then the giver always has more than `least`, so a receiver never gives.
    """
    held = owner >= 0
    counts = np.zeros((clients, int(labels.max()) + 1), np.int64)
    np.add.at(counts, (owner[held], labels[held]), 1)
    size, moved = counts.sum(1).tolist(), 0
    poor = [(size[k], k) for k in range(clients) if size[k] < least]
    rich = [(-size[k], k) for k in range(clients)]
    heapify(poor)
    heapify(rich)
    pools: dict[tuple[int, int], list[int]] = {}
    while poor:
        (few, k), (many, j) = heappop(poor), heappop(rich)
        c = int(counts[j].argmax())
        if (j, c) not in pools:
            pools[j, c] = np.flatnonzero((owner == j) & (labels == c)).tolist()
        pool = pools[j, c]
        owner[pool.pop(int(rng.integers(len(pool))))] = k
        counts[j, c] -= 1
        moved += 1
        heappush(rich, (many + 1, j))
        if few + 1 < least:
            heappush(poor, (few + 1, k))
    return moved


def _dirichlet(concentration: Floats, rows: int, rng: Generator) -> Floats:
    """(rows, M) draws; the Generator's sampler stays finite at small concentrations, where numpy's legacy one does not."""
    q = rng.dirichlet(concentration, rows)
    if not np.allclose(q.sum(1), 1):
        small = f"a concentration of {concentration.min():g} is too small to draw from"
        raise BadInput(f"[partition] alpha or beta: {small}; take a larger one")
    return q


def _balanced(q: Floats, room: NDArray[np.bool_]) -> Floats:
    """q without the full clients; uniform over the others where that leaves nothing, over all where there are none."""
    q = np.where(room, q, 0.0)
    if not q.sum() > 0:
        q = room.astype(np.float64) if room.any() else np.ones(len(q))
    return q / q.sum()


def _taken(want: Ints, pi: Floats, left: Ints) -> Ints:
    """What a client gets of each class: what it wants, as far as there is; the rest from other classes in proportion to pi."""
    got = np.minimum(want, left)
    while missing := int(want.sum() - got.sum()):
        room = left - got
        weight = np.where(room > 0, pi, 0.0)
        got += np.minimum(apportion(np.array([missing]), (weight if weight.sum() > 0 else room)[None])[0], room)
    return got
