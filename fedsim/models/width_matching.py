"""Small dense models: the widest one of a family that costs at most a share of the full one.

Every hidden width is scaled with the first, an integer; so the widest is the one of which one channel more would cost too much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedsim.costs import flops, memory
from fedsim.errors import BadInput
from fedsim.nn.profiler import profile

BATCH = 64  # images, for the activations of model.match = "memory"


@dataclass(frozen=True)
class Matched:
    """A model's width, and what it costs."""

    width: int
    full: int  # the width it was narrowed from
    cost: int  # parameters, FLOPs per image, or bytes
    full_cost: int

    @property
    def ratio(self) -> float:
        return self.cost / self.full_cost


def widest(make: Callable[[int], nn.Module], full: int, match: str, density: float, shape: tuple[int, int, int]) -> Matched:
    """The largest width <= `full` whose cost is at most `density` times the full one's; `make` gives the module of a width.

    BadInput where even one channel costs more.
    """

    def cost(width: int) -> int:
        return cost_of(make(width), match, shape)

    full_cost = cost(full)
    low, high = 1, full  # the answer lies in low … high, if there is one
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= density * full_cost:
            low = middle
        else:
            high = middle - 1
    found = Matched(low, full, cost(low), full_cost)
    if found.cost > density * full_cost:
        raise BadInput(f"no model is as small as model.match_density = {density} of {match}; width 1 has {found.ratio:.4g} of width {full}")
    return found


def cost_of(module: nn.Module, match: str, shape: tuple[int, int, int]) -> int:
    """Parameters ("params"), training FLOPs of an image ("flops"), or bytes while it trains on 64 images by SGD ("memory")."""
    if match == "params":
        return sum(value.numel() for value in module.parameters())
    parts = profile(module, shape)
    return flops.training_flops(parts) if match == "flops" else memory.client_memory(parts, batch=BATCH).total
