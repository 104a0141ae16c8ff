"""Gradient taps (hooks): a callback gets the dense gradient of a layer's weight as soon as it exists; then the gradient is freed."""

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
from fedsim.kernels.activation_pruning.layers import WeightTap

ParameterSlot = list[tuple[Any, str, str]]  # dict that a parameter stands in, its name there, its key


class TapGradient(torch.autograd.Function):
    """The identity. Its backward pass gives the dense gradient to `tap` as soon as it exists, and returns it only with `pass_on`.

    What the tap returns becomes the gradient of the tap inputs: so it is a value of the call, under `vmap` too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, tap: Callable[[Tensor], Tree], pass_on: bool, *tap_inputs: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.tap, ctx.pass_on, *tap_inputs = inputs
        ctx.dtypes = [tap_input.dtype for tap_input in tap_inputs]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.tap(gradient.detach())
        values = [value.to(dtype) for value, dtype in zip(found.values(), ctx.dtypes, strict=True)]
        return gradient if ctx.pass_on else None, None, None, *values


@dataclass
class TappedLayer:
    """A layer with a gradient tap."""

    key: str  # of its weight
    callback: Callable[[Tensor], Tree]
    example: Tree  # a value of what `callback` returns
    pass_on: bool  # whether the gradient is also a result of the call

    @property
    def tap_inputs(self) -> Tree:
        """Zeros whose gradients are what `callback` returns; float64 holds every position exactly."""
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.example.items()}

    def value(self, gradients: Tree) -> Tree:
        """What `callback` returned, from the gradients of the tap inputs."""
        return {name: gradients[name].to(value.dtype) for name, value in self.example.items()}


def tied(slots: ParameterSlot) -> ParameterSlot:
    """The slots; a parameter that stands in two places has one key."""
    first: dict[int, str] = {}
    for where, slot, key in slots:
        first.setdefault(id(where[slot]), key)
    return [(where, slot, first[id(where[slot])]) for where, slot, key in slots]


@contextmanager
def tapping(module: nn.Module, slots: ParameterSlot, taps: Sequence[TappedLayer], tap_inputs: Sequence[Tree]) -> Iterator[None]:
    """Calls inside give the dense gradients of tapped weights to their taps.

    Each weight is wrapped where it is first used. Autograd first runs what was made last: if weights were wrapped earlier, the dense
    gradients would wait for each other.
    """
    waiting = {tap.key: (tap, held) for tap, held in zip(taps, tap_inputs, strict=True)}
    users: dict[str, list[Any]] = {key: _users(module, slots, key) for key in waiting}
    sparse = {key: layers[0] for key, layers in users.items() if layers and _on_kept_weights(layers[0])}
    inside = [(layer, key) for key in waiting if key not in sparse for layer in users[key] if hasattr(layer, "tap")]
    for layer, key in inside:  # such a layer taps the weight that it makes of the stored one
        tap, held = waiting.pop(key, (None, {}))
        if tap is None:
            raise ValueError(f"layer {keys.layer_of(key)!r} cannot be tapped: several layers make their filters of its weight")
        layer.tap = WeightTap(tap.callback, tuple(held.values()))

    def wrap(key: str, *_: Any) -> None:
        if key in waiting:
            _wrap(slots, sparse.get(key), *waiting.pop(key))

    called: set[nn.Module] = set()

    def once(layer: nn.Module, *_: Any) -> None:
        if layer in called:
            raise ValueError("a layer that makes its filters cannot be tapped if it is called twice: each call has its own gradient")
        called.add(layer)

    hooks = [layer.register_forward_pre_hook(once) for layer, _ in inside]
    hooks += [layer.register_forward_pre_hook(partial(wrap, key)) for key in waiting for layer in users[key]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, _ in inside:
            layer.tap = None
        for layer in sparse.values():
            layer.tapped = None
    if waiting:
        name = keys.layer_of(next(iter(waiting)))
        raise ValueError(f"layer {name!r} cannot be tapped: the model uses its weight without calling the layer")


def _wrap(slots: ParameterSlot, sparse: Any, tap: TappedLayer, held: Tree) -> None:
    """Puts the tap on the weight where it stands, or, in a layer with its kept weights alone, on what has the dense gradient."""
    if sparse is not None:
        nothing = sparse.weight[:0].sum().expand(sparse.context.patterns[sparse.key].mask.shape)
        sparse.tapped = TapGradient.apply(nothing, tap.callback, False, *held.values())
        return
    places = [(where, slot) for where, slot, name in slots if name == tap.key]
    wrapped = TapGradient.apply(places[0][0][places[0][1]], tap.callback, tap.pass_on, *held.values())
    for where, slot in places:
        where[slot] = wrapped


def _on_kept_weights(layer: Any) -> bool:
    """Whether the layer has its kept weights alone in this call."""
    return hasattr(layer, "tapped") and layer.key in layer.context.patterns


def _users(module: nn.Module, slots: ParameterSlot, key: str) -> list[nn.Module]:
    """The layers that hold the weight."""
    places = [where for where, _, name in slots if name == key]
    return [layer for layer in module.modules() if any(layer._parameters is where for where in places)]
