"""Two ways to differentiate one call of a net: ordinary autograd, and torch.func for calls under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fedsim.core.tree import Tree

Forward = Callable[[Tree, list[Tree]], tuple[Tensor, Tree]]  # of leaves and tap inputs: loss, running statistics
Backward = Callable[[Tree, Tree], AbstractContextManager[None]]  # of leaves and running statistics: stands around the backward pass
Differentiated = tuple[Tensor, Tree, list[Tree], Tree]  # loss, gradients of leaves, of tap inputs, running statistics


def by_autograd(forward: Forward, leaves: Tree, tap_inputs: list[Tree], backward: Backward | None = None) -> Differentiated:
    """Gradients by ordinary autograd."""
    leaves, *tap_inputs = [{key: value.detach().requires_grad_() for key, value in tree.items()} for tree in (leaves, *tap_inputs)]
    inputs = [value for tree in (leaves, *tap_inputs) for value in tree.values()]
    with torch.enable_grad():
        loss, buffers = forward(leaves, tap_inputs)
    with backward(leaves, buffers) if backward else nullcontext():
        found = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True) if inputs else ())
    gradient, *tap_gradients = [{key: next(found) for key in tree} for tree in (leaves, *tap_inputs)]
    return loss.detach(), gradient, tap_gradients, buffers


def by_func(forward: Forward, leaves: Tree, tap_inputs: list[Tree]) -> Differentiated:
    """Gradients by torch.func, for calls under `vmap`."""
    differentiate = torch.func.grad_and_value(forward, argnums=(0, 1), has_aux=True)
    (gradient, tap_gradients), (loss, buffers) = differentiate(leaves, tap_inputs)
    return loss, gradient, tap_gradients, buffers
