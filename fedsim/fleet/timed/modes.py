"""Whose answer counts, and how long an exchange lasts: the slowest, those before a deadline, or the first."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from fedsim.devices.draws import Floats


@dataclass(frozen=True, eq=False)
class Arrivals:
    """An exchange as the server sees it."""

    kept: NDArray[np.bool_]  # (K,) whose answer counts
    lasts: float  # seconds until the server goes on
    ends: Floats  # (K,) seconds after which each client is done with it


def arrivals(seconds: Floats, fails_at: Floats, deadline: float = inf, first: int | None = None) -> Arrivals:
    """Of clients whose answers would take `seconds`, and that leave after `fails_at` (infinite: they do not).

    deadline: seconds that the server waits; later answers do not count, and their clients go on to the end all the same.
    first: so many answers are waited for, ties in the order of the clients; the others are told to end then.
    """
    answers = np.where(fails_at < seconds, inf, seconds)
    ends = np.minimum(seconds, fails_at)
    if first is not None and np.isfinite(answers).sum() > first:
        order = np.argsort(answers, kind="stable")[:first]
        kept = np.zeros(len(seconds), dtype=bool)
        kept[order] = True
        lasts = float(answers[order].max()) if first else 0.0
        return Arrivals(kept, lasts, np.minimum(ends, lasts))
    kept = np.isfinite(answers) & (answers <= deadline)
    if kept.all():
        return Arrivals(kept, float(answers.max(initial=0.0)), ends)
    lasts = deadline if np.isfinite(deadline) else float(ends.max(initial=0.0))
    return Arrivals(kept, lasts, ends)
