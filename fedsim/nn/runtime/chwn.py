"""Batch and group norm in CHWN layout (batch last)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsim.kernels.sparse import chwn_norm
from fedsim.kernels.sparse.chwn_layout import ToChwn, ToNchw, as_chwn, empty_chwn, is_chwn
from fedsim.nn.runtime import activation_cache


def is_chwn_images(x: Tensor) -> bool:
    """Whether x is a batch of images (B, C, H, W) in CHWN layout. For a pool, x.transpose(0, 1) then is a channels-last (C, B, H, W)."""
    return x.dim() == 4 and is_chwn(x)


def to_chwn(x: Tensor) -> Tensor:
    """x (B, …) in CHWN layout; differentiable."""
    return cast(Tensor, ToChwn.apply(x))


def to_nchw(x: Tensor) -> Tensor:
    """x (B, …) in NCHW layout, with the activation cache of x; differentiable."""
    return activation_cache.share_cache(cast(Tensor, ToNchw.apply(x)), x) if is_chwn(x) else x


# ---- norm
def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean (C,), biased variance (C,)) of x (B, C, …) in training mode, in CHWN layout."""
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    if not x.is_cuda:
        return cast("tuple[Tensor, Tensor, Tensor]", _BatchNorm.apply(x, weight, bias, eps))
    return _by_torch(x, weight, bias, eps)


def takes(x: Tensor) -> bool:
    """Whether `batch_norm` and `group_norm` can take x."""
    return x.dtype == torch.float32 and is_chwn_images(x)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` by torch's own kernel, for any device, on a view with one image: (1, C, all other axes)."""
    images = x.movedim(0, -1)
    out, mean, inverse = torch.native_batch_norm(images.reshape(1, len(images), -1), weight, bias, None, None, True, 0.0, eps)
    return out.view(images.shape).movedim(-1, 0), mean.detach(), inverse.detach().pow(-2) - eps


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """F.group_norm of x (B, C, …) in one group, in CHWN layout."""
    if x.is_cuda:
        return F.group_norm(x, 1, weight, bias, eps)
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    return cast(Tensor, _GroupNorm.apply(x, weight, bias, eps))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        images, (whole, out) = as_chwn(x), empty_chwn(x, tuple(x.shape))
        mean, inverse = x.new_empty(len(x)), x.new_empty(len(x))
        chwn_norm.group_forward(_places(images), _numbers(weight), _numbers(bias), eps, _places(out), mean.numpy(), inverse.numpy())
        context.save_for_backward(images, weight, mean, inverse)
        return whole

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, inverse = context.saved_tensors
        into, by_weight, by_bias = torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)
        given = (_places(images), _places(as_chwn(g)), _numbers(weight), mean.numpy(), inverse.numpy())
        chwn_norm.group_backward(*given, _places(into), by_weight.numpy(), by_bias.numpy())
        return into.movedim(-1, 0), by_weight, by_bias, None


def _places(images: Tensor) -> Any:
    """(C, positions, B)."""
    return images.view(len(images), -1, images.shape[-1]).numpy()


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        images, (whole, out) = as_chwn(x), empty_chwn(x, tuple(x.shape))
        mean, var = torch.empty_like(weight), torch.empty_like(weight)
        chwn_norm.norm_forward(_rows(images), _numbers(weight), _numbers(bias), eps, _rows(out), mean.numpy(), var.numpy())
        context.save_for_backward(images, weight, mean, var)
        context.eps = eps
        context.mark_non_differentiable(mean, var)
        return whole, mean, var

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weight, mean, var = context.saved_tensors
        into, by_weight, by_bias = torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)
        given = (_rows(images), _rows(as_chwn(g)), _numbers(weight), context.eps, mean.numpy(), var.numpy())
        chwn_norm.norm_backward(*given, _rows(into), by_weight.numpy(), by_bias.numpy())
        return into.movedim(-1, 0), by_weight, by_bias, None


def _rows(images: Tensor) -> Any:
    """(C, all other axes)."""
    return images.view(len(images), -1).numpy()


def _numbers(values: Tensor) -> Any:
    return values.detach().numpy()
