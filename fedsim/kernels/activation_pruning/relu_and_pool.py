"""Layers without a weight under activation pruning: ReLUs keep a bit an entry, max pools a place in each window, average pools nothing.

FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification section 3.4: saving less in a convolution is useless where the ReLU
before it keeps the same tensor.
"""

from __future__ import annotations

from functools import partial
from math import inf, prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels.activation_pruning import topk
from fedsim.kernels.activation_pruning.layers import flat, form_of, shaped
from fedsim.kernels.vmap import applied, by_rows


def relu(x: Tensor, top: float = inf, scale: float = 1.0, inplace: bool = False, pure: bool = False) -> Tensor:
    """scale · min(max(x, 0), top). It keeps a bit an entry; with `inplace` it overwrites x, unless `pure`."""
    if inplace and not pure:
        return cast(Tensor, _Overwritten.apply(x, top, scale)[0])
    return cast(Tensor, applied(_Positive, x, top, scale, "" if pure else form_of(x, False))[0])


def _clamped(top: float, scale: float, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    return out, topk.where_positive(x.flatten(1), out.view(len(x), -1), top, scale)


def _held(scale: float, g: Tensor, bits: Tensor) -> tuple[Tensor]:
    return (topk.where_set(g.contiguous(), bits.contiguous(), scale),)


def _through(ctx: Any, g: Tensor) -> Tensor:
    (bits,) = ctx.saved_tensors
    form = ctx.form or "contiguous"
    (found,) = by_rows(partial(_held, ctx.scale), flat(g, form), bits)
    return shaped(found, ctx.shape, form)


class _Positive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, top: float, scale: float, form: str) -> tuple[Tensor, Tensor]:
        if form == "":  # under a transform
            out, bits = by_rows(partial(_clamped, top, scale), x)
            return out, bits
        out = torch.empty_like(x)  # no view, which could not be changed in place
        entries = flat(x, form).unsqueeze(0)
        into = flat(out, form).unsqueeze(0)
        bits = topk.where_positive(entries, into, top, scale)[0]
        return out if into.data_ptr() == out.data_ptr() else shaped(into[0], x.shape, form), bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, ctx.scale, ctx.form = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return _through(ctx, g), None, None, None


class _Overwritten(torch.autograd.Function):
    """The same, but x itself becomes the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, scale: float) -> tuple[Tensor, Tensor]:
        ctx.form, ctx.shape, ctx.scale = form_of(x, False), x.shape, scale
        entries = flat(x, ctx.form).unsqueeze(0)
        bits = topk.where_positive(entries, entries, top, scale)[0]
        if entries.data_ptr() != x.data_ptr():  # x lies in no order that is known here
            x.copy_(shaped(entries[0], x.shape, ctx.form))
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(bits)
        ctx.save_for_backward(bits)
        return x, bits

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return _through(ctx, g), None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, top: float, scale: float) -> Any:
        raise NotImplementedError("an in-place ReLU cannot run under vmap; call relu(..., pure=True)")


class MaxPool(torch.autograd.Function):
    """F.max_pool2d that keeps a byte a result: the place of the largest value in its window."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil: bool) -> tuple[Tensor, Tensor]:
        out, index = F.max_pool2d(x, kernel, stride, padding, 1, ceil, return_indices=True)
        rows, columns = _corners(out, stride, padding)
        place = (index // x.shape[-1] - rows) * kernel[1] + index % x.shape[-1] - columns
        return out, place.to(torch.uint8 if prod(kernel) <= 256 else torch.int32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.way, _ = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        kernel, stride, padding = ctx.way
        rows, columns = _corners(g, stride, padding)
        index = (place.long() // kernel[1] + rows) * ctx.shape[-1] + place.long() % kernel[1] + columns
        into = torch.zeros_like(g.flatten(-2)[..., :1]).expand(*ctx.shape[:-2], prod(ctx.shape[-2:]))
        return into.scatter_add(-1, index.flatten(-2), g.flatten(-2)).view(ctx.shape), None, None, None, None


def _corners(out: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(first row of every window (H', 1), first column (W',))."""
    rows, columns = (
        torch.arange(size, device=out.device) * step - around for size, step, around in zip(out.shape[-2:], stride, padding, strict=True)
    )
    return rows.unsqueeze(1), columns


class AveragePool(torch.autograd.Function):
    """F.avg_pool2d that keeps nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, way: tuple[Any, ...]) -> Tensor:
        return F.avg_pool2d(x, *way)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.pool = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        like = g.flatten()[:1].expand(ctx.shape)  # the pool is linear: torch reads of its input the shape alone
        kernel, stride, padding, ceil, counted, divisor = ctx.pool
        return torch.ops.aten.avg_pool2d_backward(g, like, kernel, stride, padding, ceil, counted, divisor), None


def has_places(layer: nn.MaxPool2d) -> bool:
    """Whether `largest_of_windows` gives what this max pool gives."""
    return not layer.return_indices and layer.dilation in (1, (1, 1))


def largest_of_windows(layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    """A max pool that keeps a byte a result."""
    found: Tensor = applied(MaxPool, x, *(_two(value) for value in (layer.kernel_size, layer.stride, layer.padding)), layer.ceil_mode)[0]
    return found


def averaged(layer: nn.AvgPool2d, x: Tensor) -> Tensor:
    """An average pool that keeps nothing."""
    sizes = [list(_two(value)) for value in (layer.kernel_size, layer.stride, layer.padding)]
    found: Tensor = applied(AveragePool, x, (*sizes, layer.ceil_mode, layer.count_include_pad, layer.divisor_override))
    return found


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
