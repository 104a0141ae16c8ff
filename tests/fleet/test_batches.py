"""Batches of a feed for several clients at once."""

from __future__ import annotations

import pytest
import torch
from linear_federation import people

from fedsim.core.types import Feed
from fedsim.fleet.batches import Batches, Round


def test_clients_come_in_the_order_of_their_steps() -> None:
    population, feed = people([2, 9]), Feed("train", epochs=1, batch=2, augment=False)
    made = Batches(population, feed, [1, 0], [0, 0], Round(0, 1), "cpu", torch.float32)
    assert [step.active for step in made] == [2, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"ordered by decreasing number of steps; these have \[1, 5\]"):
        Batches(population, feed, [0, 1], [0, 0], Round(0, 1), "cpu", torch.float32)
