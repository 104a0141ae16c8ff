"""Range checks of the fields of a method or a job."""

from __future__ import annotations

from math import inf

TINY = 1e-12  # the lower end of a range that 0 is not in


def within(settings: object, **ranges: tuple[float, float]) -> None:
    """ValueError for a field of `settings` that is outside of its range (low, high), ends included; None is left alone. TINY: above 0."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            whole = "at least {}" if high == inf else "above 0 and at most {1}" if low == TINY else "from {} to {}"
            raise ValueError(f"{name} = {value}; it is {whole.format(low, high)}")
