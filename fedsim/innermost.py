"""Layers as Net runs them where some weights are truly sparse: images lie innermost from layer to layer, and nothing is transposed.

A layer that has a pattern in the call runs on its kept values; while there is any, dense layers hand on images innermost as well,
batch norm has a kernel for them, and pools are torch's own on a view. Without a pattern every layer is torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsim import saving
from fedsim.kernels import planes, pooled, sparse
from fedsim.kernels.layout import Inwards, Outwards, inner, innermost, made
from fedsim.kernels.pattern import Geometry
from fedsim.kernels.pruned import Convolution, Layer, Product, operation
from fedsim.kernels.signs import averaged, has_places, largest_of_windows
from fedsim.models import layers, normalised

if TYPE_CHECKING:
    from fedsim.norms import Call


class Weighted:
    """A layer with a weight, as it stands in Net."""

    call: list[Call]  # in a list: not a submodule
    key: str
    op: Convolution | Product
    prunes: bool  # what it keeps of its input, where anything is pruned

    def pruning(self, x: Tensor) -> Tensor:
        layer: Any = self
        return saving.weighted(self, x, Layer(self.op), layer.weight, layer.bias)


class Conv1d(Weighted, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self.pruning(x) if saving.prunes(self) else super().forward(x)


class Conv3d(Weighted, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self.pruning(x) if saving.prunes(self) else super().forward(x)


class Conv2d(Weighted, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        patterns = self.call[0].patterns
        if not patterns:
            return self.pruning(x) if saving.prunes(self) else super().forward(x)
        if self.key in patterns:
            return sparse.conv2d(x, self.weight, self.bias, patterns[self.key], saving.cache_for(self, x))
        turned = _outwards(x)
        return _inwards(self.pruning(turned) if saving.prunes(self) else super().forward(turned))


class Linear(Weighted, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        patterns = self.call[0].patterns
        if self.key in patterns:
            rows = x if x.dim() == 2 else x.flatten(0, -2)
            out = sparse.linear(rows, self.weight, self.bias, patterns[self.key], saving.cache_for(self, rows))
            return out if x.dim() == 2 else out.reshape(*x.shape[:-1], -1)
        return self.pruning(x) if saving.prunes(self) else super().forward(x)


class Activation(nn.Module):
    """A ReLU, as it stands in Net."""

    call: list[Call]
    kind: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        if saving.saves(self.call[0]):
            return saving.activated(self, x)
        return cast(Tensor, super().forward(x))


class ReLU(Activation, nn.ReLU):
    kind = nn.ReLU


class ReLU6(Activation, nn.ReLU6):
    kind = nn.ReLU6


class ScaledReLU(Activation, normalised.ScaledReLU):
    kind = normalised.ScaledReLU


class MaxPool2d(nn.MaxPool2d):
    call: list[Call]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        if not call.pure and pooled.takes(x, self):
            return pooled.halved(x)
        if self.return_indices or not (call.patterns and _flat(x)):
            return self._of(x)
        return self._of(x.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        lean = saving.saves(self.call[0]) and has_places(self)
        return largest_of_windows(self, x) if lean else cast(Tensor, super().forward(x))


class AvgPool2d(nn.AvgPool2d):
    call: list[Call]

    def forward(self, x: Tensor) -> Tensor:
        if not (self.call[0].patterns and _flat(x)):
            return self._of(x)
        return self._of(x.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        return averaged(self, x) if saving.saves(self.call[0]) else super().forward(x)


class Shortcut(layers.Shortcut):
    call: list[Call]

    def widened(self, x: Tensor) -> Tensor:
        if not (self.call[0].patterns and innermost(x)):
            return super().widened(x)
        return F.pad(x.movedim(0, -1), (0, 0) * 3 + (0, self.extra)).movedim(-1, 0)


OURS: dict[type[nn.Module], Any] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    normalised.ScaledReLU: ScaledReLU,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    layers.Shortcut: Shortcut,
}


def place(module: nn.Module, call: Call) -> dict[str, Geometry]:
    """Gives the module's layers the ways above, in place; what geometry every layer has that could run sparse."""
    found = {}
    for name, layer in module.named_modules():
        if kind := OURS.get(type(layer)):
            layer.__class__ = kind
            layer.call, layer.key = [call], name
            if issubclass(kind, Weighted):
                layer.op, layer.prunes = operation(layer), True
            if (geometry := _geometry(layer)) is not None:
                found[name] = geometry
    return found


def _geometry(layer: Any) -> Geometry | None:
    if isinstance(layer, nn.Linear):
        return Geometry()
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Geometry(_two(layer.stride), _two(layer.padding), _two(layer.dilation), layer.groups)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _flat(x: Tensor) -> bool:
    """Whether x is images that lie innermost; a pool takes them for the channels of a channels-last (C, B, H, W)."""
    return x.dim() == 4 and innermost(x)


def _inwards(x: Tensor) -> Tensor:
    return cast(Tensor, Inwards.apply(x))


def _outwards(x: Tensor) -> Tensor:
    return saving.standing_for(cast(Tensor, Outwards.apply(x)), x) if innermost(x) else x


# ---- norm


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean (C,), biased variance (C,)) of x (B, C, …) in training mode, images innermost."""
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    if not x.is_cuda:
        return cast("tuple[Tensor, Tensor, Tensor]", _Norm.apply(x, weight, bias, eps))
    return _by_torch(x, weight, bias, eps)


def takes(x: Tensor) -> bool:
    """Whether `batch_norm` is for x."""
    return x.dtype == torch.float32 and _flat(x)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own kernel, whatever the device, on a view with one image: (1, C, everything else)."""
    images = x.movedim(0, -1)
    out, mean, inverse = torch.native_batch_norm(images.reshape(1, len(images), -1), weight, bias, None, None, True, 0.0, eps)
    return out.view(images.shape).movedim(-1, 0), mean.detach(), inverse.detach().pow(-2) - eps


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """F.group_norm of x (B, C, …) in one group, images innermost."""
    if x.is_cuda:
        return F.group_norm(x, 1, weight, bias, eps)
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    return cast(Tensor, _Group.apply(x, weight, bias, eps))


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        images, (whole, out) = inner(x), made(x, tuple(x.shape))
        mean, inverse = x.new_empty(len(x)), x.new_empty(len(x))
        planes.group_forward(_places(images), _numbers(weight), _numbers(bias), eps, _places(out), mean.numpy(), inverse.numpy())
        context.save_for_backward(images, weight, mean, inverse)
        return whole

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, inverse = context.saved_tensors
        into, by_weight, by_bias = torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)
        given = (_places(images), _places(inner(g)), _numbers(weight), mean.numpy(), inverse.numpy())
        planes.group_backward(*given, _places(into), by_weight.numpy(), by_bias.numpy())
        return into.movedim(-1, 0), by_weight, by_bias, None


def _places(images: Tensor) -> Any:
    """(C, positions, B)."""
    return images.view(len(images), -1, images.shape[-1]).numpy()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        images, (whole, out) = inner(x), made(x, tuple(x.shape))
        mean, var = torch.empty_like(weight), torch.empty_like(weight)
        planes.norm_forward(_rows(images), _numbers(weight), _numbers(bias), eps, _rows(out), mean.numpy(), var.numpy())
        context.save_for_backward(images, weight, mean, var)
        context.eps = eps
        context.mark_non_differentiable(mean, var)
        return whole, mean, var

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, var = context.saved_tensors
        into, by_weight, by_bias = torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)
        given = (_rows(images), _rows(inner(g)), _numbers(weight), context.eps, mean.numpy(), var.numpy())
        planes.norm_backward(*given, _rows(into), by_weight.numpy(), by_bias.numpy())
        return into.movedim(-1, 0), by_weight, by_bias, None


def _rows(images: Tensor) -> Any:
    """(C, everything else)."""
    return images.view(len(images), -1).numpy()


def _numbers(values: Tensor) -> Any:
    return values.detach().numpy()
