"""Taps: a layer's dense weight gradient, looked at while it exists and then let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.kernels.activation_pruning.layers import Tap

ParameterSlot = list[tuple[Any, str, str]]  # where a parameter stands, under which name there, and its key


class HandOver(torch.autograd.Function):
    """The identity. In backward the dense gradient is handed to `tap` as soon as it exists, and passed on only if it is wanted.

    What the tap returns is the gradient of its probes: so it comes back as a value of the call, under `vmap` too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, tap: Callable[[Tensor], Tree], wanted: bool, *probes: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.tap, ctx.wanted, *probes = inputs
        ctx.dtypes = [probe.dtype for probe in probes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.tap(gradient.detach())
        values = [value.to(dtype) for value, dtype in zip(found.values(), ctx.dtypes, strict=True)]
        return gradient if ctx.wanted else None, None, None, *values


@dataclass
class TappedLayer:
    """A layer whose dense gradient is looked at while it exists."""

    key: str  # of its weight
    see: Callable[[Tensor], Tree]
    like: Tree  # what `see` returns
    passed: bool  # whether the gradient is wanted besides

    @property
    def probes(self) -> Tree:
        """Zeros whose gradients are what `see` returns; a float64 holds every position exactly."""
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.like.items()}

    def value(self, gradients: Tree) -> Tree:
        return {name: gradients[name].to(value.dtype) for name, value in self.like.items()}


def tied(slots: ParameterSlot) -> ParameterSlot:
    """The slots, a parameter that stands at two places under one key."""
    first: dict[int, str] = {}
    for where, slot, key in slots:
        first.setdefault(id(where[slot]), key)
    return [(where, slot, first[id(where[slot])]) for where, slot, key in slots]


@contextmanager
def tapping(module: nn.Module, slots: ParameterSlot, taps: Sequence[TappedLayer], probes: Sequence[Tree]) -> Iterator[None]:
    """Wraps each tapped weight where it is first used.

    Autograd runs what was made last first: wrapped any earlier, the dense gradients would wait for each other.
    """
    waiting = {tap.key: (tap, held) for tap, held in zip(taps, probes, strict=True)}
    inside = [(layer, key) for key in waiting for layer in _users(module, slots, key) if hasattr(layer, "tap")]
    for layer, key in inside:  # which sees the gradient of the weight it makes of the stored one
        tap, held = waiting.pop(key, (None, {}))
        if tap is None:
            raise ValueError(f"layer {keys.layer_of(key)!r} cannot be tapped: several layers normalise its weight")
        layer.tap = Tap(tap.see, tuple(held.values()))  # type: ignore[assignment]

    def wrap(key: str, *_: Any) -> None:
        if key not in waiting:
            return
        tap, held = waiting.pop(key)
        places = [(where, slot) for where, slot, name in slots if name == key]
        wrapped = HandOver.apply(places[0][0][places[0][1]], tap.see, tap.passed, *held.values())
        for where, slot in places:
            where[slot] = wrapped

    called: set[nn.Module] = set()

    def once(layer: nn.Module, *_: Any) -> None:
        if layer in called:
            raise ValueError("a normalised layer that is called twice cannot be tapped: the gradients of its weight come one by one")
        called.add(layer)

    hooks = [layer.register_forward_pre_hook(once) for layer, _ in inside]
    hooks += [layer.register_forward_pre_hook(partial(wrap, key)) for key in waiting for layer in _users(module, slots, key)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, _ in inside:
            layer.tap = None  # type: ignore[assignment]
    if waiting:
        name = keys.layer_of(next(iter(waiting)))
        raise ValueError(f"layer {name!r} cannot be tapped: the model uses its weight without calling the layer")


def _users(module: nn.Module, slots: ParameterSlot, key: str) -> list[nn.Module]:
    """The layers that hold the weight."""
    places = [where for where, _, name in slots if name == key]
    return [layer for layer in module.modules() if any(layer._parameters is where for where in places)]
