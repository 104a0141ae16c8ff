"""The compiled loops of `topk`, entry by entry, for integers of any width."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.core.compiled import inlined, kernel

FIRST, NEXT = 11, 10  # bits that are counted at once: of all entries, of those that are still undecided


@inlined
def leading(x: Any, magnitude: Any, shift: Any) -> Any:  # pragma: no cover - compiled
    """How many entries have each value of the leading bits; four tables, for equal neighbours would wait for each other."""
    mask = (np.int64(1) << magnitude) - 1 if magnitude < 63 else np.int64(0x7FFFFFFFFFFFFFFF)
    tables = np.zeros((4, 1 << (magnitude - shift)), np.int32)
    whole = x.size - x.size % 4
    for i in range(0, whole, 4):
        tables[0, (np.int64(x[i]) & mask) >> shift] += 1
        tables[1, (np.int64(x[i + 1]) & mask) >> shift] += 1
        tables[2, (np.int64(x[i + 2]) & mask) >> shift] += 1
        tables[3, (np.int64(x[i + 3]) & mask) >> shift] += 1
    for i in range(whole, x.size):
        tables[0, (np.int64(x[i]) & mask) >> shift] += 1
    return tables[0] + tables[1] + tables[2] + tables[3]


@inlined
def kth_bin(table: Any, k: Any) -> Any:  # pragma: no cover - compiled
    """(the bin in which the k-th largest lies, how many of its entries are among the k)."""
    for j in range(table.size - 1, -1, -1):
        if k <= table[j]:
            return j, k
        k -= table[j]
    return 0, k


@inlined
def _threshold(x: Any, k: Any, magnitude: Any) -> Any:  # pragma: no cover - compiled
    """(|x| of the k-th largest as an integer, how many of those equal to it are among the k)."""
    mask = (np.int64(1) << magnitude) - 1 if magnitude < 63 else np.int64(0x7FFFFFFFFFFFFFFF)
    shift = magnitude - FIRST
    table = leading(x, magnitude, shift)
    place, k = kth_bin(table, k)
    near, found = np.empty(table[place] + 1, np.int64), 0
    for i in range(x.size):
        e = np.int64(x[i]) & mask
        near[found] = e
        found += (e >> shift) == place
    return decided(near, found, shift, k)


@inlined
def decided(near: Any, found: Any, shift: Any, k: Any) -> Any:  # pragma: no cover - compiled
    """(the k-th largest, how many of those equal to it are among the k) of the first `found` of near, which agree before `shift` bits."""
    while shift > 0:
        width = min(shift, NEXT)
        shift -= width
        inner = np.zeros(1 << width, np.int32)
        for i in range(found):
            inner[(near[i] >> shift) & ((1 << width) - 1)] += 1
        place, k = kth_bin(inner, k)
        left = 0
        for i in range(found):
            near[left] = near[i]
            left += ((near[i] >> shift) & ((1 << width) - 1)) == place
        found = left
    return near[0], k


@inlined
def place(i: Any, s: Any, t: Any) -> Any:  # pragma: no cover - compiled
    """Flat index of entry `i` after the last two axes (S, T) are swapped."""
    return i - i % (s * t) + (i % t) * s + i % (s * t) // t


@inlined
def limit(entries: Any, least: Any, ties: Any, magnitude: Any, s: Any, t: Any) -> Any:  # pragma: no cover - compiled
    """The place of the last entry equal to `least` that is taken; -1 if they are taken in the order of memory."""
    if t == 1 or least == 0:
        return np.int64(-1)
    mask = (np.int64(1) << magnitude) - 1 if magnitude < 63 else np.int64(0x7FFFFFFFFFFFFFFF)
    equal = 0
    for i in range(entries.size):
        equal += (np.int64(entries[i]) & mask) == least
    if equal == ties:
        return np.int64(-1)
    places, found = np.empty(equal, np.int64), 0
    for i in range(entries.size):
        if (np.int64(entries[i]) & mask) == least:
            places[found] = place(i, s, t)
            found += 1
    return np.sort(places)[ties - 1]


@inlined
def _taken(
    entries: Any, least: Any, ties: Any, held: Any, k: Any, bits: Any, magnitude: Any, limit: Any, s: Any, t: Any
) -> None:  # pragma: no cover - compiled
    """Writes the entries above `least`, and `ties` of those equal to it: the first, or up to the place `limit`."""
    mask = (np.int64(1) << magnitude) - 1 if magnitude < 63 else np.int64(0x7FFFFFFFFFFFFFFF)
    at = 0
    for j in range(bits.size):
        eight = entries[8 * j : 8 * j + 8]
        above, equal = np.int64(0), np.int64(0)
        for b in range(eight.size):
            e = np.int64(eight[b]) & mask
            above |= np.int64(e > least) << b
            equal |= np.int64(e == least) << b
        for b in range(8 if equal and ties else 0):
            if (equal >> b) & 1 and ties and (limit < 0 or place(8 * j + b, s, t) <= limit):
                above |= 1 << b
                ties -= 1
        bits[j] = above
        if at < k:
            for b in range(eight.size):
                held[min(at, k - 1)] = eight[b] if at < k else held[k - 1]
                at += int((above >> b) & 1)


@kernel
def select(x: Any, kept: Any, values: Any, bits: Any, magnitude: Any, s: Any, t: Any) -> None:  # pragma: no cover - compiled
    for row in range(x.shape[0]):
        least, ties = _threshold(x[row], kept[row], magnitude)
        last = limit(x[row], least, ties, magnitude, s, t)
        _taken(x[row], least, ties, values[row], kept[row], bits[row], magnitude, last, s, t)


@inlined
def _spread(byte: Any, held: Any, at: Any, into: Any) -> int:  # pragma: no cover - compiled
    kind = held.dtype.type
    for t in range(into.size):
        one = (byte >> np.uint8(t)) & np.uint8(1)
        into[t] = held[min(at, held.size - 1)] & -kind(one)
        at += one
    return at


@inlined
def _back(bits: Any, held: Any, out: Any) -> None:  # pragma: no cover - compiled
    kind = held.dtype.type
    at = 0
    for j in range(bits.size):
        byte, base = bits[j], 8 * j
        if base + 8 <= out.size and at + 8 < held.size:
            for t in range(8):
                one = (byte >> np.uint8(t)) & np.uint8(1)
                out[base + t] = held[at] & -kind(one)
                at += one
        else:
            at = _spread(byte, held, at, out[base : base + 8])


@kernel
def restore(bits: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    for row in range(out.shape[0]):
        _back(bits[row], values[row], out[row])


@inlined
def _clamped(x: Any, out: Any, bits: Any, top: Any, scale: Any) -> None:  # pragma: no cover - compiled
    zero = x.dtype.type(0)
    for j in range(bits.size):
        eight, into, byte = x[8 * j : 8 * j + 8], out[8 * j : 8 * j + 8], np.int64(0)
        for t in range(eight.size):
            value = eight[t]
            byte |= np.int64(value > zero and value < top) << t
            into[t] = scale * min(max(value, zero), top) if value == value else value
        bits[j] = byte


@kernel
def positive(x: Any, out: Any, bits: Any, top: Any, scale: Any) -> None:  # pragma: no cover - compiled
    for row in range(x.shape[0]):
        _clamped(x[row], out[row], bits[row], top, scale)


@inlined
def _held(g: Any, bits: Any, out: Any) -> None:  # pragma: no cover - compiled
    kind, last = g.dtype.type, g.size // 8
    for j in range(last):
        byte, base = np.int32(bits[j]), 8 * j
        for t in range(8):
            out[base + t] = g[base + t] & kind(-((byte >> np.int32(t)) & np.int32(1)))
    for i in range(8 * last, g.size):
        out[i] = g[i] & kind(-((np.int32(bits[last]) >> np.int32(i - 8 * last)) & np.int32(1)))


@kernel
def passed(g: Any, bits: Any, out: Any) -> None:  # pragma: no cover - compiled
    for row in range(g.shape[0]):
        _held(g[row], bits[row], out[row])
