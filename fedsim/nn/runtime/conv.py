"""Convolutions and linear layers as the network runs them: sparse, activation-pruned, in CHWN layout or by torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.kernels.activation_pruning.layers import Convolution, Layer, Product, Tap, operation
from fedsim.kernels.sparse import layers
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.layers.standardized_conv import StandardisedConv2d, standardised
from fedsim.nn.runtime import activation_cache
from fedsim.nn.runtime.call_context import CallContext
from fedsim.nn.runtime.chwn import to_chwn, to_nchw


class Weighted:
    """A layer with a weight, as it stands in Net."""

    call: list[CallContext]  # in a list: not a submodule
    key: str
    op: Convolution | Product
    prunes: bool  # what it keeps of its input, where anything is pruned

    def pruning(self, x: Tensor) -> Tensor:
        layer: Any = self
        return activation_cache.weighted(self, x, Layer(self.op), layer.weight, layer.bias)


class Conv1d(Weighted, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self.pruning(x) if activation_cache.prunes(self) else super().forward(x)


class Conv3d(Weighted, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self.pruning(x) if activation_cache.prunes(self) else super().forward(x)


class Conv2d(Weighted, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        patterns = self.call[0].patterns
        if not patterns:
            return self.pruning(x) if activation_cache.prunes(self) else super().forward(x)
        if self.key in patterns:
            return layers.conv2d(x, self.weight, self.bias, patterns[self.key], activation_cache.cache_for(self, x))
        turned = to_nchw(x)
        return to_chwn(self.pruning(turned) if activation_cache.prunes(self) else super().forward(turned))


class Linear(Weighted, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        patterns = self.call[0].patterns
        if self.key in patterns:
            rows = x if x.dim() == 2 else x.flatten(0, -2)
            out = layers.linear(rows, self.weight, self.bias, patterns[self.key], activation_cache.cache_for(self, rows))
            return out if x.dim() == 2 else out.reshape(*x.shape[:-1], -1)
        return self.pruning(x) if activation_cache.prunes(self) else super().forward(x)


class RuntimeStandardizedConv2d(nn.Module):
    """Stands where a weight-standardised convolution stood. The stored filter is standardised, whatever is cut from it later."""

    def __init__(self, conv: StandardisedConv2d, name: str, call: CallContext) -> None:
        super().__init__()
        self.weight, self.bias, self.removed_key = conv.weight, conv.bias, keys.removed(name)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.call, self.op, self.prunes = [call], operation(conv), True

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        weight = self.weight if call.cut else standardised(self.weight, call.tree.get(self.removed_key))
        if activation_cache.prunes(self):
            return activation_cache.weighted(self, x, Layer(self.op), weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class RuntimeNSConv2d(nn.Module):
    """Stands where a normalised convolution stood, under the mask of its weight. It keeps no tensor of the weight's size."""

    tap: Tap | None = None  # of the gradient of the weight in use

    def __init__(self, conv: NormalisedConv2d, name: str, call: CallContext) -> None:
        super().__init__()
        self.weight, self.bias, self.gain, self.over = conv.weight, conv.bias, conv.gain, conv.over
        self.op, self.key, self.mask_key = operation(conv), name, keys.mask(name)
        self.call, self.prunes = [call], True

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        way = Layer(self.op, self.over, self.tap)
        return activation_cache.weighted(self, x, way, self.weight, self.bias, self.gain, call.tree.get(self.mask_key))
