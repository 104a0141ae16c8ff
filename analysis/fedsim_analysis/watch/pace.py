"""How long the rounds of a run take, and how much time is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECENT = 20  # rounds, of which the median counts
EVALUATIONS = 5  # evaluated rounds, of which the median counts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """Seconds of a round, and what an evaluation adds; not-a-number where nothing is known."""

    plain: float
    evaluation: float = 0.0
    every: int = 0  # rounds between two evaluations; 0: none

    def left(self, done: int, planned: int) -> float:
        """Seconds that the rounds after `done` take. The last round is evaluated too, where there are evaluations."""
        rounds = max(planned - done, 0)
        evaluated = planned // self.every - done // self.every + bool(planned % self.every) if self.every and rounds else 0
        return rounds * self.plain + evaluated * self.evaluation


def pace_of(seconds: Array, evaluated: NDArray[np.bool_], every: int = 0) -> Pace:
    """From the seconds of rounds 0 …, and which of them were evaluated. Round 0 prepares the run, and counts only while it is alone."""
    if len(seconds) > 1:
        seconds, evaluated = seconds[1:], evaluated[1:]
    known = np.isfinite(seconds)
    plain = _middle(seconds[known & ~evaluated][-RECENT:])
    full = _middle(seconds[known & evaluated][-EVALUATIONS:])
    if not np.isfinite(plain):  # every round is evaluated
        return Pace(full)
    return Pace(plain, max(full - plain, 0.0) if np.isfinite(full) else 0.0, every)


def _middle(values: Array) -> float:
    return float(np.median(values)) if len(values) else float("nan")
