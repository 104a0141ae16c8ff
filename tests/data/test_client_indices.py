"""Shards and their hash, and the splits beside a partition: public, held out, proportional test."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import splits
from fedsim.data.client_indices import Blocks, Listed, held_size, listed, of_owners, sha256_of
from fedsim.data.image_sets import Fake
from fedsim.data.partition import NAMES, PartitionSettings, deal, generator

CLASSES = 10
LABELS = np.random.default_rng(1).permutation(np.arange(50_000) % CLASSES)
USERS = np.random.default_rng(2).integers(3_000, size=50_000)
DEALT = tuple(name for name in NAMES if name != "blocks")


def dealt(name, **fields):
    return deal(LABELS, PartitionSettings(name=name, **fields), generator(0, "partition"), USERS)


def test_shards_from_owners_and_by_hand():
    made = of_owners(np.array([2, 0, -1, 0, 2]), 4, np.array([3, 5, 6, 8, 9]))
    assert [made.of(k).tolist() for k in range(4)] == [[5, 8], [], [3, 9], []]
    assert made.sizes().tolist() == [2, 0, 2, 0]
    assert [made.size(k) for k in range(4)] == [2, 0, 2, 0]
    hand = listed([[8, 5], [], [9, 3], []])
    assert sha256_of(hand, b"") == sha256_of(made, b"")
    assert sha256_of(listed([[8, 5], [9], [3], []]), b"") != sha256_of(made, b"")
    assert sha256_of(made, b"x") != sha256_of(made, b"")


def test_the_hash_is_lengths_and_indices_as_little_endian_int64():
    from hashlib import sha256

    stream = np.array([2, 5, 8, 0, 1, 3], "<i8").tobytes()
    assert sha256_of(listed([[5, 8], [], [3]]), b"begin") == sha256(b"begin" + stream).hexdigest()


@given(st.integers(0, 80), st.integers(1, 20), st.sets(st.integers(0, 79), max_size=10), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_blocks_are_what_a_list_would_be(n, clients, out, share):
    free = [i for i in range(80) if i not in out][:n]
    n, without = len(free), np.array(sorted(out), np.int64)
    parts = np.array_split(np.array(free, np.int64), clients)
    held = [int(held_size(np.array([len(p)]), share)[0]) for p in parts]
    train = Blocks(n, clients, without, share)
    aside = Blocks(n, clients, without, share, held=True)
    for k, (part, h) in enumerate(zip(parts, held, strict=True)):
        assert train.of(k).tolist() == part[: len(part) - h].tolist()
        assert aside.of(k).tolist() == part[len(part) - h :].tolist()
        assert train.size(k) == len(part) - h
    assert sha256_of(train, b"") == sha256_of(listed([p[: len(p) - h] for p, h in zip(parts, held, strict=True)]), b"")
    assert train.sizes().sum() + aside.sizes().sum() == n


def test_blocks_refuse_a_client_that_is_not_there():
    with pytest.raises(IndexError, match="client 3 of 3"):
        Blocks(9, 3).of(3)


def test_held_sizes():
    assert held_size(np.array([0, 1, 2, 5, 10, 100]), 0.1).tolist() == [0, 0, 1, 1, 1, 10]
    assert held_size(np.array([1, 2, 3]), 0.9).tolist() == [0, 1, 2]
    assert held_size(np.array([5, 9]), 0.0).tolist() == [0, 0]


# Splits


def test_public_images_are_balanced_and_cost_little_in_a_large_set():
    data = Fake(20_000_000, (1, 8, 8), 10, seed=0)
    index = splits.public(data, 7, generator(0, "public"))
    assert np.bincount(splits.labels_of(data, index)).tolist() == [7] * 10
    assert (np.diff(index) > 0).all()


def test_held_images_are_stratified():
    made = dealt("dirichlet_class", clients=30, alpha=0.3)
    aside = splits.held(made.owner, LABELS, 30, CLASSES, 0.1, generator(0, "holdout"))
    counts = made.counts(LABELS, CLASSES)
    held = np.zeros_like(counts)
    np.add.at(held, (made.owner[aside], LABELS[aside]), 1)
    assert held.sum(1).tolist() == held_size(counts.sum(1), 0.1).tolist()
    share = held.sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    assert (np.abs(held - share * counts) < 1).all()


@pytest.mark.parametrize("name", DEALT)
def test_test_shares_are_the_training_shares(name):
    counts = dealt(name, clients=40, alpha=0.2).counts(LABELS, CLASSES)
    labels = np.random.default_rng(5).integers(CLASSES, size=2_000)
    owner = splits.proportional(counts, labels, generator(0, "test"))
    tested, there = np.zeros_like(counts), owner >= 0
    np.add.at(tested, (owner[there], labels[there]), 1)
    n_test = np.bincount(labels)
    assert (tested.sum(0) == np.where(counts.sum(0) > 0, n_test, 0)).all()
    assert (np.abs(tested - counts / np.maximum(counts.sum(0), 1) * n_test) < 1).all()


def test_equal_remainders_do_not_favour_low_clients():
    counts = np.ones((100, 1), np.int64)
    owner = splits.proportional(counts, np.zeros(10, np.int64), generator(0, "test"))
    assert len(set(owner)) == 10
    assert owner.max() > 50


def test_listed_is_one_flat_array():
    made = listed([[1], [2, 3]])
    assert isinstance(made, Listed)
    assert made.flat.tolist() == [1, 2, 3]
    assert made.stretch(1, 2)[0].tolist() == [2, 3]
