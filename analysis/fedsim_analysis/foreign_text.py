"""Text that comes from run files: shown as it is, never obeyed by a terminal or a spreadsheet."""

from __future__ import annotations

from math import isfinite
from unicodedata import category

SPACES = "Zs"  # the kind of all spaces
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that a spreadsheet would compute


def printable(text: object, kept: str = "") -> str:
    """The text, with signs that steer a terminal or the direction of reading, and others that nobody sees, written as escapes: \\x1b.

    Spaces of all kinds stay, and the signs in `kept`.
    """
    return "".join(sign if sign.isprintable() or sign in kept or category(sign) == SPACES else _escaped(sign) for sign in str(text))


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape", "surrogatepass").decode("ascii")


def no_formula(text: str) -> str:
    """With a ' before it, where a spreadsheet would take it for a formula. Numbers stay as they are."""
    return f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
