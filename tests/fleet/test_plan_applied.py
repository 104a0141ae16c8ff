"""A plan is applied in one place, and makes one fleet."""

from __future__ import annotations

import pytest
import torch
from linear_federation import people
from torch import nn

from fedsim.core.types import Feed
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.plan import Plan
from fedsim.fleet.registry import FLEETS, make_fleet
from fedsim.kernels.sparse.cost_model import always_sparse, to_rows
from fedsim.nn import profiler
from fedsim.nn.net import Net


def context() -> WorkerContext:
    torch.manual_seed(0)
    return WorkerContext(Net(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))), people([2, 3]), 0)


def test_every_field_of_a_plan_reaches_the_context_and_its_net() -> None:
    before = context()
    after = Plan(channels_last=True, dtype="bfloat16", packed_conv="matmul").apply(before)
    assert (before.channels_last, after.channels_last) == (False, True)
    assert (after.net.compute_dtype, after.net.packed_convolution) == (torch.bfloat16, "matmul")
    plain = Plan().apply(after)
    assert not plain.channels_last
    assert (plain.net.compute_dtype, plain.net.packed_convolution) == (None, "grouped")


def test_the_layers_of_a_plan_run_sparse_and_those_of_the_next_do_not() -> None:
    made = context()
    masks = {f"mask/{layer}.weight": torch.ones(made.net.shapes[layer], dtype=torch.bool) for layer in made.net.maskable}
    sparse = Plan(sparse=to_rows(always_sparse(made.net.geometries)))
    assert set(sparse.apply(made).net.sparse(masks)) == set(made.net.maskable)
    assert not Plan().apply(made).net.sparse(masks)
    assert Plan.of(sparse.text()) == sparse


@pytest.mark.parametrize("name", FLEETS)
def test_the_fleet_of_a_plan_works_under_it(name: str) -> None:
    made = context()
    account = CostAccount(profiler.profile(made.net.plain(made.net.initial), (1, 4, 4)), made.population, Feed("train", epochs=1), 0)
    fleet = make_fleet(Plan(name, packs=3, channels_last=True), made, account, lambda: 0.0)
    assert type(fleet) is FLEETS[name]
    assert (fleet.packs, fleet.site.channels_last, fleet.account) == (3, True, account)
