"""Text of run files as matplotlib shall show it: to the letter, never as a formula, and without signs that no font has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.textpath import text_to_path

FONT = "DejaVu Sans"  # comes with matplotlib, so that a figure is the same everywhere
WIDER = (  # for signs that it has not; those that a machine has
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Malgun Gothic", "Yu Gothic", "Arial Unicode MS"),
    *("Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Segoe UI Symbol"),
)


@cache
def families() -> tuple[str, ...]:
    """The fonts of the figures, the first being used wherever it has the sign."""
    there = {entry.name for entry in font_manager.fontManager.ttflist}
    return (FONT, *(name for name in WIDER if name in there))


@cache
def _signs() -> frozenset[int]:
    """The code points that one of the fonts has."""
    paths = [font_manager.findfont(name) for name in families()]
    return frozenset(sign for path in paths for sign in font_manager.get_font(Path(path)).get_charmap())


def plain(text: str) -> str:
    """One line that matplotlib shows as it is. A sign that no font has is shown by its number: "\\u4e2d"."""
    return _known(text).replace("$", r"\$")


def _known(text: str) -> str:
    line = " ".join(text.split())
    return "".join(sign if ord(sign) in _signs() else sign.encode("ascii", "backslashreplace").decode() for sign in line)


def shortened(texts: Sequence[str], most: int) -> list[str]:
    """Each text, as `plain` gives it, with its middle left out where it has more than `most` signs; whole where two would then be equal."""
    known = [_known(text) for text in texts]
    short = [_short(text, most) for text in known]
    return [(text if short.count(cut) > known.count(text) else cut).replace("$", r"\$") for text, cut in zip(known, short, strict=True)]


def brief(text: str, most: int) -> str:
    """The text itself, on one line, with its middle left out where it has more than `most` signs; not escaped."""
    return _short(_known(text), most)


def _short(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def wrapped(text: str, size: float, room: float) -> str:
    """The text, as `plain` gave it, in as many lines as it needs in `room` inches; no word and no unit in brackets is broken."""
    lines = [""]
    for word in re.findall(r"\([^()]*\)\S*|\S+", text):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def width_of(text: str, size: float) -> float:
    """Inches that a text of this size in points takes."""
    prop = font_manager.FontProperties(family=list(families()), size=size)
    return float(text_to_path.get_text_width_height_descent(text.replace(r"\$", "$"), prop, False)[0]) / 72
