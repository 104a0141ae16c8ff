"""What two run files of one job must have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsim.storage.reader import RunReader, read_model

APART = ("seconds", "rank_bytes", "rank0_bytes", "rank0_messages")  # what may differ between two runs of one job


def sha(path: Path) -> str:
    return RunReader(path).attributes["weights_sha256"]


def rows(path: Path) -> dict[str, np.ndarray]:
    reader = RunReader(path)
    every = {f"rounds/{name}": reader.column(name) for name in reader.names("rounds") if name not in APART}
    every |= {f"clients/{name}": reader.clients(name) for name in reader.names("clients")}
    return every | {f"layers/{name}": reader.layers(name) for name in reader.names("layers")}


def assert_same(one: Path, other: Path) -> None:
    """The same weights and the same rows, to the last bit."""
    assert sha(one) == sha(other)
    mine, theirs = rows(one), rows(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def assert_close(one: Path, other: Path) -> None:
    """Two ways of computing the same: equal masks and costs, and weights within 1e-4 of the largest.

    One float32 step agrees to about 1e-6; three rounds of up to 6 steps with momentum amplify that by less than 100.
    """
    mine, theirs = read_model(one), read_model(other)
    assert mine.keys() == theirs.keys()
    for prefix in ("w/", "buf/"):
        largest = max((float(value.abs().max()) for key, value in mine.items() if key.startswith(prefix)), default=0)
        for key, value in mine.items():
            if key.startswith(prefix):
                assert float((value - theirs[key]).abs().max()) <= 1e-4 * largest, key
    for key, value in mine.items():
        if key.startswith("mask/"):
            assert torch.equal(value, theirs[key])
    found, expected = rows(one), rows(other)
    costs = [name for name in found if name.startswith(("rounds/memory_", "rounds/server_flops", "rounds/bytes_", "rounds/max_client_"))]
    assert found.keys() == expected.keys()
    for column in (*costs, "rounds/train_flops", "rounds/extra_flops", "clients/memory", "clients/samples"):
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    np.testing.assert_allclose(found["rounds/nonzero_share"], expected["rounds/nonzero_share"], atol=1e-3)
