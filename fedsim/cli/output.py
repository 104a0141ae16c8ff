"""What a stream cannot take is written in signs that it can: no locale ends a command."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

NAME = "fedsim.signs"
SIGNS = {
    "…": "...", "±": "+/-", "→": "->", "←": "<-", "↑": "^", "↓": "v", "×": "x", "·": ".", "•": "*", "–": "-", "—": "-", "−": "-",
    "≥": ">=", "≤": "<=", "≈": "~", "’": "'", "‘": "'", "“": '"', "”": '"', "µ": "u", "μ": "u", "█": "#", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip


def print_what_can_be_printed() -> None:
    """From now on the two streams of this process write other signs for those that their encoding lacks."""
    codecs.register_error(NAME, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAME)


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
