"""More ranks than there is work, cohorts of one client, clients of one image."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import Console, Lab, assert_same, of_users, users


@pytest.mark.full
def test_five_ranks_on_four_packs(lab: Lab, reference: Path) -> None:
    ended = lab.run("--set", "execution.packs=4", ranks=5)
    assert ended.code == 0, ended.err
    assert "5 ranks, serial fleet, 4 packs of clients" in ended.out
    assert_same(lab.folder / "run.h5", reference)


@pytest.mark.full
def test_a_cohort_of_one_on_more_ranks_than_clients_where_one_client_has_a_single_image(lab: Lab, console: Console) -> None:
    settings = ["--set", "rounds=4", "--set", "model.norm=batch", *of_users(users(lab.folder / "users.h5", (1, 7, 20)), cohort=1)]
    alone, many = console(*settings, "--out", "alone.h5"), lab.run(*settings, ranks=4, run="many.h5")
    assert (alone.code, many.code) == (0, 0), alone.err + many.err
    assert_same(lab.folder / "many.h5", lab.folder / "alone.h5")


def test_a_single_image_with_batch_norm_leaves_only_numbers(lab: Lab, console: Console) -> None:
    settings = ["--set", "rounds=2", "--set", "model.norm=batch", *of_users(users(lab.folder / "users.h5", (1, 1, 7)), cohort=3)]
    ended = console(*settings)
    assert ended.code == 0, ended.err
    with h5py.File(lab.folder / "run.h5", locking=False) as file:
        values = [stored[()] for stored in _datasets(file["model"])]
        assert np.isfinite(file["rounds/accuracy"][2])
    assert values
    assert all(np.isfinite(value).all() for value in values)


def _datasets(group: h5py.Group) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    group.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found
