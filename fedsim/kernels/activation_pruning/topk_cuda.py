"""The largest entries on CUDA, in Triton: what `topk` does on the CPU, without asking the device for a number.

Programs count the leading bits of a block of entries each, and what they find is added up; a few operations on the small tables say in
which bin the smallest kept entry lies. Positions follow from the blocks' own counts, so that no order of programs is seen in the
result. This module imports Triton: it is imported for tensors on CUDA alone, and by Triton's interpreter, which takes tensors on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # entries of a program; a multiple of 8
BITS = 10  # that are counted at once


@triton.jit
def _entries(x, row, i, M, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """|x| as an integer; -1 beyond the end."""
    e = tl.load(x + row * M + i, mask=i < M, other=0).to(tl.int32) & ((1 << MAGNITUDE) - 1)
    return tl.where(i < M, e, -1)


@triton.jit
def _count(x, least, table, M, SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds to the table how many of the entries, that agree with `least` in the bits above, have each value of the next ones."""
    block, row = tl.program_id(0), tl.program_id(1)
    e = _entries(x, row, block * BLOCK + tl.arange(0, BLOCK), M, MAGNITUDE)
    agree = e >= 0
    if not FIRST:
        agree = agree & (e >> (SHIFT + WIDTH) == tl.load(least + row) >> (SHIFT + WIDTH))
    bins = tl.where(agree, (e >> SHIFT) & ((1 << WIDTH) - 1), 0)
    found = tl.histogram(bins, 1 << WIDTH)
    at = tl.arange(0, 1 << WIDTH)
    found = tl.where(at == 0, found - tl.sum((agree == 0).to(tl.int32)), found)  # those that do not were counted as 0
    tl.atomic_add(table + (row << WIDTH) + at, found, mask=found > 0)


@triton.jit
def _tally(x, least, above, equal, M, blocks, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many entries of every block are above `least`, and equal to it."""
    block, row = tl.program_id(0), tl.program_id(1)
    e, limit = _entries(x, row, block * BLOCK + tl.arange(0, BLOCK), M, MAGNITUDE), tl.load(least + row)
    tl.store(above + row * blocks + block, tl.sum((e > limit).to(tl.int32)))
    tl.store(equal + row * blocks + block, tl.sum((e == limit).to(tl.int32)))


@triton.jit
def _write(x, least, ties, before, offsets, bits, values, M, blocks, size, k, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits and values of a block; `before` equal entries and `offsets` kept ones come in the blocks before it."""
    block, row = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    e, limit = _entries(x, row, i, M, MAGNITUDE), tl.load(least + row)
    equal = (e == limit).to(tl.int32)
    number = tl.load(before + row * blocks + block) + tl.cumsum(equal)
    kept = (e > limit) | ((equal == 1) & (number <= tl.load(ties + row)))
    place = tl.load(offsets + row * blocks + block) + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(values + row * k + place, tl.load(x + row * M + i, mask=i < M, other=0), mask=kept)
    eights = tl.reshape(kept.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + row * size + byte, tl.sum(eights, 1).to(tl.uint8), mask=byte < size)


@triton.jit
def _weigh(bits, kept, M, blocks, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many bits are set in every block."""
    block, row = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    one = (tl.load(bits + row * size + i // 8, mask=i < M, other=0).to(tl.int32) >> (i % 8)) & 1
    tl.store(kept + row * blocks + block, tl.sum(one))


@triton.jit
def _restore(bits, values, offsets, out, M, blocks, size, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The entries of a block."""
    block, row = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    one = (tl.load(bits + row * size + i // 8, mask=i < M, other=0).to(tl.int32) >> (i % 8)) & 1
    place = tl.load(offsets + row * blocks + block) + tl.cumsum(one) - 1
    tl.store(out + row * M + i, tl.load(values + row * k + place, mask=one == 1, other=0), mask=i < M)


def select(x: Tensor, kept: Tensor, values: Tensor, magnitude: int) -> tuple[Tensor, Tensor]:
    """(bits, values) of the largest |x| of every row; x (K, M) and values (K, k) as the integers of their bits, kept (K,)."""
    (rows, entries), size, blocks = x.shape, -(-x.shape[1] // 8), triton.cdiv(x.shape[1], BLOCK)
    grid, least, need, shift = (blocks, rows), x.new_zeros(rows, dtype=torch.int32), kept, magnitude
    while shift > 0:
        width = min(shift, BITS)
        shift -= width
        table = x.new_zeros(rows, 1 << width, dtype=torch.int32)
        _count[grid](x, least, table, entries, shift, width, shift + width == magnitude, magnitude, BLOCK)
        above = table.flip(1).cumsum(1).flip(1)  # in this bin and those above it
        place = (above >= need.unsqueeze(1)).sum(1, keepdim=True) - 1
        need = need - (above - table).gather(1, place).squeeze(1)
        least = least | (place.squeeze(1).int() << shift)
    over, equal = (x.new_empty(rows, blocks, dtype=torch.int32) for _ in range(2))
    _tally[grid](x, least, over, equal, entries, blocks, magnitude, BLOCK)
    before = equal.cumsum(1) - equal
    taken = torch.minimum((need.unsqueeze(1) - before).clamp(min=0), equal)
    held = over + taken
    bits = x.new_empty(rows, size, dtype=torch.uint8)
    offsets = held.cumsum(1) - held
    _write[grid](x, least, need, before, offsets, bits, values, entries, blocks, size, values.shape[1], magnitude, BLOCK)
    return bits, values


def restore(bits: Tensor, values: Tensor, entries: int) -> Tensor:
    """(K, M): the values (K, k), as integers, at the set bits, 0 elsewhere."""
    (rows, size), blocks = bits.shape, triton.cdiv(entries, BLOCK)
    kept, out = bits.new_empty(rows, blocks, dtype=torch.int32), values.new_empty(rows, entries)
    _weigh[blocks, rows](bits, kept, entries, blocks, size, BLOCK)
    offsets = kept.cumsum(1) - kept
    _restore[blocks, rows](bits, values, offsets, out, entries, blocks, size, values.shape[1], BLOCK)
    return out
