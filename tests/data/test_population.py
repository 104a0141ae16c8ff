"""The population: disjoint splits, sizes, hashes that change with everything that matters, a million clients at no cost."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import partition_schemes
from fedsim.data.image_sets import Stored
from fedsim.data.partition import NAMES, PartitionSettings, deal, generator
from fedsim.data.population import divide, populate
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput

DIGITS = DataSettings()


def digits(seed=0, own_seed=None, **fields):
    return populate(DIGITS, PartitionSettings(seed=own_seed, **fields), seed)


def indices(shards):
    return np.concatenate([shards.of(k) for k in range(len(shards))])


def images(n, classes=10, seed=0, name="made"):
    y = torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n))
    return Stored(name, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), y, classes, (0.0,), (1.0,))


LARGE = images(50_000), images(10_000, seed=1)


def file_data(path, train_users, test_users=None):
    def part(ending, users):
        file["x" + ending] = np.zeros((len(users), 2, 2), np.uint8)
        file["y" + ending] = np.arange(len(users)) % 3
        file["client" + ending] = users

    with h5py.File(path, "w") as file:
        part("", train_users)
        if test_users is not None:
            part("_test", test_users)
    return DataSettings(name="file", path=str(path))


# Disjoint splits


@pytest.mark.parametrize("name", [name for name in NAMES if name != "natural"])
@pytest.mark.parametrize("clients", [1, 10, 30])
def test_public_train_held_and_dropped_are_the_training_set(name, clients):
    p = digits(name=name, clients=clients, public=5, holdout=0.1, images_per_class=10)
    public, train, held = (indices(p.shards[split]) for split in ("public", "train", "held"))
    all_of_them = np.concatenate([public, train, held])
    assert len(np.unique(all_of_them)) == len(all_of_them) == 1437 - p.record["dropped"]
    assert len(public) == 50
    assert (p.record["dropped"] > 0) == (name == "few_per_class")
    sizes = p.shards["train"].sizes() + p.shards["held"].sizes()
    assert sizes.min() >= 10
    assert p.clients == len(p.shards["train"]) == len(p.shards["held"]) == len(p.shards["test"]) == clients


@pytest.mark.parametrize("name", ["iid", "dirichlet_class", "dirichlet_client", "shards", "quantity_lognormal", "blocks", "feature_noise"])
def test_test_shards_cover_the_test_set_once(name):
    p = digits(name=name)
    assert sorted(indices(p.shards["test"])) == list(range(360))
    assert p.record["untested"] == 0


def test_global_accuracy_is_the_mean_over_the_shards():
    p = digits(alpha=0.1)
    right = torch.arange(360) % 7 < 3  # of some predictor
    parts = [float(right[torch.from_numpy(p.shards["test"].of(k))].sum()) for k in range(10)]
    assert sum(parts) / 360 == float(right.double().mean())


def test_a_global_test_set_has_no_shards():
    for name in ("iid", "blocks"):
        p = digits(name=name, test="global")
        assert p.shards["test"].sizes().tolist() == [0] * 10
        assert p.record["untested"] == 360


def test_indices_are_sorted_int64():
    p = digits(holdout=0.2, public=1)
    for shards in p.shards.values():
        for k in range(len(shards)):
            assert shards.of(k).dtype == np.int64
            assert (np.diff(shards.of(k)) > 0).all()


def test_large_partitions_are_quick_and_complete():
    for name in ("dirichlet_class", "dirichlet_client"):
        p = divide(*LARGE, PartitionSettings(name=name, clients=400, alpha=0.05, public=5, holdout=0.1), 0)
        assert sum(len(indices(p.shards[split])) for split in ("public", "train", "held")) == 50_000
        assert p.counts().shape == (400, 10)
        assert len(indices(p.shards["test"])) == 10_000


# What a population tells


def test_counts_and_sizes():
    p = digits(holdout=0.1)
    assert p.counts().sum(1).tolist() == [p.size(k) for k in range(10)] == p.shards["train"].sizes().tolist()
    assert p.counts()[3].tolist() == torch.bincount(p.train.y[torch.from_numpy(p.shards["train"].of(3))], minlength=10).tolist()


def test_the_server_sees_its_public_images():
    assert digits().public() is None
    p = digits(public=3)
    public = p.public()
    assert torch.bincount(public.y).tolist() == [3] * 10
    assert torch.equal(public.x, p.train.x[torch.from_numpy(p.shards["public"].of(0))])


def test_augmentation_is_the_jobs():
    p = populate(DataSettings(augment=("cutout",), crop_pad=2, cutout=3), PartitionSettings(), 0)
    assert (p.augment, p.crop_pad, p.cutout) == (("cutout",), 2, 3)
    assert digits().augment == ()


def test_a_partition_has_a_seed_of_its_own_where_it_is_given_one():
    one, other = digits(seed=0, own_seed=7), digits(seed=1, own_seed=7)
    assert one.sha256 == other.sha256 == digits(seed=7).sha256
    assert digits(seed=0).sha256 != one.sha256
    assert one.record["seed"] == 7
    for wrong in (-1, 2**63):
        with pytest.raises(BadInput, match=rf"\[partition\] seed = {wrong} must be at least 0 and below 2\^63"):
            PartitionSettings(seed=wrong)


@pytest.mark.parametrize("cutout", [8, 16])
def test_a_cutout_that_may_cover_an_image_whole_is_refused(cutout):
    said = rf"cutout = {cutout} may cover an image of 8x8 whole; at most 7, and half of the side \(4\) is usual"
    with pytest.raises(BadInput, match=said):
        populate(DataSettings(augment=("cutout",), cutout=cutout), PartitionSettings(), 0)
    assert populate(DataSettings(augment=("cutout",), cutout=7), PartitionSettings(), 0).cutout == 7


def test_feature_skew_belongs_to_the_client():
    assert digits(name="iid").skew is None
    noise = digits(name="feature_noise", noise_std=0.2).skew
    assert [noise.noise(k) for k in (0, 4, 9)] == pytest.approx([0.02, 0.1, 0.2])
    assert noise.angle(3) == 0
    turn = digits(name="feature_rotation", angle=30).skew
    angles = [turn.angle(k) for k in range(10)]
    assert max(np.abs(angles)) <= 30
    assert len(set(angles)) == 10
    assert angles == [digits(name="feature_rotation", angle=30).skew.angle(k) for k in range(10)]
    assert angles != [digits(seed=1, name="feature_rotation", angle=30).skew.angle(k) for k in range(10)]


def test_the_record_is_fit_for_json_and_warns_of_repairs():
    record = json.loads(json.dumps(digits().record))
    assert record["scheme"] == "dirichlet_class"
    assert record["parameters"]["alpha"] == 0.5
    assert record["warnings"] == []
    repaired = digits(alpha=1e-3, clients=100, max_tries=2).record
    assert repaired["tries"] == 2
    assert f"{repaired['moved']} images" in repaired["warnings"][0]


# The hash


@pytest.mark.processes
def test_the_same_in_another_process():
    code = (
        "from fedsim.data.settings import DataSettings; from fedsim.data.partition import PartitionSettings;"
        "from fedsim.data.population import populate;"
        "print(populate(DataSettings(), PartitionSettings(holdout=0.1, public=2), 3).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digits(seed=3, holdout=0.1, public=2).sha256


@pytest.mark.parametrize("name", ["iid", "dirichlet_class", "blocks"])
def test_another_seed_or_parameter_is_another_hash(name):
    fields = [{}, {"clients": 11}, {"min_images": 9}, {"public": 1}, {"holdout": 0.1}, {"test": "global"}]
    hashes = [digits(name=name, **more).sha256 for more in fields] + [digits(seed=1, name=name).sha256]
    assert len(set(hashes)) == len(hashes)


def test_a_parameter_of_another_scheme_is_not():
    assert digits(name="iid").sha256 == digits(name="iid", alpha=3.0).sha256
    assert digits().sha256 != digits(alpha=3.0).sha256
    assert digits(name="feature_noise").sha256 != digits(name="feature_noise", noise_std=0.3).sha256


def test_other_labels_are_another_hash():
    train, test = LARGE
    flipped = replace(train, y=torch.where(torch.arange(50_000) == 7, (train.y + 1) % 10, train.y))
    settings = PartitionSettings(name="iid")
    assert divide(train, test, settings, 0).sha256 != divide(flipped, test, settings, 0).sha256


def test_changing_one_split_leaves_the_others():
    plain, more = digits(), digits(holdout=0.2, test="global")
    joined = [np.union1d(more.shards["train"].of(k), more.shards["held"].of(k)).tolist() for k in range(10)]
    assert joined == [plain.shards["train"].of(k).tolist() for k in range(10)]
    assert digits(public=4).shards["public"].of(0).tolist() == digits(public=4, clients=3, name="iid").shards["public"].of(0).tolist()


# Natural users


def test_natural_users_stay_whole_and_small_ones_merge():
    users = np.repeat([10, 20, 30, 40, 50], [12, 3, 4, 15, 2])
    labels = np.zeros(36, np.int64)
    made = deal(labels, PartitionSettings(name="natural", clients=0, min_images=5), generator(0, "partition"), users)
    assert sorted(made.sizes()) == [9, 12, 15]  # 20 and 30 merge to 7, the smallest other, which 50 joins
    assert all(len(set(made.owner[users == u])) == 1 for u in set(users))
    two = deal(labels, PartitionSettings(name="natural", clients=2, min_images=0), generator(0, "partition"), users)
    assert two.clients == 2
    assert all(len(set(two.owner[users == u])) == 1 for u in set(users))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(0, 25))
def test_merged_users_reach_the_least(count, least):
    count = np.array(count)
    group = partition_schemes.merged(count, least)
    size = np.bincount(group, count)
    assert size.min() >= min(least, count.sum())
    assert sorted(set(group)) == list(range(len(size)))
    alone = np.bincount(group)[group] == 1
    assert alone[count >= least].sum() >= (count >= least).sum() - 1  # at most one big user takes in the last small ones


def test_natural_users_in_both_parts(tmp_path):
    data = file_data(tmp_path / "a.h5", np.repeat([5, 8, 9], 20), np.array([9, 9, 5, 77]))
    p = populate(data, PartitionSettings(name="natural", clients=0), 0)
    assert p.clients == 3
    assert [set(p.train.users[torch.from_numpy(p.shards["train"].of(k))].tolist()) for k in range(3)] == [{5}, {8}, {9}]
    assert [p.shards["test"].of(k).tolist() for k in range(3)] == [[2], [], [0, 1]]
    assert p.record["untested"] == 1
    assert p.record["clients"] == 3


def test_natural_users_without_a_test_part(tmp_path):
    data = file_data(tmp_path / "a.h5", np.repeat(np.arange(6), 30))
    p = populate(data, PartitionSettings(name="natural", clients=2), 0)
    assert p.clients == 2
    for k in range(2):
        mine = set(p.train.users[torch.from_numpy(p.shards["train"].of(k))].tolist())
        assert len(mine) == 3
        assert set(p.test.users[torch.from_numpy(p.shards["test"].of(k))].tolist()) <= mine


def test_natural_without_users_is_bad_input():
    with pytest.raises(BadInput, match="needs a file with a dataset `client`"):
        digits(name="natural")


# Bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"public": 200}, "public = 200 images per class, but class 0 of digits has"),
        ({"clients": 200}, "clients = 200 x min_images = 10 images = 2000, but there are 1437"),
        ({"clients": 200, "name": "blocks"}, "clients = 200"),
        ({"clients": 140, "public": 10}, "but there are 1337"),
        ({"name": "classes_per_client", "classes_per_client": 11}, "10 classes"),
        (
            {"name": "iid", "clients": 1437, "min_images": 1, "holdout": 0.1},
            r"holdout = 0\.1 leaves no client a held-out image: the largest of 1,437 clients, client 0, has 1 image; .* Lower clients",
        ),
        ({"name": "blocks", "clients": 1437, "min_images": 0, "holdout": 0.5}, "holdout = 0.5 leaves no client a held-out image"),
    ],
)
def test_what_the_digits_cannot_give(fields, said):
    with pytest.raises(BadInput, match=said):
        digits(**fields)


# A million clients


def test_a_million_clients_cost_what_ten_cost():
    settings = PartitionSettings(name="blocks", clients=1_000_000, holdout=0.1)
    tracemalloc.start()
    p = populate(DataSettings(name="fake", image_size=8, channels=1, train_images=20_000_000), settings, 0)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_000_000
    assert peak < 100_000_000
    assert p.counts() is None
    assert p.size(999_999) == 18
    assert p.shards["held"].of(999_999).tolist() == [19_999_998, 19_999_999]
    assert p.train.images(torch.from_numpy(p.shards["train"].of(500_000))).shape == (18, 1, 8, 8)


def of_users(labels: list[int], users: list[int], classes: int) -> Stored:
    x = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return Stored("mine", x, torch.tensor(labels), classes, (0.5,), (0.5,), torch.tensor(users))


def test_users_that_are_merged_are_said() -> None:
    data = of_users([0, 1] * 30, [i // 5 for i in range(60)], 2)
    merged = divide(data, data, PartitionSettings(name="natural", clients=4, min_images=1), 0)
    assert merged.record["notes"] == ["the 12 users are 4 clients: partition.clients = 4 puts them together"]
    own = divide(data, data, PartitionSettings(name="natural", clients=0, min_images=1), 0)
    assert (own.clients, own.record["notes"]) == (12, [])


def test_classes_that_no_client_has_are_said() -> None:
    """Class 1 has as many images as the server keeps; class 3 has none at all."""
    data = of_users([0] * 20 + [1] * 2 + [2] * 20, [0] * 42, 4)
    found = divide(data, data, PartitionSettings(name="iid", clients=2, public=2), 0)
    assert found.record["notes"] == [
        "no client has an image of class 1 (2 training images), class 3 (0 training images):"
        " partition.public = 2 keeps images for the server, and the partition deals out no others"
    ]
    none = divide(replace(data, y=data.y.clamp(max=0)), data, PartitionSettings(name="iid", clients=2), 0)
    assert none.record["notes"][0].endswith("class 3 (0 training images): the set has none")
    assert found.sha256 == divide(replace(data, notes=("said",)), data, PartitionSettings(name="iid", clients=2, public=2), 0).sha256
    every = divide(of_users([0, 1, 2, 3] * 10, [0] * 40, 4), data, PartitionSettings(name="iid", clients=2, public=1), 0)
    assert every.record["notes"] == []
