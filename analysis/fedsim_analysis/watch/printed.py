"""Text of others and numbers, as a terminal shows them."""

from __future__ import annotations

from datetime import timedelta

import numpy as np

from fedsim_analysis.foreign_text import printable

CENTURY = 3e9  # seconds, beyond which there is no count of days
SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LARGE = 1e4  # beyond which a share is no share
MOST = 300  # letters of a text of others


def shown(text: object, most: int = MOST) -> str:
    """One line of `most` letters at most. Signs that would steer a terminal, and those that nobody sees, are written as escapes."""
    found = printable(str(text)[: most + 1].translate(dict.fromkeys(map(ord, "\n\t"), " ")))
    return found if len(found) <= most else f"{found[: most - 1]}…"


def share(value: float) -> str:
    return f"{value:.1%}" if abs(value) < LARGE else number(value)


def number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 44,734,248 B is "44.7 MB"; not-a-number is "-"."""
    if not np.isfinite(value):
        return "-"
    scale, prefix = scale_of(value)
    scaled = value / scale
    return f"{scaled:.{max(0, 2 - int(np.log10(max(abs(scaled), 1))))}f} {prefix}{unit}" if prefix else f"{scaled:.3g} {unit}"


def scale_of(value: float) -> tuple[float, str]:
    """The largest power of a thousand that is not above the value, and its prefix."""
    return next(((scale, prefix) for scale, prefix in SCALES if abs(value) >= scale), (1.0, ""))


def duration(seconds: float) -> str:
    """ "0.42 s", "12.3 s", then "0:03:20"."""
    if not np.isfinite(seconds):
        return "-"
    return str(timedelta(seconds=round(seconds))) if 100 <= seconds < CENTURY else f"{seconds:.3g} s"


def left(seconds: float) -> str:
    """ "about 0:03:20 left"; nothing where that is not known."""
    if not 0 <= seconds < CENTURY:
        return ""
    return f"about {timedelta(seconds=round(seconds))} left"


def ago(seconds: float) -> str:
    """ "just now", "3 s ago", "5 min ago", "7 h ago", "4 days ago"."""
    for unit, length in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= length:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.0f} {unit} ago"
    return f"{seconds:.0f} s ago" if seconds >= 1 else "just now"
