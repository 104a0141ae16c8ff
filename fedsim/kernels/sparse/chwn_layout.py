"""CHWN layout (batch last): tensors of shape (B, C, H, W) whose memory is (C, H, W, B), and the conversions from and to NCHW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_chwn(x: Tensor) -> bool:
    """Whether x (B, …) is in CHWN layout: its memory is (…, B)."""
    return x.dim() > 1 and x.movedim(0, -1).is_contiguous() and not x.is_contiguous()


def as_chwn(x: Tensor) -> Tensor:
    """x (B, …) as a contiguous tensor (…, B); without a copy if x is in CHWN layout."""
    transposed = x.movedim(0, -1)
    if transposed.is_contiguous():
        return transposed
    return x.reshape(len(x), -1).t().contiguous().view(transposed.shape)


def empty_chwn(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A new tensor of `shape` (B, …) in CHWN layout, and its memory as (…, B).

    The first is no view: the result of an autograd function must not be one, or torch refuses an in-place ReLU behind it.
    """
    count, *rest = shape
    strides, step = [1], count
    for size in reversed(rest):
        strides.insert(1, step)
        step *= size
    out = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    return out, out.movedim(0, -1)


def as_nchw(x: Tensor) -> Tensor:
    """x (B, …) as a contiguous tensor (NCHW); without a copy if it is one."""
    if x.is_contiguous():
        return x
    transposed = x.movedim(0, -1)
    return transposed.reshape(-1, len(x)).t().contiguous().view(x.shape) if transposed.is_contiguous() else x.contiguous()


class ToChwn(torch.autograd.Function):
    """x in CHWN layout; its gradient is in NCHW layout, as the dense layer before wants it."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        out, images = empty_chwn(x, tuple(x.shape))
        images.view(-1, len(x)).copy_(x.reshape(len(x), -1).t())
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> Tensor:
        return as_nchw(g)


class ToNchw(torch.autograd.Function):
    """x in NCHW layout; its gradient is in CHWN layout."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return as_nchw(x)

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> Tensor:
        return as_chwn(g).movedim(-1, 0)
