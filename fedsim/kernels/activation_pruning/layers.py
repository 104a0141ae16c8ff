"""Layers with a weight under activation pruning: for the backward pass they keep the largest entries of their input alone.

Scaled activation pruning: FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification section 3.4. A layer's result and the
gradient of its input are those of the plain layer, by the same kernels; the gradient of its weight is taken with the pruned input.
A normalised weight is made anew in the backward pass, so that no tensor of a weight's size is kept.

Shapes: x (B, …), M = B · P entries of which k are kept; where (ceil(M / 8),) a bit an entry, or (k,) int32 positions; values (k,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.activation_pruning import ActivationPruning, count
from fedsim.kernels.activation_pruning import topk
from fedsim.kernels.nsconv import normalised, slopes
from fedsim.kernels.sparse.chwn_layout import as_chwn, is_chwn
from fedsim.kernels.sparse.pattern import KeptPositions
from fedsim.kernels.vmap import applied, by_rows

Cache = tuple[Tensor, Tensor]  # where, values


# ---- entries in the order of memory
def form_of(x: Tensor, pure: bool) -> str:
    """The memory layout of x: "contiguous", "channels_last" or "chwn"; under a torch.func transform x counts as contiguous."""
    if pure or x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "chwn" if is_chwn(x) else "contiguous"


def flat(x: Tensor, form: str) -> Tensor:
    """(M,) the entries in the order of the layout `form`, without a copy if x has that layout."""
    if form == "channels_last":
        return x.permute(0, 2, 3, 1).reshape(-1)
    return as_chwn(x).view(-1) if form == "chwn" else x.reshape(-1)


def transposed(shape: torch.Size, form: str) -> tuple[int, int]:
    """(S, T): what is (…, T, S) in a contiguous tensor is (…, S, T) in the memory of this layout."""
    if form == "channels_last":
        return shape[2] * shape[3], shape[1]
    return (prod(shape[1:]), shape[0]) if form == "chwn" else (1, 1)


def shaped(entries: Tensor, shape: torch.Size, form: str) -> Tensor:
    """The inverse of `flat`."""
    if form == "channels_last":
        b, c, h, w = shape
        return entries.view(b, h, w, c).permute(0, 3, 1, 2)
    return entries.view(*shape[1:], shape[0]).movedim(-1, 0) if form == "chwn" else entries.view(shape)


# ---- the cache of an input
def pruned(x: Tensor, real: Tensor | None, pruning: ActivationPruning, form: str) -> Cache:
    """The largest entries of a batch, of its real images alone: real (B,) in {0, 1}, or None (all are)."""
    k = count(x.numel(), pruning.share)
    x = x.detach()
    if real is None:
        where, values = by_rows(partial(_pruned, pruning.cache, k, transposed(x.shape, form)), flat(x, form), None)
        return where, values
    held = x * real.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    kept = topk.counts(real.sum().double() * prod(x.shape[1:]), pruning.share)
    where, values = by_rows(partial(_pruned, pruning.cache, k, transposed(x.shape, form)), flat(held, form), kept)
    return where, values


def _pruned(cache: str, k: int, transposed: tuple[int, int], x: Tensor, kept: Tensor | None) -> Cache:
    bits, values = topk.select(x.contiguous(), kept, k, transposed)
    return (bits if cache == "bitmap" else topk.positions(bits, x.shape[1], k)), values


def pruned_pack(x: Tensor, real: Tensor | None, pruning: ActivationPruning, clients: int) -> Cache:
    """`pruned` for each of K stacked clients: x (B, K · C, …) or features (K, B, F), real (K, B) or None; the cache is (K, …)."""
    rows = _rows(x.detach(), clients)
    k = count(rows[0].numel(), pruning.share)
    if real is None:
        return _pruned(pruning.cache, k, (1, 1), rows.flatten(1), None)
    kept = topk.counts(real.sum(1).double() * prod(rows.shape[2:]), pruning.share)
    return _pruned(pruning.cache, k, (1, 1), (rows * real.to(x.dtype).view(*real.shape, *[1] * (rows.dim() - 2))).flatten(1), kept)


def _rows(x: Tensor, clients: int) -> Tensor:
    """(K, B, …)."""
    return x if x.dim() == 3 else x.unflatten(1, (clients, -1)).transpose(0, 1)


def restored(cache: Cache, shape: torch.Size, form: str | int) -> Tensor:
    """x~: the kept entries in their places, 0 elsewhere; form: the memory layout of x, or the number of stacked clients."""
    if isinstance(form, int):
        (rows,) = _restored(prod(shape) // form, *cache)
        packed = len(shape) == 3
        return rows.view(shape) if packed else rows.view(form, shape[0], shape[1] // form, *shape[2:]).transpose(0, 1).reshape(shape)
    (entries,) = by_rows(partial(_restored, prod(shape)), *cache)
    return shaped(entries, shape, form)


def _restored(entries: int, where: Tensor, values: Tensor) -> tuple[Tensor]:
    if where.dtype == torch.int32:
        return (values.new_zeros(len(values), entries).scatter_add_(1, where.long(), values),)
    return (topk.restore(where.contiguous(), values.contiguous(), entries),)


# ---- layers with a weight
@dataclass(frozen=True)
class Convolution:
    """A convolution: stride, padding, dilation and groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        op = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return op(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        sizes, none = [weight.shape[0]], [0] * len(self.stride)
        way = (self.stride, self.padding, self.dilation, False, none, self.groups)
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(g, x, weight, sizes, *way, list(wanted))
        return found


@dataclass(frozen=True)
class Product:
    """A linear map of the last axis."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        by_x = (rows @ weight).view(x.shape) if wanted[0] else None
        return by_x, (inputs.t() @ rows).t() if wanted[1] else None, rows.sum(0) if wanted[2] else None


@dataclass(frozen=True)
class Products:
    """Linear maps of K stacked clients: x (K, B, F), weight (K, O, F), bias (K, O)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, transposed)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        by_x = torch.bmm(g, weight) if wanted[0] else None
        return by_x, torch.bmm(g.transpose(1, 2), x) if wanted[1] else None, g.sum(1) if wanted[2] else None


def operation(layer: Any) -> Convolution | Product:
    """The operation of a convolution or a linear layer, as a function of its input and weight."""
    if isinstance(layer, nn.Linear):
        return Product()
    padding = layer.padding
    if isinstance(padding, str):
        same = [dilation * (kernel - 1) // 2 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = tuple(same) if padding == "same" else (0,) * len(same)
    return Convolution(layer.stride, padding, layer.dilation, layer.groups)


@dataclass(frozen=True)
class WeightTap:
    """A gradient tap: `callback` gets the dense gradient of the effective weight; what it returns is the gradient of `tap_inputs`."""

    callback: Callable[[Tensor], dict[str, Tensor]]
    tap_inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """The operation of a layer, and what it keeps for its backward pass."""

    op: Convolution | Product | Products
    over: str = ""  # a normalised weight's statistics; empty: the weight is used as it is
    tap: WeightTap | None = field(default=None, compare=False)
    form: str | int = "contiguous"
    kept_positions: KeptPositions | None = field(
        default=None, compare=False
    )  # the weight comes as its kept values (nnz,), and so does its gradient

    def stored(self, weight: Tensor) -> Tensor:
        """The dense weight."""
        return weight if self.kept_positions is None else self.kept_positions.spread(weight)

    def weight(self, x: Tensor, weight: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
        """The effective weight, in the dtype of x."""
        weight = self.stored(weight)
        return (weight if gain is None else normalised(weight, gain, mask, self.over)).to(x.dtype)

    def slopes(self, dense: Tensor, weight: Tensor, gain: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of the given weight and of the gain, from the `dense` gradient of the effective weight."""
        moved, gained = (dense, None) if gain is None else slopes(dense, self.stored(weight), gain, mask, self.over)
        return moved if self.kept_positions is None else self.kept_positions.values(moved), gained

    def __call__(
        self, x: Tensor, cache: Cache | None, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The layer's result; its backward pass reads the cache in place of x."""
        where, values = cache or (None, None)
        out: Tensor = applied(_Layer, self, x, where, values, bias, weight, gain, mask, *(self.tap.tap_inputs if self.tap else ()))
        return out


class _Layer(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        way: Layer, x: Tensor, where: Any, values: Any, bias: Tensor | None, weight: Tensor, gain: Any, mask: Any, *tap_inputs: Tensor
    ) -> Tensor:
        return way.op(x, way.weight(x, weight, gain, mask), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.way, x, where, values, bias, weight, gain, mask, *tap_inputs = inputs
        ctx.shape, ctx.biased = x.shape, bias is not None
        ctx.dtypes = [tap_input.dtype for tap_input in tap_inputs]
        ctx.save_for_backward(x if where is None else None, where, values, weight, gain, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, where, values, weight, gain, mask = ctx.saved_tensors
        way: Layer = ctx.way
        x = x if where is None else restored((where, values), ctx.shape, way.form)
        _, by_x, _, _, by_bias, by_weight, by_gain, *_ = ctx.needs_input_grad
        learns = by_weight or by_gain or way.tap is not None
        used = way.weight(x, weight, gain, mask)
        into, dense, shift = way.op.backward(g, x, used, (by_x, learns, by_bias and ctx.biased))
        del x, used
        found: list[Any] = []
        if way.tap is not None:
            found_by_tap = way.tap.callback(cast(Tensor, dense).detach().to(weight.dtype))
            found = [value.to(dtype) for value, dtype in zip(found_by_tap.values(), ctx.dtypes, strict=True)]
        moved = gained = None
        if by_weight or by_gain:
            moved, gained = way.slopes(cast(Tensor, dense).to(weight.dtype), weight, gain, mask)
        return None, into, None, None, shift, moved, gained, None, *found
