"""Checks of what a work returns: the keys, shapes and dtypes of its state, and finite losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim.core.tree import Tree
from fedsim.fleet.messages import ErrorContext


def unchanged(start: Tree, state: Tree) -> None:
    """Raises where a state no longer has the keys, shapes and dtypes that `start` fixed."""
    if start.keys() != state.keys():
        odd = sorted(start.keys() ^ state.keys())
        raise KeyError(f"{', '.join(odd)}: start fixes the keys of the state, and a step neither adds nor drops one")
    for key, value in start.items():
        mine = state[key]
        if mine.shape != value.shape or mine.dtype != value.dtype:
            what = f"{tuple(value.shape)} {value.dtype}"
            raise TypeError(f"state {key!r} is {tuple(mine.shape)} {mine.dtype}; start made it {what}, which it keeps")


def finite(losses: Tensor, clients: Sequence[int], place: ErrorContext) -> None:
    """Raises for the first step (S,) or (S, A) whose loss is not a number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].tolist()
        place.stage, place.clients = f"step {step[0]}", [clients[step[1] if len(step) > 1 else 0]]
        raise FloatingPointError(f"the loss is {losses[tuple(step)].item()}; a lower train.lr, or a model with norm, may help")
