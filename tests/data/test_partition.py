"""Partitions: exact cover, the schemes' laws, hand cases, the repair, the shards and their hash."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma

from fedsim.data import partition_schemes
from fedsim.data.partition import NAMES, PartitionSettings, deal, generator, parameters
from fedsim.errors import BadInput

CLASSES = 10
LABELS = np.random.default_rng(1).permutation(np.arange(50_000) % CLASSES)
USERS = np.random.default_rng(2).integers(3_000, size=50_000)
DEALT = tuple(name for name in NAMES if name != "blocks")
WHOLE = tuple(name for name in DEALT if name != "few_per_class")


def dealt(name="iid", labels=LABELS, seed=0, users=USERS, **fields):
    return deal(labels, PartitionSettings(name=name, **fields), generator(seed, "partition"), users[: len(labels)])


def entropy(counts):
    """Mean over clients of the entropy of their class shares, in nats."""
    p = counts / counts.sum(1, keepdims=True)
    return float(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1).mean())


# Settings


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "dirichlet"}, "There are: iid, dirichlet_class"),
        ({"alpha": 0.0}, "alpha = 0.0 must be above 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"clients": 0}, "clients = 0"),
        ({"holdout": 1.0}, r"holdout = 1.0 must be at least 0 and below 1"),
        ({"holdout": -0.1}, "holdout"),
        ({"prior": "flat"}, "shares, ones"),
        ({"sizes": "odd"}, "equal, dirichlet, lognormal"),
        ({"test": "none"}, "proportional, global"),
        ({"min_images": -1}, "min_images = -1 must be at least 0"),
        ({"public": -1}, "public"),
        ({"max_tries": 0}, "max_tries = 0 must be at least 1"),
        ({"sigma": float("inf")}, "sigma"),
    ],
)
def test_impossible_settings_are_refused(fields, said):
    with pytest.raises(BadInput, match=said):
        PartitionSettings(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("iid", {"clients": 5_001}, "clients = 5001 x min_images = 10 images = 50010, but there are 50000"),
        ("classes_per_client", {"classes_per_client": 11}, "classes_per_client = 11, but the data have 10 classes"),
        ("few_per_class", {"clients": 400, "images_per_class": 200}, "lower images_per_class"),
        ("few_per_class", {"images_per_class": 3}, "fewer than min_images = 10: lower min_images, or raise images_per_class"),
        ("shards", {"clients": 4_999, "drop_rest": True, "shards_per_client": 9}, "fewer than min_images"),
        ("natural", {"clients": 4_000}, "but the data have"),
        ("dirichlet_client", {"alpha": 5e-324}, r"\[partition\] alpha or beta: a concentration of 0 is too small to draw from"),
    ],
)
def test_what_the_data_cannot_give_is_refused(name, fields, said):
    with pytest.raises(BadInput, match=said):
        dealt(name, **fields)


@pytest.mark.parametrize(("public", "said"), [(2, "public = 2 keeps every image for the server; lower public"), (0, "the data have none")])
def test_no_image_for_clients_is_refused(public, said):
    with pytest.raises(BadInput, match=f"no image is left for clients: {said}"):
        deal(LABELS[:0], PartitionSettings(name="natural", clients=0, public=public), generator(0, "partition"), USERS[:0])


def test_natural_needs_users():
    with pytest.raises(BadInput, match="needs a file with a dataset `client`"):
        deal(LABELS, PartitionSettings(name="natural"), generator(0, "partition"), None)


# Every scheme


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("clients", [1, 2, 10, 100, 400])
def test_every_image_is_dealt_once_and_every_client_has_its_least(name, clients):
    made = dealt(name, clients=clients)
    assert made.owner.min() >= 0
    assert made.sizes().sum() == len(LABELS)
    assert len(made.sizes()) == clients
    assert made.sizes().min() >= 10


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.1, 1, 100])
@pytest.mark.parametrize("name", ["dirichlet_class", "dirichlet_client", "quantity_dirichlet"])
@pytest.mark.parametrize("clients", [2, 100, 400])
def test_extreme_concentrations_end_quickly_and_cover(name, alpha, clients):
    for balance, prior in ((True, "shares"), (False, "ones")):
        made = dealt(name, clients=clients, alpha=alpha, beta=alpha, balance=balance, prior=prior, max_tries=2)
        assert made.owner.min() >= 0
        assert made.sizes().min() >= 10


@given(
    labels=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=60),
    name=st.sampled_from(WHOLE),
    clients=st.integers(1, 12),
    least=st.integers(0, 4),
    alpha=st.sampled_from([1e-3, 0.3, 10.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=250, deadline=None)
def test_any_small_data_are_dealt_exactly(labels, name, clients, least, alpha, seed):
    labels = np.array(labels)
    asked = {"clients": clients, "min_images": least, "alpha": alpha, "beta": alpha, "classes_per_client": 1, "sizes": "lognormal"}
    users = np.arange(len(labels)) // 2
    try:
        made = dealt(name, labels=labels, users=users, seed=seed, **asked)
    except BadInput:
        assert clients * least > len(labels) or name == "natural"
        return
    assert made.owner.min() >= 0
    assert made.owner.max() < clients
    assert made.sizes().min() >= least


def test_one_client_has_all_and_n_clients_have_one_each():
    assert set(dealt(clients=1).owner) == {0}
    few = LABELS[:50]
    for name in ("iid", "dirichlet_class", "quantity_lognormal"):
        assert dealt(name, labels=few, clients=50, min_images=1).sizes().tolist() == [1] * 50


def test_numpys_global_state_is_neither_used_nor_changed():
    np.random.seed(3)
    before = str(np.random.get_state(legacy=False))
    first = [dealt(name, clients=20).owner for name in DEALT]
    assert str(np.random.get_state(legacy=False)) == before
    np.random.seed(4)
    assert all(np.array_equal(a, dealt(name, clients=20).owner) for a, name in zip(first, DEALT, strict=True))


def test_seeds_and_purposes_draw_apart():
    draws = {generator(seed, purpose).integers(2**62) for seed in (0, 1, -1) for purpose in ("partition", "public", "holdout", "test")}
    assert len(draws) == 12


# Laws


def test_sizes_of_iid_differ_by_one():
    assert sorted(dealt(labels=LABELS[:103], clients=10).sizes()) == [10] * 7 + [11] * 3


def test_class_wise_shares_follow_their_dirichlet_law():
    clients, alpha, rng = 5, 0.7, generator(0, "law")
    labels = np.repeat([0, 1], 4_000)
    shares = np.concatenate([_class_shares(labels, clients, alpha, rng) for _ in range(600)])  # (1200, N)
    m, v = 1 / clients, (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    _close(shares, m, v)


def _class_shares(labels, clients, alpha, rng):
    owner, _ = partition_schemes.dirichlet_class(labels, clients, alpha, False, rng)
    return np.stack([np.bincount(owner[labels == c], minlength=clients) / (labels == c).sum() for c in (0, 1)])


def _close(draws, mean, variance):
    """Within 4 standard errors, column by column."""
    n = len(draws)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(variance / n))
    square = (draws - mean) ** 2
    assert np.all(np.abs(square.mean(0) - variance) < 4 * square.std(0) / np.sqrt(n) + 1e-4)


@pytest.mark.parametrize("prior", ["shares", "ones"])
def test_client_wise_shares_follow_their_dirichlet_law(prior):
    alpha, clients = 0.8, 1_500
    labels = np.repeat([0, 1, 2], [60_000, 30_000, 10_000])
    _, pi = partition_schemes.dirichlet_client(labels, np.full(clients, 5), alpha, prior, generator(0, "law"))
    p = np.array([0.6, 0.3, 0.1]) if prior == "shares" else np.full(3, 1 / 3)
    _close(pi, p, p * (1 - p) / ((alpha if prior == "shares" else 3 * alpha) + 1))


def test_client_wise_counts_are_the_drawn_shares_while_samples_last():
    labels = np.repeat([0, 1, 2], 10_000)
    owner, pi = partition_schemes.dirichlet_client(labels, np.full(20, 50), 1.0, "ones", generator(0, "law"))
    counts = np.stack([np.bincount(labels[owner == k], minlength=3) for k in range(20)])
    assert np.abs(counts - 50 * pi).max() < 1
    assert (counts.sum(1) == 50).all()


def test_a_class_that_runs_out_is_made_up_from_the_others():
    left = np.array([2, 5, 100])
    assert partition_schemes._taken(np.array([6, 4, 0]), np.array([0.6, 0.4, 0.0]), left).tolist() == [2, 5, 3]
    assert partition_schemes._taken(np.array([8, 2, 0]), np.array([0.8, 0.1, 0.1]), left).sum() == 10


@pytest.mark.parametrize("name", ["dirichlet_class", "dirichlet_client"])
def test_a_huge_concentration_is_nearly_even(name):
    counts = dealt(name, clients=10, alpha=1e6).counts(LABELS, CLASSES)
    assert np.abs(counts - 500).max() <= 10


def test_the_same_alpha_means_different_skew():
    """A Dirichlet of concentration a in each of C classes has the mean entropy psi(C a + 1) - psi(a + 1)."""

    def skew(name, **fields):
        made = [dealt(name, clients=100, alpha=0.5, seed=seed, **fields) for seed in range(5)]
        return np.mean([entropy(m.counts(LABELS, CLASSES)) for m in made])

    ones, shares = digamma(6) - digamma(1.5), digamma(1.5) - digamma(1.05)  # 1.67 and 0.53 nats
    assert skew("dirichlet_class", balance=False) == pytest.approx(ones, abs=0.1)
    assert skew("dirichlet_client", prior="ones") == pytest.approx(ones, abs=0.1)
    assert skew("dirichlet_client", prior="shares") == pytest.approx(shares, abs=0.1)
    assert skew("dirichlet_class") == pytest.approx(1.5, abs=0.05)  # balancing concentrates the later classes


def test_lognormal_sizes_spread_with_sigma():
    sizes = partition_schemes.lognormal_sizes(10**7, 2_000, 0.5, generator(0, "law"))
    assert sizes.sum() == 10**7
    assert np.log(sizes).std() == pytest.approx(0.5, abs=0.04)
    assert np.ptp(partition_schemes.lognormal_sizes(1_001, 10, 0.0, generator(0, "law"))) == 1


# Hand cases


def test_the_cut():
    assert partition_schemes.cut(np.array([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert partition_schemes.cut(np.array([1.0, 1.0, 0.0]), 5).tolist() == [2, 3, 0]


def test_apportion_by_largest_remainder():
    weight = np.array([[1.0, 1, 1], [0, 0.5, 0.25], [0, 0, 0]])
    assert partition_schemes.apportion(np.array([10, 8, 4]), weight).tolist() == [[4, 3, 3], [0, 5, 3], [0, 0, 0]]
    assert partition_schemes.apportion(np.array([1]), np.ones((1, 3)), np.array([[0.5, 0.1, 0.9]])).tolist() == [[0, 1, 0]]


def by_fractions(total, weight, tie):
    """Largest remainders without any rounding."""
    exact = [Fraction(total * w, sum(weight)) for w in weight]
    part = [int(share) for share in exact]
    for i in sorted(range(len(weight)), key=lambda i: (part[i] - exact[i], tie[i], i))[: total - sum(part)]:
        part[i] += 1
    return part


@pytest.mark.parametrize(("total", "weight"), [(400, 60), (60_000, 6_000), (2**40, 2**40)])  # the last ones exceed int64
def test_apportion_of_whole_numbers_breaks_exact_ties_by_the_given_order(total, weight):
    rng = np.random.default_rng(0)
    for _ in range(800):
        weights, tie = rng.integers(0, weight, (1, int(rng.integers(1, 30)))) + 1, rng.random(30)
        weights[rng.random(weights.shape) < 0.2] = weights[0, 0]
        whole, tie = np.array([rng.integers(total)]), tie[None, : weights.shape[1]]
        found = partition_schemes.apportion(whole, weights, tie)[0]
        assert found.tolist() == by_fractions(int(whole[0]), weights[0].tolist(), tie[0].tolist())


@given(st.integers(0, 1000), st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_apportion_is_exact_and_within_one(total, weight):
    weight = np.array([weight])
    part = partition_schemes.apportion(np.array([total]), weight)[0]
    if weight.sum() > 0:
        assert part.sum() == total
        assert np.abs(part - total * weight[0] / weight.sum()).max() < 1 + 1e-6


def test_balance_sends_later_classes_to_those_with_room():
    room = np.array([True, False, True])
    assert partition_schemes._balanced(np.array([0.2, 0.6, 0.2]), room).tolist() == [0.5, 0.0, 0.5]
    assert partition_schemes._balanced(np.array([0.0, 1.0, 0.0]), room).tolist() == [0.5, 0.0, 0.5]
    assert partition_schemes._balanced(np.array([0.5, 0.5]), np.zeros(2, bool)).tolist() == [0.5, 0.5]


def test_balanced_clients_stop_near_the_mean():
    size = dealt("dirichlet_class", clients=10, alpha=0.1, min_images=0, max_tries=1).sizes()
    before = dealt("dirichlet_class", clients=10, alpha=0.1, min_images=0, max_tries=1, balance=False).sizes()
    assert size.max() < before.max()


def test_each_client_has_its_shards():
    labels = LABELS[:4_993]
    owner = partition_schemes.shards(labels, 10, 20, False, generator(0, "partition"))
    order = np.argsort(labels, kind="stable")
    runs = np.split(owner[order], np.cumsum(partition_schemes.equal_sizes(4_993, 20))[:-1])
    assert all(len(set(run)) == 1 for run in runs)
    assert {len(run) for run in runs} == {249, 250}
    assert np.bincount([run[0] for run in runs]).tolist() == [2] * 10


def test_dropping_the_rest_of_the_shards():
    owner = partition_schemes.shards(LABELS[:4_993], 10, 23, True, generator(0, "partition"))
    assert (owner >= 0).sum() == 4_340
    assert np.bincount(owner[owner >= 0]).tolist() == [434] * 10


@pytest.mark.parametrize("clients", [1, 3, 10, 400])
def test_every_class_has_an_owner_and_clients_their_classes(clients):
    made = dealt("classes_per_client", clients=clients, classes_per_client=2, min_images=0)
    counts = made.counts(LABELS, CLASSES)
    assert (counts.sum(0) == 5_000).all()
    owned = (counts > 0).sum(1)
    assert owned.min() >= 1
    assert owned.sum() == max(2 * clients, CLASSES)
    for c in range(CLASSES):
        assert np.ptp(counts[counts[:, c] > 0, c]) <= 1
    assert all(counts[k, k % CLASSES] for k in range(clients))


def test_few_per_class_gives_a_fixed_number():
    counts = dealt("few_per_class", clients=400).counts(LABELS, CLASSES)
    assert (np.sort(counts, 1)[:, -2:] == 20).all()
    assert (counts.sum(1) == 40).all()


# The least size


def test_the_repair_moves_only_what_it_must():
    labels = LABELS[:1_000]
    owner = np.zeros(1_000, np.int64)
    moved = partition_schemes.repair(owner, labels, 20, 10, generator(0, "repair"))
    size = np.bincount(owner, minlength=20)
    assert moved == 19 * 10
    assert size.tolist() == [810] + [10] * 19


def test_the_repair_takes_the_most_frequent_class_of_the_largest():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    owner = np.array([0, 0, 0, 0, 0, 1, 1, 1, -1])
    assert partition_schemes.repair(owner, labels, 3, 1, generator(0, "repair")) == 1
    assert labels[owner == 2].tolist() == [0]
    assert (owner == 0).sum() == 4
    assert owner[-1] == -1


def test_a_hopeless_draw_is_repaired_after_its_tries():
    made = dealt("dirichlet_class", clients=400, alpha=1e-3, max_tries=3)
    assert made.tries == 3
    assert made.moved > 0
    assert made.sizes().min() == 10
    easy = dealt("dirichlet_class", clients=10)
    assert (easy.tries, easy.moved) == (1, 0)


def test_the_best_of_the_tries_is_the_one_repaired():
    rng, labels = generator(0, "partition"), LABELS[:2_000]
    tries = [partition_schemes.dirichlet_class(labels, 50, 0.05, True, rng)[0] for _ in range(6)]
    sizes = [np.bincount(owner, minlength=50) for owner in tries]
    best = max(sizes, key=lambda size: size.min())
    assert best is not sizes[-1]
    assert best.min() < 20
    made = dealt("dirichlet_class", labels=labels, clients=50, alpha=0.05, max_tries=6, min_images=20)
    assert made.moved == np.maximum(20 - best, 0).sum()


def test_parameters_are_those_of_the_scheme():
    assert "alpha" in parameters(PartitionSettings())
    assert "alpha" not in parameters(PartitionSettings(name="iid"))


@pytest.mark.processes
def test_the_settings_load_without_torch():
    code = "import sys, fedsim.data.settings, fedsim.data.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
