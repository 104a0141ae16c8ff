"""Augmentation against explicit loops over pixels."""

from __future__ import annotations

import torch

from fedsim.core import rng
from fedsim.fleet.augment import cut_out, moved, noisy, rotated

KEYS = rng.key(4, torch.arange(40))
X = torch.rand(40, 2, 6, 5, generator=torch.Generator().manual_seed(0))


def test_crop_and_flip_are_a_shift_within_zeros_and_a_mirror() -> None:
    out, pad = moved(X, KEYS, 2, True), 2
    shifts = rng.integers(rng.fold(KEYS, "crop"), 2, 5)
    mirrored = rng.integers(rng.fold(KEYS, "flip"), 1, 2).flatten()
    assert set(mirrored.tolist()) == {0, 1}
    assert set(shifts.flatten().tolist()) == set(range(5))
    for i in range(40):
        padded = torch.zeros(2, 10, 9)
        padded[:, pad : pad + 6, pad : pad + 5] = X[i]
        window = padded[:, shifts[i, 0] : shifts[i, 0] + 6, shifts[i, 1] : shifts[i, 1] + 5]
        assert torch.equal(out[i], window.flip(-1) if mirrored[i] else window)


def test_without_crop_or_flip_nothing_moves() -> None:
    assert torch.equal(moved(X, KEYS, 0, False), X)


def test_cutout_is_a_square_that_may_hang_over_the_edge() -> None:
    holes = (cut_out(torch.ones_like(X), KEYS, 4) == 0)[:, 0]
    for hole in holes:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert len(rows) <= 4
        assert len(columns) <= 4
    assert len({int(hole.sum()) for hole in holes}) > 1


def test_noise_has_the_clients_deviation_and_rotation_turns() -> None:
    stds = torch.full((40,), 0.5)
    assert abs(float((noisy(X, KEYS, stds) - X).std()) - 0.5) < 0.02
    assert torch.equal(noisy(X, KEYS, torch.zeros(40)), X)
    square = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotated(square, torch.zeros(3)), square, atol=1e-6)
    assert torch.allclose(rotated(square, torch.full((3,), 90.0)), square.rot90(1, (2, 3)), atol=1e-5)
