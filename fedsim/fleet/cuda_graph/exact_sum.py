"""The exact sum (fedsim.core.exact_sum) of stacked rows where they are, without a question to the device in between: the checks come last.

Shapes: K clients, rows (K, …) in float64. The integers are those of `Sum.add`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core.exact_sum import COARSE, FINE, LARGEST, OutOfRange, Sum, Unit, unit_of
from fedsim.core.tree import Tree
from fedsim.fleet.messages import WorkOrder


def find_units(order: WorkOrder) -> None:
    """The units of what stands in `shared`, in one question to the device; the order keeps them for all its sums."""
    floats = {key: value for key, value in order.shared.items() if value.is_floating_point() and key not in order.units}
    if floats:
        largest = torch.stack([value.abs().amax().double() if value.numel() else _none(value) for value in floats.values()]).cpu()
        order.units.update({key: unit_of(value, order.n) for key, value in zip(floats, largest, strict=True)})


def _none(value: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=value.device)


class DeviceSum:
    """Partial sums of a pack on its device."""

    def __init__(self, order: WorkOrder) -> None:
        find_units(order)
        self.sum = order.sum()
        self.parts: Tree = {}  # (limbs, …) int64
        self.worst: dict[str, list[Tensor]] = {}  # (K,) largest magnitude of each client, in order

    def add(self, rows: Tree) -> None:
        """More clients' rows; ValueError for one that is not float64."""
        for key, values in rows.items():
            if values.dtype != torch.float64:
                raise ValueError(f"total {key!r} is {values.dtype}; a total is float64 (tree.weigh gives it)")
            found = _limbs(values, self.sum.unit(key))
            self.parts[key] = self.parts[key] + found if key in self.parts else found
            flat = values.reshape(len(values), -1)
            worst = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
            self.worst.setdefault(key, []).append(worst)

    def magnitudes(self) -> Tensor:
        """(keys, K) the largest magnitudes, which say whether all went well."""
        return torch.stack([torch.cat(each) for each in self.worst.values()]) if self.worst else torch.zeros(0, 0)

    def checked(self, magnitudes: Tensor, clients: Sequence[int], n: Sequence[int]) -> Sum:
        """The sum of these clients, who have `n` images each; ValueError, naming client and key, for a value out of range."""
        for key, row in zip(self.worst, magnitudes.tolist(), strict=True):
            bound = self.sum.unit(key).bound
            for client, images, value in zip(clients, n, row, strict=True):
                if not (value < LARGEST if bound is None else value <= bound * images):
                    limit = LARGEST if bound is None else bound * images
                    raise OutOfRange(key, client, value, limit)
        self.sum.parts, self.sum.clients = self.parts, len(clients)
        return self.sum


def _limbs(values: Tensor, unit: Unit) -> Tensor:
    """(limbs, …) int64 sums of the rows."""
    if unit.bound is not None:
        return (values * unit.scale).round_().to(torch.int64).sum(0, keepdim=True)
    head = (values * COARSE).round_()
    rest = ((values - head / COARSE) * FINE).round_()
    return torch.stack([head.to(torch.int64).sum(0), rest.to(torch.int64).sum(0)])
