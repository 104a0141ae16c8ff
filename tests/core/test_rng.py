"""Draws are functions of their keys, uniform, and independent of how many are drawn together."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsim.core import rng

M64 = 2**64 - 1


def splitmix(x: int) -> int:
    """splitmix64's finaliser in unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_fold_is_splitmix64(state, part) -> None:
    mine = rng.fold(torch.tensor(state), torch.tensor(part)).item() & M64
    assert mine == splitmix(((state ^ part) + 0x9E3779B97F4A7C15) & M64)


def test_the_known_first_outputs_of_splitmix64() -> None:
    assert [x & M64 for x in rng.bits(torch.tensor(0), 3).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_key_for_many_clients_is_their_keys() -> None:
    clients = torch.tensor([3, 1, 400])
    together = rng.uniform(rng.key(7, "train", 2, clients), 5)
    assert all(torch.equal(together[i], rng.uniform(rng.key(7, "train", 2, int(k)), 5)) for i, k in enumerate(clients))


def test_a_prefix_does_not_depend_on_the_count() -> None:
    key = rng.key(1, "x")
    assert torch.equal(rng.bits(key, 10)[:4], rng.bits(key, 4))


def test_every_part_of_a_key_matters() -> None:
    keys = {rng.key(*parts).item() for parts in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, 1, "a"), (0, "a")]}
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("numbers", "law"),
    [(rng.uniform(rng.key(5), 20_000), "uniform"), (rng.normal(rng.key(6), 20_000), "norm")],
)
def test_laws(numbers, law) -> None:
    assert stats.kstest(numbers.double().numpy(), law).pvalue > 1e-3


def test_uniform_is_below_one_and_integers_are_in_range() -> None:
    assert 0 <= rng.uniform(rng.key(1), 10_000).min() <= rng.uniform(rng.key(1), 10_000).max() < 1
    counts = torch.bincount(rng.integers(rng.key(2), 9_000, 9), minlength=9)
    assert len(counts) == 9
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_permutations_are_permutations_and_uniform() -> None:
    orders = rng.permutation(rng.key(3, torch.arange(6_000)), 3)
    assert torch.equal(orders.sort(-1).values, torch.arange(3).expand(6_000, 3))
    codes = (orders * torch.tensor([9, 3, 1])).sum(-1)
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_no_global_generator_moves() -> None:
    before = torch.get_rng_state()
    rng.normal(rng.key(1), 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.processes
def test_another_process_draws_the_same() -> None:
    program = "from fedsim.core import rng; print(rng.bits(rng.key(9, 'train', 3), 2).tolist())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(rng.bits(rng.key(9, "train", 3), 2).tolist())
