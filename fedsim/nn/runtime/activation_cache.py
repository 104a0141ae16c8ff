"""Activation pruning in the run-time layers: which layers prune their input, and the caches that they keep for the backward pass.

Layers that read the same tensor share one cache. The first layer of a network keeps its whole input, the images.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsim.kernels.activation_pruning.layers import Cache, Layer, form_of, pruned
from fedsim.kernels.activation_pruning.relu_and_pool import relu
from fedsim.kernels.nsconv import RELU_SCALE
from fedsim.nn.layers.input_gate import WEIGHTED, InputGate
from fedsim.nn.layers.nsconv import NormalisedConv2d, ScaledReLU
from fedsim.nn.layers.standardized_conv import StandardisedConv2d

if TYPE_CHECKING:
    from fedsim.nn.runtime.call_context import CallContext


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, StandardisedConv2d, NormalisedConv2d)
TAKEN = (*CONVOLUTIONS, nn.Linear)  # exactly: a class of a user's own may do anything with its input
ACTIVATIONS: dict[type[nn.Module], tuple[float, float]] = {nn.ReLU: (inf, 1.0), nn.ReLU6: (6.0, 1.0), ScaledReLU: (inf, RELU_SCALE)}


def unfit(module: nn.Module) -> list[str]:
    """The layers whose inputs cannot be pruned, and why; empty where all can."""
    found = []
    for name, layer in module.named_modules():
        own = [value for value in layer._parameters.values() if value is not None and value.dim() > 1]
        if isinstance(layer, InputGate):
            found.append(f"{name} is a dynamic gate (model.gate_keep), which keeps the tensor that it multiplies")
        elif own and type(layer) not in TAKEN:
            what = f"{name or 'the model'} ({type(layer).__name__}) has a weight of its own"
            found.append(f"{what}, and only convolutions and linear layers can prune what they keep")
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros":
            found.append(f'{name} pads by padding_mode = {layer.padding_mode!r}; it takes "zeros"')
        elif pads_unevenly(layer):
            found.append(f'{name} has padding = "same" and an even kernel; it takes odd ones')
    if not [layer for layer in module.modules() if isinstance(layer, WEIGHTED)][1:]:
        found.append("no layer comes after the first one, which keeps its whole input")
    return found


def pads_unevenly(layer: Any) -> bool:
    """Whether padding = "same" adds more on one side of the layer's input than on the other."""
    if getattr(layer, "padding", 0) != "same":
        return False
    return any(dilation * (kernel - 1) % 2 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True))


def is_pruning(context: CallContext) -> bool:
    """Whether layers prune what they keep: activation pruning is on, and a backward pass will follow."""
    return context.activation_pruning is not None and torch.is_grad_enabled()


def prunes_input(layer: Any) -> bool:
    """Whether a run-time layer prunes its input in this call."""
    context: CallContext = layer.context
    return layer.may_prune and is_pruning(context) and (context.activation_pruning.layers == "all" or not isinstance(layer, nn.Linear))  # type: ignore[union-attr]


def weighted(
    layer: Any, x: Tensor, way: Layer, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The result of a layer with a weight. If the layer prunes its input, autograd keeps the cache in place of the input."""
    kept = cache_for(layer, x)
    if kept is None:
        return way(x, None, weight, bias, gain, mask)
    cache, form = kept
    positions = layer.context.kept_positions.get(getattr(layer, "key", None))
    return replace(way, form=form, kept_positions=positions)(x, cache, weight, bias, gain, mask)


def cache_for(layer: Any, x: Tensor) -> tuple[Cache, str] | None:
    """The cache of the layer's input and its memory layout (`form_of`); None for a layer that keeps its whole input."""
    return cached(layer.context, x) if prunes_input(layer) else None


def cached(context: CallContext, x: Tensor) -> tuple[Cache, str]:
    """The cache of x and its memory layout; made once per call, for the first layer that reads x."""
    whose = source(x)
    mark = whose._version
    for other, version, cache, form in context.caches:
        if other() is whose and version == mark:
            return cache, form
    assert context.activation_pruning is not None
    form = form_of(x, context.pure)
    cache = pruned(x, _real_of(context, x), context.activation_pruning, form)
    context.caches[:] = [entry for entry in context.caches if entry[0]() is not None]
    context.caches.append((weakref.ref(whose), mark, cache, form))
    return cache, form


def _real_of(context: CallContext, x: Tensor) -> Tensor | None:
    """(len(x),) in {0, 1}, which rows of x belong to real images; ValueError if the rows cannot be assigned to images."""
    if context.real is None or len(context.real) == len(x):
        return context.real
    if len(x) % len(context.real):
        raise ValueError(
            f"activations of shape {tuple(x.shape)} cannot be pruned in a padded batch of {len(context.real)} images:"
            " axis 0 is not the images"
        )
    return context.real.repeat_interleave(len(x) // len(context.real))


def rounded(x: Tensor, low: torch.dtype) -> Tensor:
    """x in another dtype, with the same cache."""
    return share_cache(x.to(low), x)


def share_cache(made: Tensor, x: Tensor) -> Tensor:
    """Marks `made` as a copy of `x` in another layout or dtype, so that layers that read either share one activation cache."""
    made.source = weakref.ref(source(x))  # type: ignore[attr-defined]
    return made


def source(x: Tensor) -> Tensor:
    """The tensor that x is a copy of (`share_cache`), or x itself."""
    of = getattr(x, "source", None)
    found: Tensor | None = of() if of is not None else None
    return x if found is None else found


def relu_with_signs(layer: Any, x: Tensor) -> Tensor:
    """A ReLU that keeps one bit an entry, in place of its output."""
    top, scale = ACTIVATIONS[layer.kind]
    return relu(x, top, scale, layer.inplace, layer.context.pure)
