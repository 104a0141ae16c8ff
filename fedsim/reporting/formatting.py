"""Numbers as a person reads them."""

from __future__ import annotations

from datetime import timedelta

import numpy as np

CENTURY = 3e9  # seconds, beyond which there is no count of days
SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 44,734,248 B is "44.7 MB"; not-a-number is "-"."""
    if not np.isfinite(value):
        return "-"
    scale, prefix = next(((scale, prefix) for scale, prefix in SCALES if abs(value) >= scale), (1.0, ""))
    scaled = value / scale
    return f"{scaled:.{max(0, 2 - int(np.log10(max(abs(scaled), 1))))}f} {prefix}{unit}" if prefix else f"{scaled:.3g} {unit}"


def part(value: float, whole: float, unit: str) -> str:
    """ "1.33 of 57.9 GFLOP/s": both with the prefix of the whole."""
    scale = next((scale for scale, _ in SCALES if abs(whole) >= scale), 1.0)
    return f"{value / scale:.3g} of {quantity(whole, unit)}"


def share(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "-"


def duration(seconds: float) -> str:
    """ "0.42 s", "12.3 s", then "0:03:20"."""
    if not np.isfinite(seconds):
        return "-"
    return str(timedelta(seconds=round(seconds))) if 100 <= seconds < CENTURY else f"{seconds:.3g} s"
