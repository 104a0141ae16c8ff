"""Convolutions and linear layers as run-time layers: sparse, with a pruned input, in CHWN layout, or as torch computes them.

Their argument is called `input`, as torch calls it: a model may give it by keyword.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.kernels.activation_pruning.layers import Convolution, Layer, Product, WeightTap, operation
from fedsim.kernels.sparse import layers
from fedsim.kernels.sparse.nsconv import normalised
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.layers.standardized_conv import StandardisedConv2d, standardised
from fedsim.nn.runtime import activation_cache
from fedsim.nn.runtime.call_context import CallContext
from fedsim.nn.runtime.chwn import to_chwn, to_nchw


class Weighted:
    """A layer with a weight as a run-time layer."""

    context: CallContext
    key: str
    op: Convolution | Product
    tapped: Tensor | None = None  # on kept weights alone: its gradient is the dense gradient of the weight
    may_prune: bool  # whether it keeps less than its whole input under activation pruning; the first layer never does

    def pruning(self, x: Tensor) -> Tensor:
        layer: Any = self
        return activation_cache.weighted(self, x, Layer(self.op), layer.weight, layer.bias)


class Conv1d(Weighted, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self.pruning(input) if activation_cache.prunes_input(self) else super().forward(input)


class Conv3d(Weighted, nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self.pruning(input) if activation_cache.prunes_input(self) else super().forward(input)


class Conv2d(Weighted, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        patterns = self.context.patterns
        if not patterns:
            return self.pruning(input) if activation_cache.prunes_input(self) else super().forward(input)
        if self.key in patterns:
            return layers.conv2d(input, self.weight, self.bias, patterns[self.key], activation_cache.cache_for(self, input), self.tapped)
        nchw = to_nchw(input)
        return to_chwn(self.pruning(nchw) if activation_cache.prunes_input(self) else super().forward(nchw))


class Linear(Weighted, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        patterns = self.context.patterns
        if self.key in patterns:
            rows = input if input.dim() == 2 else input.flatten(0, -2)
            cache = activation_cache.cache_for(self, rows)
            out = layers.linear(rows, self.weight, self.bias, patterns[self.key], cache, self.tapped)
            return out if input.dim() == 2 else out.reshape(*input.shape[:-1], -1)
        return self.pruning(input) if activation_cache.prunes_input(self) else super().forward(input)


class RuntimeStandardizedConv2d(nn.Module):
    """Replaces a weight-standardised convolution; it applies the mask of its weight.

    The whole stored filter is standardised, also where channels are closed.
    """

    tap: WeightTap | None = None  # of the gradient of the weight in use

    def __init__(self, conv: StandardisedConv2d, name: str, context: CallContext) -> None:
        super().__init__()
        self.weight, self.bias, self.removed_key, self.mask_key = conv.weight, conv.bias, keys.removed(name), keys.mask(name)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.context, self.op, self.may_prune = context, operation(conv), True

    def forward(self, input: Tensor) -> Tensor:
        context = self.context
        removed, mask = (context.tree.get(key) for key in (self.removed_key, self.mask_key))
        weight = self.weight if context.compact else standardised(self.weight, removed, mask)
        if self.tap is not None or activation_cache.prunes_input(self):
            return activation_cache.weighted(self, input, Layer(self.op, tap=self.tap), weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(input, weight.to(input.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class RuntimeNSConv2d(nn.Module):
    """Replaces a normalised convolution; it applies the mask of its weight. It keeps no tensor of the weight's size for backward."""

    tap: WeightTap | None = None  # of the gradient of the weight in use
    tapped: Tensor | None = None  # on kept weights alone: its gradient is that dense gradient

    def __init__(self, conv: NormalisedConv2d, name: str, context: CallContext) -> None:
        super().__init__()
        self.weight, self.bias, self.gain, self.over = conv.weight, conv.bias, conv.gain, conv.over
        self.op, self.key, self.mask_key = operation(conv), name, keys.mask(name)
        self.context, self.may_prune = context, True

    def forward(self, input: Tensor) -> Tensor:
        context, patterns = self.context, self.context.patterns
        if self.key in patterns:
            values = normalised(self.weight, self.gain, patterns[self.key], self.over)
            return layers.conv2d(input, values, self.bias, patterns[self.key], activation_cache.cache_for(self, input), self.tapped)
        way, x = Layer(self.op, self.over, self.tap), to_nchw(input) if patterns else input
        out = activation_cache.weighted(self, x, way, self.weight, self.bias, self.gain, context.tree.get(self.mask_key))
        return to_chwn(out) if patterns else out
