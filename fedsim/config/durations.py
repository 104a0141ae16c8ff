"""Lengths of time, as a number of minutes or as SLURM writes them."""

from __future__ import annotations

import re
from math import inf

TIME = re.compile(r"(?:(\d{1,5})-)?(\d{1,6})(?::(\d{1,4}))?(?::(\d{1,4}))?")
UNLIMITED = ("UNLIMITED", "INFINITE")
FORMS = "90 (minutes), 1:30 (minutes and seconds), 1:30:00, 2-12 (days and hours), 2-12:30, 2-12:30:00"


def seconds(time: str) -> float:
    """Seconds of a time in one of the FORMS. Infinite for UNLIMITED. ValueError for what is none.

    >>> seconds("90"), seconds("1:30"), seconds("1:30:00"), seconds("2-12")
    (5400, 90, 5400, 216000)
    """
    if time.upper() in UNLIMITED:
        return inf
    match = TIME.fullmatch(time)
    if not match:
        raise ValueError(f"{time!r} is no time; write one as SLURM does: {FORMS}")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
