"""Signs for terminals and files that take ASCII alone: one for each, so that lines keep their length."""

from __future__ import annotations

import unicodedata

EQUAL = {"…": ".", "•": ".", "·": ".", "├": "|", "┤": "|", "│": "|", "─": "-", "━": "-"}


def ascii_only(text: str) -> str:
    return text if text.isascii() else "".join(_ascii(sign) for sign in text)


def _ascii(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in EQUAL:
        return EQUAL[sign]
    if "\u2500" <= sign <= "\u257f":  # corners of boxes
        return "+"
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()[:1] or "?"
