"""What a stream cannot take is written in signs that it can, or left out where its disk is full: neither ends a command."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from typing import Any

from fedsim.errors import FULL

NAME = "fedsim.signs"
SIGNS = {
    "…": "...", "±": "+/-", "→": "->", "←": "<-", "↑": "^", "↓": "v", "×": "x", "·": ".", "•": "*", "–": "-", "—": "-", "−": "-",
    "≥": ">=", "≤": "<=", "≈": "~", "’": "'", "‘": "'", "“": '"', "”": '"', "µ": "u", "μ": "u", "█": "#", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip


def print_what_can_be_printed() -> None:
    """From now on the two streams of this process write other signs for those that their encoding lacks, and leave out what has no room.

    A stream that was closed (`>&-`) leaves out everything.
    """
    _open_closed()
    codecs.register_error(NAME, _replaced)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAME)
            if stream is getattr(sys, f"__{name}__"):
                setattr(sys, name, _roomless(stream))


def _open_closed() -> None:
    """Fills the places of closed streams: the next file that is opened would take them, and get what libraries print there."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), line_buffering=True))


class Lossy(io.FileIO):
    """A file that leaves out what its full disk cannot take."""

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in FULL:
                raise
            Lossy.lost = True
            return len(data)


def _roomless(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream on a Lossy file."""
    raw = Lossy(stream.fileno(), "w", closefd=False)
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, NAME, line_buffering=stream.line_buffering, write_through=stream.write_through)


def code_of_lost_output() -> int:
    """1, with a message, where a stream could not take all that this process printed; 0 otherwise."""
    sys.stdout.flush()
    if Lossy.lost:
        sys.stderr.write("the disk is full: not all of the output could be written\n")
    return int(Lossy.lost)


def plain(sign: str) -> str:
    """A sign in ASCII: its equivalent, or its letter without accents, or a question mark."""
    if sign in SIGNS:
        return SIGNS[sign]
    if "\u2500" <= sign <= "\u257f":  # lines of boxes
        return "|" if sign in "│┃║╎╏┆┇┊┋" else "-" if sign in "─═╌╍┄┅┈┉" else "+"
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file name that Python could not read (lone surrogates) are written as they were."""
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return plain(sign), error.start + 1
