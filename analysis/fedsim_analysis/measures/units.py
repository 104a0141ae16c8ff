"""Numbers in units of their size: prefixes of the SI for bytes, FLOPs and rates, percent for shares, minutes and hours for long times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PREFIXED = ("B", "FLOP", "B/s", "FLOP/s", "J")
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
MINUTE, HOUR = 60.0, 3600.0


@dataclass(frozen=True)
class Scale:
    """Multiply values by `factor` to show them in `units`; `units` is empty for a plain number."""

    factor: float
    units: str

    def axis(self, title: str) -> str:
        """The title of an axis, with the unit."""
        return f"{title} ({self.units})" if self.units else title


def scale_of(values: Any, units: str, share: bool = False, difference: bool = False) -> Scale:
    """The scale in which the largest of the values has one to three digits before the point."""
    if share:
        return Scale(100.0, "percentage points" if difference else "%")
    held = np.abs(np.asarray(values, dtype=float))
    most = float(held[np.isfinite(held)].max(initial=0.0))
    if units in PREFIXED:
        power = min(int(np.log10(most) // 3) if most >= 1 else 0, len(PREFIXES) - 1)
        power += 1 if most and round(most / 1000.0**power, 6) >= 1000 and power < len(PREFIXES) - 1 else 0
        return Scale(1000.0**-power, PREFIXES[power] + units)
    if units == "s":
        return Scale(1 / HOUR, "h") if most >= 2 * HOUR else Scale(1 / MINUTE, "min") if most >= 5 * MINUTE else Scale(1.0, "s")
    return Scale(1.0, "" if units == "1" else units)


def readable(value: float, units: str, share: bool = False) -> str:
    """One number with its unit, three digits: "44.7 MB", "97.5 %"; "-" where it is no number."""
    if not np.isfinite(value):
        return "-"
    scale = scale_of([float(f"{value:.3g}")], units, share)
    shown = f"{value * scale.factor:.1f}" if share else f"{value * scale.factor:.3g}"
    return f"{shown} {scale.units}".strip()
