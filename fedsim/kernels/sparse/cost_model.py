"""Chooses the layers that run on their kept weights alone, by the measured seconds of the dense and the sparse way of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass

from torch import Tensor

from fedsim.kernels.sparse.pattern import Geometry, KeptPositions, Pattern

MARGIN = 0.97  # of the dense time, above which a network stays dense


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer's forward and backward pass."""

    dense: float
    moved: float  # to change to CHWN layout after a dense layer, and back before it
    fixed: float  # of the sparse layer, whatever it keeps
    slope: float  # and for every unit of density

    def sparse(self, density: float) -> float:
        return self.fixed + self.slope * density

    @property
    def crossover(self) -> float:
        """The density up to which the layer is faster sparse if its neighbours are sparse; at most 1."""
        room = self.dense + self.moved - self.fixed
        return min(1.0, max(0.0, room / self.slope)) if self.slope > 0 else float(room > 0)


CostRow = tuple[str, float, float, float, float]


def to_rows(costs: Mapping[str, Cost]) -> tuple[CostRow, ...]:
    """Costs as plain rows, of three digits."""
    return tuple((layer, *(float(f"{value:.3g}") for value in astuple(cost))) for layer, cost in costs.items())  # type: ignore[misc]


def from_rows(rows: Iterable[CostRow]) -> dict[str, Cost]:
    """The inverse of `to_rows`."""
    return {layer: Cost(*values) for layer, *values in rows}


def always_sparse(layers: Iterable[str]) -> dict[str, Cost]:
    """Costs that make every layer sparse that has a mask."""
    return dict.fromkeys(layers, Cost(1.0, 0.0, 0.0, 0.0))


def sparse_layers(costs: Mapping[str, Cost], densities: Mapping[str, float]) -> frozenset[str]:
    """The layers to run sparse: none, unless the whole network becomes faster. A layer without a density is dense."""
    faster = {layer for layer, density in densities.items() if costs[layer].sparse(density) < costs[layer].dense + costs[layer].moved}
    among = sum(cost.sparse(densities[layer]) if layer in faster else cost.dense + cost.moved for layer, cost in costs.items())
    return frozenset(faster) if faster and among < MARGIN * sum(cost.dense for cost in costs.values()) else frozenset()


class Patterns:
    """The patterns of the masks of the last call, made anew only where a mask changes."""

    def __init__(self, geometries: Mapping[str, Geometry], costs: Mapping[str, Cost]) -> None:
        """geometries: of every layer that can run sparse. ValueError for costs of another one."""
        if unknown := sorted(costs.keys() - geometries.keys()):
            raise ValueError(f"no layer {unknown[0]!r} to run sparse; there are {', '.join(geometries)}")
        self.geometries, self.costs = geometries, dict(costs)
        self._masks: dict[str, tuple[Tensor, int, float]] = {}  # layer -> mask, its version, density
        self._patterns: dict[str, Pattern] = {}
        self._positions: dict[str, KeptPositions] = {}
        self._choices: dict[frozenset[str], frozenset[str]] = {}

    def of(self, mask_of: Callable[[str], Tensor | None]) -> dict[str, Pattern]:
        """layer -> Pattern where it runs sparse."""
        held = {layer: mask for layer in self.costs if (mask := mask_of(layer)) is not None}
        for layer, mask in held.items():
            self._see(layer, mask)
        layers = frozenset(held)
        if layers not in self._choices:
            self._choices[layers] = sparse_layers(self.costs, {layer: self._masks[layer][2] for layer in held})
        return {layer: self._pattern(layer) for layer in held if layer in self._choices[layers]}

    def positions(self, masks: Mapping[str, Tensor]) -> dict[str, KeptPositions]:
        """layer -> kept positions of its mask."""
        for layer, mask in masks.items():
            self._see(layer, mask)
            if layer not in self._positions:
                self._positions[layer] = KeptPositions(mask)
        return {layer: self._positions[layer] for layer in masks}

    def _see(self, layer: str, mask: Tensor) -> None:
        """Drops what belongs to an old mask. The same tensor, not written to since, is the same mask; another tensor is compared."""
        last = self._masks.get(layer)
        if last is not None and last[0] is mask and last[1] == mask._version:
            return
        if last is None or last[0] is mask or last[0].shape != mask.shape or last[0].device != mask.device or not last[0].equal(mask):
            self._patterns.pop(layer, None)
            self._positions.pop(layer, None)
            self._choices.clear()
            self._masks[layer] = mask, mask._version, float(mask.count_nonzero()) / mask.numel()
        else:
            self._masks[layer] = mask, mask._version, last[2]

    def _pattern(self, layer: str) -> Pattern:
        if layer not in self._patterns:
            self._patterns[layer] = Pattern(self._masks[layer][0], self.geometries[layer])
        return self._patterns[layer]
