"""Selects the largest entries of a tensor, for scaled activation pruning: a bit for each position, and the values of the set bits.

FedMef (Huang et al., CVPR 2024, arXiv:2403.14737), specification section 3.4. Nothing is sorted: the bits of |x|, read as an integer,
sort as |x| does, so the smallest kept entry is found by counting leading bits, then those behind them among the few that agree.

Shapes: K rows (clients), M entries of a row, k of them kept. Bit t of byte j belongs to entry 8 j + t.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.core.activation_pruning import bits as bits_of
from fedsim.kernels.activation_pruning import entries, words
from fedsim.kernels.activation_pruning.entries import FIRST, NEXT
from fedsim.kernels.vectors import HAS_512

SPREAD = 64  # tables that a device counts into side by side
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def counts(sizes: Tensor, share: float) -> Tensor:
    """`activation_pruning.count` of each row, int64."""
    return (sizes.long() - ((1 - share) * sizes.double() + 0.5).long()).clamp(min=1)


def select(x: Tensor, kept: Tensor | None, k: int, transposed: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """(bits (K, ceil(M / 8)) uint8, values (K, k)) of the largest |x| in every row of x (K, M); of equal ones the first.

    kept (K,) int64, at most k: so many in each row, and zeros behind their values; None: k in all. transposed (S, T): the memory of a
    row is (…, S, T), and "the first" of equal ones means the order of (…, T, S); among zeros it does not matter.
    """
    bits = x.new_empty(len(x), bits_of(x.shape[1]), dtype=torch.uint8)
    values = x.new_zeros(len(x), k) if kept is not None else x.new_empty(len(x), k)
    if x.device.type != "cpu":
        kept = x.new_full((len(x),), k, dtype=torch.int64) if kept is None else kept
        if transposed != (1, 1) or not _by_triton(x):
            return _select_anywhere(x, kept, values, transposed)
        from fedsim.kernels.activation_pruning import topk_cuda

        held = values.view(INTEGERS[x.dtype])
        return topk_cuda.select(x.detach().view(INTEGERS[x.dtype]), kept, held, _magnitude(x.dtype))[0], values
    wanted = np.full(len(x), k, np.int64) if kept is None else kept.numpy()
    given = _integers(x), wanted, _integers(values), bits.numpy()
    if HAS_512 and x.dtype == torch.float32:
        words.select(*given, *transposed)
    else:
        entries.select(*given, _magnitude(x.dtype), *transposed)
    return bits, values


def restore(bits: Tensor, values: Tensor, size: int) -> Tensor:
    """x~ (K, M): the values at their positions, 0 elsewhere."""
    if bits.device.type != "cpu" and _by_triton(values):
        from fedsim.kernels.activation_pruning import topk_cuda

        return topk_cuda.restore(bits, values.view(INTEGERS[values.dtype]), size).view(values.dtype)
    if bits.device.type != "cpu":
        kept = _unpacked(bits, size)
        place = kept.cumsum(1).sub_(1).clamp_(0, values.shape[1] - 1)
        return torch.where(kept, values.gather(1, place), 0)
    out = values.new_empty(len(values), size)
    way = words.restore if HAS_512 and values.dtype == torch.float32 else entries.restore
    way(bits.numpy(), _integers(values), _integers(out))
    return out


def positions(bits: Tensor, size: int, k: int) -> Tensor:
    """(K, k) int32 positions of the set bits, in order; the rest of a row is filled with positions whose value is 0."""
    kept = _unpacked(bits, size)
    place = torch.where(kept, kept.cumsum(1) - 1, k)
    every = torch.arange(size, dtype=torch.int32, device=bits.device).expand(len(bits), -1)
    return torch.zeros(len(bits), k + 1, dtype=torch.int32, device=bits.device).scatter_(1, place, every)[:, :k].clone()


def where_positive(x: Tensor, out: Tensor, top: float, scale: float) -> Tensor:
    """bits (K, ceil(M / 8)) of 0 < x < top for x (K, M); out, which may be x, becomes scale · min(max(x, 0), top)."""
    inside = x.new_empty(len(x), bits_of(x.shape[1]), dtype=torch.uint8)
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        inside = _packed((x > 0) & (x < top))
        torch.clamp(x, 0, top, out=out)
        if scale != 1:
            out.mul_(scale)
        return inside
    entries.positive(x.numpy(), out.numpy(), inside.numpy(), x.numpy().dtype.type(top), x.numpy().dtype.type(scale))
    return inside


def where_set(g: Tensor, bits: Tensor, scale: float) -> Tensor:
    """scale · g (K, M) where a bit is set, 0 elsewhere."""
    if g.device.type != "cpu":
        out = torch.where(_unpacked(bits, g.shape[1]), g, 0)
    else:
        out = torch.empty_like(g)
        way = words.passed if g.dtype == torch.float32 else entries.passed
        way(_integers(g), bits.numpy(), _integers(out))
    return out if scale == 1 else out.mul_(scale)


def _integers(x: Tensor) -> Any:
    return x.detach().view(INTEGERS[x.dtype]).numpy()


def _magnitude(dtype: torch.dtype) -> int:
    """Number of bits of |x|."""
    return 8 * dtype.itemsize - 1


def _by_triton(x: Tensor) -> bool:
    """Whether Triton's kernels can take x; torch's own operations give the same bits, more slowly."""
    return x.is_cuda and x.dtype != torch.float64 and _compiles(str(x.device))


@cache
def _compiles(device: str) -> bool:
    """Whether Triton can make kernels for a device (it wants a C compiler where it runs)."""
    try:
        from fedsim.kernels.activation_pruning import topk_cuda  # here, for Triton is not on every machine

        one = torch.ones(1, 8, dtype=torch.int32, device=device)
        topk_cuda.select(one, one[:, 0].long(), one[:, :1].clone(), _magnitude(torch.float32))
    except Exception:
        return False
    return True


# ---- on any device, in torch's own operations, without asking the device for a number
def _select_anywhere(x: Tensor, kept: Tensor, values: Tensor, transposed: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    keys = x.detach().view(INTEGERS[x.dtype])
    keys = (keys.int() if keys.dtype == torch.int16 else keys) & ((1 << _magnitude(x.dtype)) - 1)
    shift, need = _magnitude(x.dtype), kept
    least = torch.zeros(len(x), 1, dtype=keys.dtype, device=x.device)
    while shift > 0:
        width = min(shift, FIRST if shift == _magnitude(x.dtype) else NEXT)
        agree = None if shift == _magnitude(x.dtype) else keys >> shift == least >> shift
        shift -= width
        found = _counted((keys >> shift) & ((1 << width) - 1), agree, width)
        above = found.flip(1).cumsum(1).flip(1)  # in this bin and those above it
        place = (above >= need.unsqueeze(1)).sum(1, keepdim=True) - 1
        need = need - (above - found).gather(1, place).squeeze(1)
        least = least | (place.to(keys.dtype) << shift)
    equal = keys == least
    before = equal.view(len(x), -1, *transposed).transpose(2, 3).flatten(1).cumsum(1)
    before = before.view(len(x), -1, transposed[1], transposed[0]).transpose(2, 3).flatten(1)
    chosen = (keys > least) | (equal & (before <= need.unsqueeze(1)))
    place = torch.where(chosen, chosen.cumsum(1) - 1, values.shape[1])
    wide = torch.cat([torch.zeros_like(values), values.new_zeros(len(x), 1)], 1).scatter_(1, place, x.detach())
    return _packed(chosen), wide[:, :-1].clone()


def _counted(bins: Tensor, agree: Tensor | None, width: int) -> Tensor:
    """(K, 2^width) how many entries that agree lie in each bin."""
    table = torch.zeros(len(bins), SPREAD << width, dtype=torch.int64, device=bins.device)
    lane = torch.arange(bins.shape[1], device=bins.device) % SPREAD
    one = torch.ones((), dtype=torch.int64, device=bins.device).expand(bins.shape) if agree is None else agree.long()
    return table.scatter_add_(1, bins.long() + (lane << width), one).view(len(bins), SPREAD, -1).sum(1)


def _packed(chosen: Tensor) -> Tensor:
    """(K, M) bool as (K, ceil(M / 8)) bytes."""
    whole = F.pad(chosen, (0, -chosen.shape[1] % 8)).view(len(chosen), -1, 8)
    return (whole.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=chosen.device)).sum(-1, dtype=torch.uint8)


def _unpacked(bits: Tensor, entries: int) -> Tensor:
    """(K, M) bool."""
    each = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return each.flatten(1)[:, :entries].bool()
