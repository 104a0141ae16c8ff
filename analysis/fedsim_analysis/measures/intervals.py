"""Mean and 95 % interval of the mean over seeds, by Student's t."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.nodes import Numbers

LEVEL = 0.95


def mean_and_half(values: Numbers) -> tuple[Numbers, Numbers, NDArray[np.int64]]:
    """(…) mean, half the interval and count over the first axis of (runs, …), NaN left out.

    The mean is NaN where there is no number, half the interval where there are fewer than two.
    """
    from scipy.special import stdtrit

    count = np.isfinite(values).sum(axis=0)
    known = np.where(np.isfinite(values), values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = known.sum(axis=0) / count
        spread = np.where(np.isfinite(values), values - mean, 0.0)
        variance = (spread**2).sum(axis=0) / (count - 1)
        half = stdtrit(np.maximum(count - 1, 1), (1 + LEVEL) / 2) * np.sqrt(variance / count)
    return mean, np.where(count > 1, half, np.nan), count
