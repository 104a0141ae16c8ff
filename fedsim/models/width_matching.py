"""Small dense models: the widest one of a family that costs at most a share of the full one.

Every width is scaled with the first, an integer: one channel more would cost too much. What a channel less leaves of the budget goes to
hidden widths that have their own number of units, such as the 128 of `cnn`, as long as they do not reach the next channel's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from fedsim.costs import flops, memory
from fedsim.errors import BadInput
from fedsim.nn.profiler import profile

FINE = 128  # steps of hidden widths from one channel to the next
BATCH = 64  # images, for the activations of model.match = "memory"


@dataclass(frozen=True)
class Matched:
    """A model's width, and what it costs."""

    width: int
    full: int  # the width it was narrowed from
    shrink: Fraction  # of hidden widths that have their own number of units
    cost: int  # parameters, FLOPs per image, or bytes
    full_cost: int

    @property
    def ratio(self) -> float:
        return self.cost / self.full_cost


def widest(make: Callable[[int, Fraction], nn.Module], full: int, match: str, density: float, shape: tuple[int, int, int]) -> Matched:
    """The largest width <= `full` whose cost is at most `density` times the full one's, and then the widest hidden layers.

    Args:
        make: the module of a width, whose own hidden widths are so much narrower than the full model's.

    BadInput where even one channel costs more.
    """

    def cost(width: int, shrink: Fraction) -> int:
        return cost_of(make(width, shrink), match, shape)

    full_cost = cost(full, Fraction(1))
    width = _last(1, full, lambda width: cost(width, Fraction(width, full)) <= density * full_cost)
    least = width * FINE if width > 1 else 0  # below one channel hidden widths alone can shrink
    steps = _last(
        least, min(width + 1, full) * FINE - (width < full), lambda k: cost(width, Fraction(k, full * FINE)) <= density * full_cost
    )
    shrink = Fraction(steps, full * FINE)
    found = Matched(width, full, shrink, cost(width, shrink), full_cost)
    if found.cost > density * full_cost:
        raise BadInput(f"no model is as small as model.match_density = {density} of {match}; width 1 has {found.ratio:.4g} of width {full}")
    return found


def _last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, where all below it do; `low` where none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def cost_of(module: nn.Module, match: str, shape: tuple[int, int, int]) -> int:
    """Parameters ("params"), training FLOPs of an image ("flops"), or bytes while it trains on 64 images by SGD ("memory")."""
    if match == "params":
        return sum(value.numel() for value in module.parameters())
    parts = profile(module, shape)
    return flops.training_flops(parts) if match == "flops" else memory.client_memory(parts, batch=BATCH).total
