"""Arithmetic on named tensors. Every function returns a new tree and leaves its arguments as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256

import torch
from torch import Tensor

from fedsim.core import keys

Tree = dict[str, Tensor]


def check(tree: object, name: str) -> None:
    """Raises TypeError for what is no tree, ValueError for a key whose prefix has no price. `name` is how messages call the tree.

    >>> check({"x/a": torch.ones(1)}, "shared")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: shared 'x/a': a key begins with one of w/, opt/, buf/, grad/, ..., n/, vote/, seed/
    """
    if not isinstance(tree, dict):
        raise TypeError(f"{name} is {'None' if tree is None else f'a {type(tree).__name__}'}; it must be a dict of tensors")
    for key, value in tree.items():
        if not isinstance(value, Tensor):
            kind = type(value)
            raise TypeError(f"{name} {key!r} is a {kind.__module__}.{kind.__qualname__}; it must be a torch.Tensor")
        if not isinstance(key, str) or not key.startswith(keys.KNOWN):
            raise ValueError(f"{name} {key!r}: a key begins with one of {', '.join(keys.KNOWN)}")


def under(tree: Tree, *prefixes: str) -> Tree:
    """The entries whose key begins with one of the prefixes; their keys stay as they are.

    >>> list(under({"w/a": torch.ones(1), "mask/a": torch.ones(1), "buf/a": torch.ones(1)}, "w/", "buf/"))
    ['w/a', 'buf/a']
    """
    return {key: value for key, value in tree.items() if key.startswith(prefixes)}


def renamed(tree: Tree, old: str, new: str) -> Tree:
    """The entries whose key begins with `old`, with `new` in its place.

    >>> list(renamed({"w/a": torch.ones(1), "mask/a": torch.ones(1)}, "w/", "opt/momentum/"))
    ['opt/momentum/a']
    """
    return {new + key[len(old) :]: value for key, value in tree.items() if key.startswith(old)}


def each(function: Callable[..., Tensor], first: Tree, *others: Tree) -> Tree:
    """function(first[key], other[key], …) for every key of the first tree.

    The other trees may have more keys. KeyError where one of them lacks a key of the first.

    >>> each(torch.add, {"w/a": torch.tensor(1)}, {"w/a": torch.tensor(2), "w/b": torch.tensor(3)})
    {'w/a': tensor(3)}
    """
    for other in others:
        missing = first.keys() - other.keys()
        if missing:
            raise KeyError(f"no {sorted(missing)[0]!r} in the other tree, which has {', '.join(sorted(other)) or 'nothing'}")
    return {key: function(value, *(other[key] for other in others)) for key, value in first.items()}


def zeros(tree: Tree) -> Tree:
    """Zeros of the same keys, shapes and dtypes."""
    return each(torch.zeros_like, tree)


def weigh(n: Tensor | float, tree: Tree) -> Tree:
    """n · tree in float64: what one client adds to a weighted mean.

    Args:
        n: the client's weight, its number of images or votes; a number or a tensor ().
        tree: the client's tensors, of any dtype.
    """
    return each(lambda value: value.double() * n, tree)


def mean(total: Tree, count: Tensor, like: Tree) -> Tree:
    """total / count for every key of `like`, in the dtype that `like` has there: the weighted mean over clients, whole numbers rounded.

    Args:
        total: the sum of `weigh(n, tree)` over clients, float64.
        count: the sum of n over clients, ().
        like: says which keys are averaged, and their dtypes. KeyError where the total lacks one.

    >>> client, other = {"w/a": torch.tensor([1.0])}, {"w/a": torch.tensor([5.0])}
    >>> total = each(torch.add, weigh(3, client), weigh(1, other))
    >>> mean(total, torch.tensor(4), client)
    {'w/a': tensor([2.])}
    """
    return each(lambda old, value: _as(value / count, old.dtype), like, total)


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value if dtype.is_floating_point else value.round()).to(dtype)


def clone(tree: Tree) -> Tree:
    """A copy of every tensor."""
    return each(torch.clone, tree)


def size(tree: Tree) -> int:
    """The number of values of all tensors together."""
    return sum(value.numel() for value in tree.values())


def stack(rows: Iterable[Tree]) -> Tree:
    """One tree with tensors (K, …), of K trees that have the same keys and shapes; no tree at all gives an empty one."""
    rows = list(rows)
    return {key: torch.stack([row[key] for row in rows]) for key in (rows[0] if rows else {})}


def row(tree: Tree, index: int) -> Tree:
    """Row `index` of a tree that `stack` made; its tensors are views."""
    return {key: value[index] for key, value in tree.items()}


def sha256_of(tree: Tree) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes, in the order of the names; it tells whether two trees are equal."""
    digest = sha256()
    for key in sorted(tree):
        value = tree[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
