"""One flipped bit, found by a CRC-32 and turned back.

A message with its CRC-32 is a code of Hamming distance 3 or more, up to 2^32 bits. So from a wrong checksum follows which bit is wrong, if
it is one alone, of the message or of the checksum. Other damage passes for one flipped bit with a chance of (bits of the message) / 2^32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

LONGEST = 2**16  # bytes of a message in which a flipped bit is sought: a chance of 1 in 8,000 to take other damage for it


def _table() -> tuple[list[int], list[int]]:
    """What each byte adds to a CRC-32, and by its highest byte which byte that was."""
    added = [crc32(bytes([byte])) ^ crc32(b"\0") for byte in range(256)]
    places = [0] * 256
    for byte, value in enumerate(added):
        places[value >> 24] = byte
    return added, places


ADDED, PLACES = _table()
LAST = {ADDED[1 << bit]: bit for bit in range(8)}  # what each bit of the last byte changes


def corrected(message: bytes, checksum: int) -> bytes | None:
    """The message whose checksum this is, but for one flipped bit in one of the two; None where more is wrong."""
    effect = crc32(message) ^ checksum
    if effect & (effect - 1) == 0:  # at most one bit, of the checksum
        return message
    if len(message) > LONGEST:
        return None
    for place in range(len(message) - 1, -1, -1):
        if effect in LAST:
            return message[:place] + bytes([message[place] ^ 1 << LAST[effect]]) + message[place + 1 :]
        byte = PLACES[effect >> 24]
        effect = ((effect ^ ADDED[byte]) << 8 | byte) & 0xFFFFFFFF
    return None


def corrected_row(row: NDArray[np.float64], checksum: int) -> NDArray[np.float64] | None:
    """The same for a row of numbers, whose checksum is that of their bytes."""
    fixed = corrected(row.astype("<f8").tobytes(), checksum)
    return None if fixed is None else np.frombuffer(fixed, "<f8").reshape(row.shape).astype(np.float64)


def corrected_value(value: str | int | float, checksum: int) -> str | int | float | None:
    """The same for an attribute, whose checksum is that of what `repr` gives."""
    for changed in _one_bit_away(value):
        if crc32(repr(changed).encode()) == checksum:
            return changed
    return value if (crc32(repr(value).encode()) ^ checksum).bit_count() == 1 else None


def _one_bit_away(value: str | int | float) -> Iterator[str | int | float]:
    if isinstance(value, str):
        yield from _texts(value.encode())
        return
    kind = np.dtype("<f8" if isinstance(value, float) else "<i8")
    if kind.kind == "i" and not -(2**63) <= value < 2**63:
        return
    bits = np.array(value, kind).reshape(1).view("<u8") ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))
    yield from bits.view(kind).tolist()


def _texts(text: bytes) -> Iterator[str]:
    """All texts of one other bit. Their number times their length is what the search takes, so long ones are left."""
    if len(text) > LONGEST // 8:
        return
    for place, byte in enumerate(text):
        for bit in range(8):
            with suppress(UnicodeError):
                yield (text[:place] + bytes([byte ^ 1 << bit]) + text[place + 1 :]).decode()
