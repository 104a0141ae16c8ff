"""Convolutions of K stacked clients as one batched product: windows are laid out beside each other, and bmm multiplies every client's.

Shapes: B images, x (B, K · C, H, W), L positions of the result. A grouped convolution is the same sum; which is faster depends on the
device, and the plan measures it. Where a dtype is given, products are of values rounded to it, and all else is float32.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.tree import Tree
from fedsim.nn.packed_program import MADE, Keys, Makers, PackedProgram, Stage, program


def by_products(module: nn.Module, low: torch.dtype | None = None) -> PackedProgram | None:
    """The module as a program, its convolutions as products; None where `packed_program.program` has none."""
    return program(module, _made(low))


def _made(low: torch.dtype | None) -> Makers:
    ours: Makers = {nn.Conv2d: partial(_conv2d, low), nn.Linear: partial(_linear, low)}
    return MADE | ours | ({nn.GroupNorm: _group_norm} if low else {})


def _conv2d(low: torch.dtype | None, layer: nn.Conv2d, keys: Keys) -> Stage | None:
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1):
        return MADE[nn.Conv2d](layer, keys) if low is None else None

    def convolved(x: Tensor, weights: Tree, clients: int) -> Tensor:
        windows, (height, width) = _windows(_rounded(x, low), layer, clients)
        weight = _rounded(weights[keys["weight"]], low).flatten(2)  # (K, O, C kh kw)
        shift = _rounded(weights[keys["bias"]], low).unsqueeze(2) if "bias" in keys else None
        out = torch.bmm(weight, windows) if shift is None else torch.baddbmm(shift, weight, windows)  # (K, O, B L)
        return out.flatten(0, 1).view(-1, len(x), height, width).transpose(0, 1)

    return convolved


def _windows(x: Tensor, layer: nn.Conv2d, clients: int) -> tuple[Tensor, tuple[int, int]]:
    """(K, C kh kw, B L), and the height and width of the result."""
    (kernel_h, kernel_w), (down, across), (top, left) = layer.kernel_size, layer.stride, cast(tuple[int, int], layer.padding)
    padded = F.pad(x, (left, left, top, top)) if top or left else x
    seen = padded.unfold(2, kernel_h, down).unfold(3, kernel_w, across)  # (B, K C, H', W', kh, kw)
    height, width = seen.shape[2:4]
    seen = seen.unflatten(1, (clients, -1)).permute(1, 2, 5, 6, 0, 3, 4)  # (K, C, kh, kw, B, H', W')
    return seen.reshape(clients, layer.in_channels * kernel_h * kernel_w, len(x) * height * width), (height, width)


def _linear(low: torch.dtype | None, layer: nn.Linear, keys: Keys) -> Stage:
    def product(x: Tensor, weights: Tree, clients: int) -> Tensor:
        weight = _rounded(weights[keys["weight"]], low).transpose(1, 2)
        out = torch.bmm(_rounded(x, low), weight)
        out = out if low is None else out.float()
        return out + weights[keys["bias"]].unsqueeze(1) if "bias" in keys else out

    return product


def _group_norm(layer: nn.GroupNorm, keys: Keys) -> Stage:
    made = MADE[nn.GroupNorm](layer, keys)
    assert made is not None
    return lambda x, weights, clients: made(x.float(), weights, clients)


def _rounded(value: Tensor, low: torch.dtype | None) -> Tensor:
    return value if low is None else value.to(low)
