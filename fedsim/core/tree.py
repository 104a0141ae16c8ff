"""Arithmetic on named tensors. Every function returns a new tree and leaves its arguments as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def under(tree: Tree, *prefixes: str) -> Tree:
    """The entries whose key begins with one of the prefixes, keys unchanged: under(tree, "w/", "buf/")."""
    return {key: value for key, value in tree.items() if key.startswith(prefixes)}


def renamed(tree: Tree, old: str, new: str) -> Tree:
    """The entries under the prefix `old`, under `new` instead: renamed(tree, "w/", "opt/momentum/")."""
    return {new + key[len(old) :]: value for key, value in tree.items() if key.startswith(old)}


def each(function: Callable[..., Tensor], first: Tree, *others: Tree) -> Tree:
    """function(first[key], other[key] …) for every key of the first; a missing key is an error that names it."""
    for other in others:
        missing = first.keys() - other.keys()
        if missing:
            raise KeyError(f"no {sorted(missing)[0]!r} in the other tree, which has {', '.join(sorted(other)) or 'nothing'}")
    return {key: function(value, *(other[key] for other in others)) for key, value in first.items()}


def zeros(tree: Tree) -> Tree:
    """Zeros of the same keys, shapes and dtypes."""
    return each(torch.zeros_like, tree)


def weigh(n: Tensor | float, tree: Tree) -> Tree:
    """n · tree in float64: a client's share of a weighted mean, n its number of images (or votes)."""
    return each(lambda value: value.double() * n, tree)


def mean(total: Tree, count: Tensor, like: Tree) -> Tree:
    """total / count for every key of `like`, in the dtype `like` has there."""
    return each(lambda old, value: (value / count).to(old.dtype), like, total)


def clone(tree: Tree) -> Tree:
    return each(torch.clone, tree)


def size(tree: Tree) -> int:
    """Number of values."""
    return sum(value.numel() for value in tree.values())


def stack(rows: Iterable[Tree]) -> Tree:
    """(K, …) of K trees with the same keys."""
    rows = list(rows)
    return {key: torch.stack([row[key] for row in rows]) for key in (rows[0] if rows else {})}


def row(tree: Tree, index: int) -> Tree:
    """One row of a stacked tree, as views."""
    return {key: value[index] for key, value in tree.items()}


def sha256_of(tree: Tree) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = sha256()
    for key in sorted(tree):
        value = tree[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
