"""Images innermost or outermost: (B, C, H, W) tensors that lie in memory as (C, H, W, B), and the two ways between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def innermost(x: Tensor) -> bool:
    """Whether the images of x (B, …) lie innermost."""
    return x.dim() > 1 and x.movedim(0, -1).is_contiguous() and not x.is_contiguous()


def inner(x: Tensor) -> Tensor:
    """x (B, …) as (…, B), contiguous: without a copy where its images lie innermost."""
    turned = x.movedim(0, -1)
    if turned.is_contiguous():
        return turned
    return x.reshape(len(x), -1).t().contiguous().view(turned.shape)


def made(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A new tensor of `shape` (B, …) with its images innermost, and the same memory as (…, B).

    The first is no view, as what an autograd function gives out may not be, lest a ReLU in place be refused.
    """
    count, *rest = shape
    strides, step = [1], count
    for size in reversed(rest):
        strides.insert(1, step)
        step *= size
    out = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    return out, out.movedim(0, -1)


def outer(x: Tensor) -> Tensor:
    """x (B, …), contiguous."""
    if x.is_contiguous():
        return x
    turned = x.movedim(0, -1)
    return turned.reshape(-1, len(x)).t().contiguous().view(x.shape) if turned.is_contiguous() else x.contiguous()


class Inwards(torch.autograd.Function):
    """x with its images innermost; its gradient comes back with them outermost, as the dense layer before wants it."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        out, images = made(x, tuple(x.shape))
        images.view(-1, len(x)).copy_(x.reshape(len(x), -1).t())
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> Tensor:
        return outer(g)


class Outwards(torch.autograd.Function):
    """x with its images outermost; its gradient comes back with them innermost."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return outer(x)

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor) -> Tensor:
        return inner(g).movedim(-1, 0)
