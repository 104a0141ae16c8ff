"""Broadcasts reach every rank once, and the projection of `fedsim bench scale` is the sum of its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsim.bench.scale import Costs, Messages, at_rank_0, projected, sized
from fedsim.config.job import load
from fedsim.fleet.mpi.schedule import branch, branches, children, deal

ROOT = Path(__file__).parents[2]
MESSAGES = Messages(awake=1e-3, asleep=2e-3, byte=1e-9, add=1e-10, deal=1e-5, join=1e-4, each=1e-7, model=2_000_000, total=4_000_000)
COSTS = Costs(MESSAGES, clients=16, compute=0.4, server=0.01, client=5e-5, header=100.0)


@pytest.mark.parametrize("ranks", range(1, 41))
def test_a_broadcast_reaches_every_rank_once_and_in_few_hops(ranks: int) -> None:
    hops, level = 0, [0]
    reached = [0]
    while level := [below for rank in level for below in branches(rank, ranks)]:
        hops, reached = hops + 1, reached + level
    assert sorted(reached) == list(range(ranks))
    assert hops <= (ranks - 1).bit_length()
    assert len(branches(0, ranks)) == (ranks - 1).bit_length()
    assert all(rank & (rank - 1) == 0 for rank in branches(0, ranks))
    for rank in reached[1:]:
        assert rank in branches(rank & (rank - 1), ranks)  # from where it awaits it


@pytest.mark.parametrize("ranks", range(1, 41))
def test_every_rank_answers_once_through_the_rank_that_it_is_sent_orders_by(ranks: int) -> None:
    """The tree of the answers is that of the orders, and a branch is the ranks from its root on."""
    for rank in range(ranks):
        assert sorted(children(rank, ranks - 1)) == sorted(branches(rank, ranks))
        below = [other for child in branches(rank, ranks) for other in branch(child, ranks)]
        assert sorted(below) == (list(branch(rank, ranks))[1:] if rank else list(range(1, ranks)))


def test_packs_are_dealt_whole_and_evenly() -> None:
    assert [hand.tolist() for hand in deal(np.array([5, 1, 1, 1, 1, 1, 5]), 3)] == [[0], [6], [1, 2, 3, 4, 5]]


@example([4, 3, 2, 1, 1], 2)  # a rank has a whole pack more than one before it, which then gets two in a row
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_packs_are_dealt_as_one_by_one(weights: list[int], ranks: int) -> None:
    """Turns of equal packs are dealt at once; what comes out is as if each went to the rank with least."""
    ranks = min(ranks, len(weights))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for pack in sorted(range(len(weights)), key=lambda pack: (-weights[pack], pack)):
        rank = loads.index(min(loads))
        hands[rank].append(pack)
        loads[rank] += max(1, weights[pack])
    assert [hand.tolist() for hand in deal(np.array(weights), ranks)] == [sorted(hand) for hand in hands]


def test_a_projection_by_hand() -> None:
    one = projected(COSTS, 1)
    assert one == pytest.approx(
        {
            "broadcast": 2e-3 + 1e-3 + (1_600 + 2_000_000) * 1e-9 + 1e-5,
            "compute": 0.4,
            "collect": 1e-3 + 1e-4 + 1_600 * 1e-9 + 2 * 16 * 1e-7,
            "reduce": 1e-3 + 4_000_000 * 1.1e-9,
            "server": 0.01,
        }
    )
    many = projected(COSTS, 1_024)  # eleven levels: 512, 256 … 1, and the last rank below rank 0
    assert many["reduce"] == pytest.approx(11 * one["reduce"])
    assert many["collect"] == pytest.approx(11 * 1.1e-3 + 100 * 16_384 * 1e-9 + 2 * 16_384 * 1e-7)
    assert many["broadcast"] == pytest.approx(11 * (3e-3 + 2_000_000 * 1e-9) + 100 * 16_384 * 1e-9 + 1_024 * 1e-5)
    assert many["server"] == pytest.approx(0.01 + 1_023 * 16 * 5e-5)
    assert many["compute"] == one["compute"]


def test_messages_and_bytes_at_rank_0_by_hand() -> None:
    """One client rank: an order, a model, a reply and a total. Of 64 there are seven branches: 1, 2, 4 … 64."""
    assert at_rank_0((100, 2_000, 4_000), 1, 16) == (4, 2_000 + 4_000 + 1_600)
    assert at_rank_0((100, 2_000, 4_000), 64, 1_024) == (28, 7 * 6_000 + 102_400)


def test_the_job_of_the_bench_takes_other_cohorts() -> None:
    job = load(ROOT / "jobs/bench/scale.toml")
    assert [(made.cohort.size, made.rounds) for made in (job, sized(job, 128), sized(job, 32, 2))] == [(16, 4), (128, 4), (32, 2)]
    assert sized(job, 256).population == 256
    more = sized(job, 512, clients=512)
    assert (more.population, more.data.train_images) == (512, 2 * job.data.train_images)
