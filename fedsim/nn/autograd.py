"""Two ways to differentiate one call of a net: ordinary autograd, and torch.func for calls under `vmap`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.core.tree import Tree

Forward = Callable[[Tree, list[Tree]], tuple[Tensor, Tree]]  # of leaves and probes: loss, running statistics
Found = tuple[Tensor, Tree, list[Tree], Tree]  # loss, gradients of leaves, of probes, running statistics


def by_autograd(forward: Forward, leaves: Tree, probes: list[Tree]) -> Found:
    """By ordinary autograd."""
    leaves, *probes = [{key: value.detach().requires_grad_() for key, value in tree.items()} for tree in (leaves, *probes)]
    every = [value for tree in (leaves, *probes) for value in tree.values()]
    with torch.enable_grad():
        value, buffers = forward(leaves, probes)
    found = iter(torch.autograd.grad(value, every, allow_unused=True, materialize_grads=True) if every else ())
    dense, *seen = [{key: next(found) for key in tree} for tree in (leaves, *probes)]
    return value.detach(), dense, seen, buffers


def by_func(forward: Forward, leaves: Tree, probes: list[Tree]) -> Found:
    """By torch.func, for calls under `vmap`."""
    (dense, seen), (value, buffers) = torch.func.grad_and_value(forward, argnums=(0, 1), has_aux=True)(leaves, probes)
    return value, dense, seen, buffers
