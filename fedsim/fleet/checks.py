"""Checks of what a work returns: the keys, shapes and dtypes of its state, and finite losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsim.core.tree import Tree
from fedsim.fleet.messages import ErrorContext
from fedsim.nn.layers.input_gate import gates_of
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.net import Net

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


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


def advice(net: Net) -> str:
    """What may keep the loss of this network finite."""
    kinds = [type(layer) for layer in net.original.modules()]
    found = ["a lower train.lr"]
    if any(not gate.sigmoid for gate in gates_of(net.original).values()):
        found.append("model.gate_sigmoid = true (without it the gates grow with what they multiply)")
    if not any(issubclass(kind, (*NORMS, NormalisedConv2d)) for kind in kinds):
        found.append("a model with norms (model.norm)")
    return f"{', or '.join(found)} may help"


def finite(losses: Tensor, clients: Sequence[int], place: ErrorContext) -> None:
    """Raises for the first step (S,) or (S, A) whose loss is not a number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].tolist()
        place.stage, place.clients = f"step {step[0]}", [clients[step[1] if len(step) > 1 else 0]]
        raise FloatingPointError(f"the loss is {losses[tuple(step)].item()}; {advice(place.order.net)}")
