"""A partition of one's own: its owners are the clients, its draws follow the partition's seed, and what is wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_module import put_module
from small_job import SMALL

import fedsim
from fedsim import BadInput
from fedsim.config import own_code
from fedsim.config.job import check
from fedsim.core import entry_points
from fedsim.data import own_partition
from fedsim.data.population import Population, populate
from fedsim.simulation.experiment import build_experiment

CODE = """
import random

import numpy as np


def by_class(labels, clients, rng, users, keep=99):
    "Client c gets the images of class c, and nobody the classes from `keep` on."
    return np.where(labels < keep, labels % clients, -1)


def shuffled(labels, clients, rng, users):
    return rng.integers(0, clients, len(labels))


def by_shared_generators(labels, clients, rng, users):
    return (np.random.randint(0, clients, len(labels)) + random.randrange(clients)) % clients


def restless(labels, clients, rng, users):
    return np.random.default_rng().integers(0, clients, len(labels))


def greedy(labels, clients, rng, users):
    labels[:] = 0  # a copy
    return np.zeros(len(labels), int)


def too_far(labels, clients, rng, users):
    return np.full(len(labels), clients)


def floats(labels, clients, rng, users):
    return labels / 2


def short(labels, clients, rng, users):
    return labels[:3]


def old(labels):
    return labels
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_module(tmp_path, "my_parts", CODE, monkeypatch)


def job(function: str, **fields: Any) -> dict[str, Any]:
    return SMALL | {"rounds": 2, "partition": {"clients": 4, "min_images": 0, "name": f"my_parts:{function}"} | fields}


def dealt(table: dict[str, Any], seed: int = 0) -> Population:
    made = check(table)
    return populate(made.data, made.partition, seed)


def test_clients_hold_what_the_function_says() -> None:
    found = dealt(job("by_class", arguments={"keep": 3}))
    labels = found.train.labels
    for client in range(4):
        index = found.shards["train"].of(client)
        assert set(labels(torch.from_numpy(index)).tolist()) == ({client} if client < 3 else set())
    counts = found.counts()
    assert counts is not None
    assert counts.sum() == (labels(torch.arange(len(found.train))) < 3).sum()
    assert found.record["parameters"]["arguments"] == {"keep": 3}
    assert found.record["dropped"] == len(found.train) - counts.sum()


@pytest.mark.parametrize("function", ["shuffled", "by_shared_generators"])
def test_its_draws_follow_the_seed(function: str) -> None:
    one, again, other = dealt(job(function)), dealt(job(function)), dealt(job(function), 1)
    assert one.sha256 == again.sha256 != other.sha256
    apart, same = (dealt(job(function, seed=7), seed).shards["train"] for seed in (1, 2))
    assert all(np.array_equal(apart.of(client), same.of(client)) for client in range(4))


def test_public_and_held_out_images_and_labels_are_left_alone() -> None:
    found = dealt(job("greedy", public=2, holdout=0.25))
    assert len(found.shards["public"].of(0)) == 8
    assert found.shards["train"].sizes().tolist()[1:] == [0, 0, 0]
    counts = found.counts()
    assert counts is not None
    assert (counts[0] > 0).all()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (job("restless"), "[partition] my_parts:restless gives other owners each time it is called; draw by the generator `rng`"),
        (job("too_far"), "gave an image to client 4; the clients are 0 to 3, and -1 is nobody"),
        (job("floats"), "gave (160,) float64; it should give (160,) whole numbers"),
        (job("short"), "gave (3,) int64; it should give (160,) whole numbers"),
        (job("old"), "unexpected keyword argument 'rng'; it is called as function(labels, clients, rng=…, users=…"),
        (job("by_class", arguments={"more": 1}), "unexpected keyword argument 'more'"),
        (job("greedy", min_images=10), "my_parts:greedy gives client 1 0 images, fewer than min_images = 10: lower min_images"),
        (job("none"), "[partition] name = 'my_parts:none': my_parts has no 'none'; it has by_class, shuffled"),
        (job("x", name="nowhere:deal"), "module 'nowhere' cannot be imported"),
        (job("x", name="dirichlet"), "[partition] name = 'dirichlet' is not known (did you mean 'dirichlet_"),
        (job("shuffled", alpha=0.3), "[partition] alpha = 0.3 is not used"),
        (job("x", name="iid", arguments={"a": 1}), "[partition] arguments = {a = 1} is not used: they are of a function of your own"),
    ],
)
def test_what_is_wrong_is_said(table: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        dealt(table)
    assert said in str(caught.value)


def test_a_package_offers_one_by_a_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_points.EntryPoint("by_class", "my_parts:by_class", entry_points.PARTITIONS)
    monkeypatch.setattr(
        entry_points, "entry_points", lambda group, name=None: [entry] if group == entry.group and name in (None, "by_class") else []
    )
    assert own_partition.is_offered("by_class")
    own, named = dealt(job("by_class")), dealt(job("x", name="by_class"))
    assert all(np.array_equal(own.shards["train"].of(client), named.shards["train"].of(client)) for client in range(4))
    assert own_code.modules(check(job("x", name="by_class"))) == {"my_parts"}


def test_a_run_of_it_and_its_code(room: Path) -> None:
    table = job("shuffled")
    facts = build_experiment(check(table)).facts()
    assert facts["the hash of the partition"] == dealt(table).sha256
    assert "the hash of the partition" not in build_experiment(check(SMALL)).facts()
    whole = fedsim.run(table, out=room / "whole.h5", progress=False)
    fedsim.run(table, out=room / "run.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    assert fedsim.run(table, out=room / "run.h5", progress=False).attributes["weights_sha256"] == whole.attributes["weights_sha256"]
    fedsim.run(table, out=room / "two.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    (room / "my_parts.py").write_text(CODE + "\n# another thought\n")
    with pytest.raises(BadInput, match="was made by other code of my_parts:shuffled"):
        fedsim.run(table, out=room / "two.h5", progress=False)
