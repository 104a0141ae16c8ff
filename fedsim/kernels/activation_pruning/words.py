"""What `topk` does entry by entry, for float32 sixteen entries at a time: a word of 16 bits is a vector's mask.

Entries are moved and compared, never added, so the results are those of `topk`'s own loops, which take what is left of a row, every
other dtype, and, where a processor has no instructions that pack and unpack vectors, these two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels.activation_pruning.entries import FIRST, decided, kth_bin, leading, limit, place
from fedsim.kernels.vectors import INT, LONG, SIZE

WORD, MAGNITUDE = 16, 31  # entries, and bits of |x|
KIND, MASK, SHORT = ir.VectorType(INT, WORD), ir.VectorType(ir.IntType(1), WORD), ir.IntType(16)
ZEROS = ir.Constant(KIND, [0] * WORD)


def _load(builder: Any, address: Any) -> Any:
    value = builder.load(builder.inttoptr(address, KIND.as_pointer()))
    value.align = SIZE
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, KIND.as_pointer())).align = SIZE


def _mask(builder: Any, word: Any) -> Any:
    return builder.bitcast(builder.trunc(word, SHORT), MASK)


def _all(builder: Any, value: Any) -> Any:
    """A vector of one int32 sixteen times."""
    none = ir.Constant(KIND, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(none, builder.trunc(value, INT), INT(0)), none, ZEROS)


def _unpack(context: Any, word: Any, source: Any, target: Any) -> Any:
    """target[t] = the next of 16 entries at `source` where bit t of the word is set, 0 elsewhere. How many that were.

    The instruction on registers: that on memory, which reads no more entries than it needs, takes many times as long on some processors.
    """

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word, source, target = given
        kind = ir.FunctionType(KIND, [KIND, KIND, MASK])
        expand = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.expand.v16i32")
        entries = builder.asm(ir.FunctionType(KIND, [KIND]), "", "=v,0", [_load(builder, source)], False)  # else it is that on memory
        _store(builder, builder.call(expand, [entries, ZEROS, _mask(builder, word)]), target)
        return builder.ctpop(word)

    return types.intp(*[types.intp] * 3), code


def _pack(context: Any, word: Any, source: Any, away: Any, target: Any) -> Any:
    """The entries (& `away`) at `source` whose bit is set, side by side at `target`, where room for 16 is. How many there are."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word, source, away, target = given
        kind = ir.FunctionType(KIND, [KIND, MASK, KIND])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.experimental.vector.compress.v16i32")
        entries = builder.and_(_load(builder, source), _all(builder, away))
        _store(builder, builder.call(compress, [entries, _mask(builder, word), ZEROS]), target)
        return builder.ctpop(word)

    return types.intp(*[types.intp] * 4), code


def _pass_on(context: Any, word: Any, source: Any, target: Any) -> Any:
    """target[t] = source[t] where bit t of the word is set, 0 elsewhere."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word, source, target = given
        _store(builder, builder.select(_mask(builder, word), _load(builder, source), ZEROS), target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), code


_unpacked: Any = intrinsic(_unpack)
_packed: Any = intrinsic(_pack)
_passed_on: Any = intrinsic(_pass_on)


def _compared(how: str, shifted: bool) -> Any:
    @intrinsic
    def compared(context: Any, source: Any, magnitude: Any, number: Any) -> Any:
        """A word of which |entry| (without its last `magnitude` bits, if `shifted`) compares so with the number."""

        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            source, shift, number = given
            entries = builder.and_(_load(builder, source), ir.Constant(KIND, [0x7FFFFFFF] * WORD))
            entries = builder.lshr(entries, _all(builder, shift)) if shifted else entries
            word = builder.bitcast(builder.icmp_signed(how, entries, _all(builder, number)), SHORT)
            return builder.zext(word, LONG)

        return types.intp(*[types.intp] * 3), code

    return compared


_above, _equal, _leads = _compared(">", False), _compared("==", False), _compared("==", True)


@kernel
def restore(bits: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    """out (K, M) int32: the values (K, k) where bits (K, ceil(M / 8)) are set, 0 elsewhere."""
    for row in range(out.shape[0]):
        byte, held, into, at = bits[row], values[row], out[row], 0
        source, target, done = held.ctypes.data, into.ctypes.data, 0
        while done + WORD <= into.size and at + WORD <= held.size:
            word = np.int64(byte[done // 8]) | np.int64(byte[done // 8 + 1]) << 8
            at += _unpacked(word, source + SIZE * at, target + SIZE * done)
            done += WORD
        for i in range(done, into.size):
            one = (byte[i // 8] >> (i % 8)) & 1
            into[i] = held[at] if one else 0
            at += one


@kernel
def passed(g: Any, bits: Any, out: Any) -> None:  # pragma: no cover - compiled
    """out (K, M) int32 = g where bits (K, ceil(M / 8)) are set, 0 elsewhere."""
    for row in range(out.shape[0]):
        byte, given, into = bits[row], g[row], out[row]
        whole, source, target = into.size // WORD, given.ctypes.data, into.ctypes.data
        for j in range(whole):
            word = np.int64(byte[2 * j]) | np.int64(byte[2 * j + 1]) << 8
            _passed_on(word, source + SIZE * WORD * j, target + SIZE * WORD * j)
        for i in range(WORD * whole, into.size):
            into[i] = given[i] if (byte[i // 8] >> (i % 8)) & 1 else 0


@inlined
def _near(x: Any, place: int, shift: int, count: int) -> Any:  # pragma: no cover - compiled
    """|x| of the `count` entries whose bits before the last `shift` are `place`, and room for 16 more."""
    found, at = np.empty(count + WORD, np.int32), 0
    source, target, whole = x.ctypes.data, found.ctypes.data, x.size // WORD
    for j in range(whole):
        there = source + SIZE * WORD * j
        word = _leads(there, shift, place)
        if word:
            at += _packed(word, there, 0x7FFFFFFF, target + SIZE * at)
    for i in range(WORD * whole, x.size):
        e = x[i] & np.int32(0x7FFFFFFF)
        if e >> shift == place:
            found[at] = e
            at += 1
    return found


@inlined
def _taken(x: Any, least: int, ties: int, held: Any, k: int, bits: Any, limit: int, s: int, t: int) -> None:  # pragma: no cover - compiled
    """Bits of the entries above `least`, and of `ties` of those equal to it; their values."""
    at, whole, source, target = 0, x.size // WORD, x.ctypes.data, held.ctypes.data
    for j in range((x.size + WORD - 1) // WORD):
        there, few = source + SIZE * WORD * j, min(WORD, x.size - WORD * j)
        if j < whole:
            word, same = _above(there, 0, least), _equal(there, 0, least) if ties else 0
        else:
            word, same = _word(x[WORD * j :], least)
        for b in range(few if same and ties else 0):
            if (same >> b) & 1 and ties and (limit < 0 or place(WORD * j + b, s, t) <= limit):
                word |= 1 << b
                ties -= 1
        bits[2 * j] = word & 255
        if few > 8:
            bits[2 * j + 1] = word >> 8
        if j < whole and at + WORD <= k:
            at += _packed(word, there, -1, target + SIZE * at)
            continue
        for b in range(few):
            if (word >> b) & 1 and at < k:
                held[at] = x[WORD * j + b]
                at += 1


@inlined
def _word(x: Any, least: Any) -> Any:  # pragma: no cover - compiled
    """Words of the entries above `least` and equal to it, of fewer than 16."""
    higher, same = np.int64(0), np.int64(0)
    for b in range(x.size):
        e = np.int64(x[b]) & 0x7FFFFFFF
        higher |= np.int64(e > least) << b
        same |= np.int64(e == least) << b
    return higher, same


@kernel
def select(x: Any, kept: Any, values: Any, bits: Any, s: int, t: int) -> None:  # pragma: no cover - compiled
    """As `entries.select`, of int32."""
    for row in range(x.shape[0]):
        shift = MAGNITUDE - FIRST
        table = leading(x[row], MAGNITUDE, shift)
        bin_of, left = kth_bin(table, kept[row])
        least, ties = decided(_near(x[row], bin_of, shift, table[bin_of]), table[bin_of], shift, left)
        last = limit(x[row], least, ties, MAGNITUDE, s, t)
        _taken(x[row], least, ties, values[row], kept[row], bits[row], last, s, t)
