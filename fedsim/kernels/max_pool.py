"""2x2 max pooling of contiguous images: torch's kernel reads one value at a time, this one whole rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsim.kernels import max_pool_cpu


def takes(x: Tensor, pool: nn.MaxPool2d) -> bool:
    """Whether `halved` gives for x what the layer gives."""
    plain = (pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices) in ((0, 1, False, False), ((0, 0), (1, 1), False, False))
    halves = all(size in (2, (2, 2)) for size in (pool.kernel_size, pool.stride))
    ours = x.dim() == 4 and x.dtype == torch.float32 and not x.is_cuda and x.is_contiguous() and min(x.shape[2:]) >= 2
    return plain and halves and ours


def halved(x: Tensor) -> Tensor:
    """(B, C, H // 2, W // 2) the largest of every four values of x (B, C, H, W); of equal ones the first in rows, as in torch."""
    return cast(Tensor, _Halved.apply(x))


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
        which = torch.empty(out.shape, dtype=torch.uint8)
        max_pool_cpu.largest(*(_planes(value) for value in (x, out, which)))
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (which,) = ctx.saved_tensors
        into = gradient.new_empty(ctx.shape)
        if ctx.shape[2] % 2 or ctx.shape[3] % 2:
            into.zero_()
        max_pool_cpu.placed(*(_planes(value) for value in (gradient.contiguous(), which, into)))
        return into


def _planes(images: Tensor) -> Any:
    """(B · C, H, W)."""
    return images.numpy().reshape(-1, *images.shape[2:])
