"""The steps of local optimisers, masked: torch.optim.SGD's and torch.optim.Adam's, on trees, in place.

Adam: Kingma and Ba, ICLR 2015, arXiv:1412.6980, with the paper's constants; weight decay is added to the gradient, as torch does,
or, decoupled, taken off the weight (AdamW).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import ADAM_STEPS
from fedsim.core.tree import Tree, renamed, zeros
from fedsim.kernels.sparse.sgd import sgd as step
from fedsim.kernels.sparse.sgd import steps
from fedsim.nn.gradients.compact import CompactGradient

OPTIMISERS = ("sgd", "adam")
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def fresh(w: Tree, momentum: float, optimiser: str = "sgd") -> Tree:
    """The state of an optimiser before its first step: a momentum, or Adam's two moments and its number of steps."""
    if optimiser == "adam":
        like = next(iter(w.values()))
        moments = renamed(zeros(w), keys.WEIGHTS, keys.FIRST_MOMENT) | renamed(zeros(w), keys.WEIGHTS, keys.SECOND_MOMENT)
        return moments | {ADAM_STEPS: torch.zeros((), dtype=torch.float64, device=like.device)}
    return renamed(zeros(w), keys.WEIGHTS, keys.MOMENTUM) if momentum else {}


def values_per_parameter(momentum: float, optimiser: str = "sgd") -> int:
    """Values that the optimiser holds for each parameter."""
    return 2 if optimiser == "adam" else int(momentum > 0)


def sgd(state: Tree, gradient: Tree, lr: float | Tensor, momentum: float, decay: float, pure: bool = False) -> Tree:
    """One step of torch.optim.SGD; `pure` for calls under `vmap`."""
    if isinstance(gradient, CompactGradient):
        gradient = gradient.step(state, float(lr), momentum, decay)
    if not (pure or isinstance(lr, Tensor)):
        alone = {key: g for key, g in gradient.items() if steps(g)}
        for key, g in alone.items():
            step(state[key], state.get(keys.MOMENTUM + keys.name_of(key)) if momentum else None, g, lr, momentum, decay)
        gradient = {key: g for key, g in gradient.items() if key not in alone} if alone else gradient
    if not gradient:
        return state
    w, moves = [state[key] for key in gradient], list(gradient.values())
    rows: Any = _InTurn if pure or isinstance(lr, Tensor) else torch
    if decay:
        moves = list(rows._foreach_add(moves, w, alpha=decay))
    if momentum:
        kept = [state[keys.MOMENTUM + keys.name_of(key)] for key in gradient]
        rows._foreach_mul_(kept, momentum)
        rows._foreach_add_(kept, moves, alpha=1.0)
        moves = kept
    if isinstance(lr, Tensor):
        moves, lr = [lr * move for move in moves], 1.0
    rows._foreach_add_(w, moves, alpha=-lr)
    return state


def adam(state: Tree, gradient: Tree, lr: float | Tensor, decay: float, decoupled: bool = False) -> Tree:
    """One step of torch.optim.Adam; with `decoupled` decay of torch.optim.AdamW (Loshchilov and Hutter 2019)."""
    steps = state[ADAM_STEPS] + 1
    first_bias, second_bias = 1 - BETA1**steps, 1 - BETA2**steps
    for key, g in gradient.items():
        w, first, second = state[key], state[keys.FIRST_MOMENT + keys.name_of(key)], state[keys.SECOND_MOMENT + keys.name_of(key)]
        if decay and decoupled:
            w.mul_(1 - lr * decay)
        elif decay:
            g = g + decay * w
        first.add_((1 - BETA1) * (g - first))
        second.add_((1 - BETA2) * (g * g - second))
        step = lr / first_bias * first / ((second / second_bias).sqrt() + EPS)
        w.sub_(step.to(w.dtype))
    return state | {ADAM_STEPS: steps}


class _InTurn:
    """torch._foreach_* one tensor at a time: the foreach kernels have no `vmap` rule."""

    @staticmethod
    def _foreach_add(tensors: list[Tensor], others: list[Tensor], alpha: float) -> list[Tensor]:
        return [torch.add(tensor, other, alpha=alpha) for tensor, other in zip(tensors, others, strict=True)]

    @staticmethod
    def _foreach_add_(tensors: list[Tensor], others: list[Tensor], alpha: float) -> None:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.add_(other, alpha=alpha)

    @staticmethod
    def _foreach_mul_(tensors: list[Tensor], factor: float) -> None:
        for tensor in tensors:
            tensor.mul_(factor)
