"""How the time of a layer's training falls with its density: not at all, like its FLOPs, as measured, or by a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import BadInput

Floats = NDArray[np.float64]

# Seconds of a training step of resnet18 over those of the dense step, on one CPU core: `fedsim bench sparse`, jobs/bench/README.md.
MEASURED = {1.0: 1.0, 0.5: 1.0, 0.3: 0.775, 0.2: 0.541, 0.1: 0.308, 0.05: 0.200, 0.02: 0.132, 0.01: 0.109}
NAMES = ("none", "ideal", "measured")


@dataclass(frozen=True)
class SparseTime:
    """s(d), the share of its dense time that a layer of density d takes; interpolated linearly in log d between the points of a table.

    Below the smallest density of the table its share stays; a table without a point at 1 begins at s(1) = 1.

    >>> SparseTime.of({"0.01": 0.2}).share(np.array([1.0, 0.1, 0.01, 0.001])).tolist()
    [1.0, 0.6, 0.2, 0.2]
    >>> SparseTime.of("ideal").share(np.array([0.1])).tolist()
    [0.1]
    """

    name: str
    points: tuple[tuple[float, float], ...] = ()  # (density, share), densities rising; none: for `none` and `ideal`

    @classmethod
    def of(cls, given: str | Mapping[str, float]) -> SparseTime:
        """From a kind's `sparse`; BadInput for an unknown name and for what is no table of densities in (0, 1] and shares above 0."""
        if isinstance(given, str):
            if given not in NAMES:
                raise BadInput(f'sparse = {given!r} is not known. There are: {", ".join(NAMES)}, or a table such as {{"0.1" = 0.4}}')
            return cls(given, _sorted(MEASURED) if given == "measured" else ())
        densities = [_density(text) for text in given]
        if twice := [text for text, density in zip(given, densities, strict=True) if densities.count(density) > 1]:
            raise BadInput(f"sparse has the density {twice[0]} twice; each density has one share")
        shares = [_share(text, share) for text, share in given.items()]
        return cls("table", _sorted({1.0: 1.0} | dict(zip(densities, shares, strict=True))))

    def share(self, density: Floats) -> Floats:
        """s(d) for each density in [0, 1]."""
        if not self.points:
            return density.astype(np.float64) if self.name == "ideal" else np.ones_like(density, dtype=np.float64)
        known, shares = np.array(self.points).T
        return np.interp(np.log(np.maximum(density, known[0])), np.log(known), shares)


def _sorted(table: Mapping[float, float]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(table.items()))


def _density(text: str) -> float:
    try:
        density = float(text)
    except ValueError:
        density = float("nan")
    if not 0 < density <= 1:
        raise BadInput(f"sparse has the density {text!r}; a density is a number above 0 and at most 1")
    return density


def _share(text: str, share: float) -> float:
    if not 0 < share < float("inf"):
        raise BadInput(f"sparse at density {text} = {share}; a share of the dense time is above 0")
    return float(share)
