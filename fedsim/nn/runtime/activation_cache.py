"""What layers keep for their backward pass where activations are pruned: caches of inputs, signs of ReLUs, nothing of averages.

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
            found.append(f"{name} sees the image (model.gate_keep), and keeps what it multiplies")
        elif own and type(layer) not in TAKEN:
            found.append(f"{name or 'the model'} is a {type(layer).__name__}, and only convolutions and linear layers take it")
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros":
            found.append(f'{name} pads by padding_mode = {layer.padding_mode!r}; it takes "zeros"')
        elif uneven(layer):
            found.append(f'{name} has padding = "same" and an even kernel; it takes odd ones')
    if not [layer for layer in module.modules() if isinstance(layer, WEIGHTED)][1:]:
        found.append("no layer comes after the first one, which keeps its whole input")
    return found


def uneven(layer: Any) -> bool:
    """Whether padding = "same" adds more on one side of the layer's input than on the other."""
    if getattr(layer, "padding", 0) != "same":
        return False
    return any(dilation * (kernel - 1) % 2 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True))


def saves(call: CallContext) -> bool:
    """Whether this is a pass whose layers keep less than their inputs: in training, with a backward pass to come."""
    return call.keep is not None and torch.is_grad_enabled()


def prunes(layer: Any) -> bool:
    """Whether the input of a layer of Net's is pruned in this call."""
    call: CallContext = layer.call[0]
    return layer.prunes and saves(call) and (call.keep.layers == "all" or not isinstance(layer, nn.Linear))  # type: ignore[union-attr]


def weighted(
    layer: Any, x: Tensor, way: Layer, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The layer's result; where it prunes, only the cache of its input is kept."""
    kept = cache_for(layer, x)
    if kept is None:
        return way(x, None, weight, bias, gain, mask)
    cache, form = kept
    thin = layer.call[0].thin.get(getattr(layer, "key", None))
    return replace(way, form=form, thin=thin)(x, cache, weight, bias, gain, mask)


def cache_for(layer: Any, x: Tensor) -> tuple[Cache, str] | None:
    """The cache of what a layer reads, and in which order; None for one that keeps it whole."""
    return cached(layer.call[0], x) if prunes(layer) else None


def cached(call: CallContext, x: Tensor) -> tuple[Cache, str]:
    """The cache of x, and in which order; made where no layer has read x before in this call."""
    whose = source(x)
    mark = whose._version
    for other, version, cache, form in call.caches:
        if other() is whose and version == mark:
            return cache, form
    assert call.keep is not None
    form = form_of(x, call.pure)
    cache = pruned(x, _real_of(call, x), call.keep, form)
    call.caches[:] = [entry for entry in call.caches if entry[0]() is not None]
    call.caches.append((weakref.ref(whose), mark, cache, form))
    return cache, form


def _real_of(call: CallContext, x: Tensor) -> Tensor | None:
    """Which rows of x are of real images, where some are not; ValueError for rows that are not of one image each."""
    if call.real is None or len(call.real) == len(x):
        return call.real
    if len(x) % len(call.real):
        raise ValueError(f"activations of shape {tuple(x.shape)} cannot be pruned in a padded batch of {len(call.real)}: images come first")
    return call.real.repeat_interleave(len(x) // len(call.real))


def rounded(x: Tensor, low: torch.dtype) -> Tensor:
    """x in another dtype."""
    return standing_for(x.to(low), x)


def standing_for(made: Tensor, x: Tensor) -> Tensor:
    """`made`, which holds what x does: layers that read one or the other share a cache."""
    made.source = weakref.ref(source(x))  # type: ignore[attr-defined]
    return made


def source(x: Tensor) -> Tensor:
    """The tensor that x stands for, or x."""
    of = getattr(x, "source", None)
    found: Tensor | None = of() if of is not None else None
    return x if found is None else found


def activated(layer: Any, x: Tensor) -> Tensor:
    """A ReLU that keeps signs."""
    top, scale = ACTIVATIONS[layer.kind]
    return relu(x, top, scale, layer.inplace, layer.call[0].pure)
