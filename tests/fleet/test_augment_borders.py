"""Crops into a reflected border, and pixels that are not normalised, from the job's [data] section to the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as vision

from fedsim.core import rng
from fedsim.core.types import Feed
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import Population, populate
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput
from fedsim.fleet.augment import moved
from fedsim.fleet.batches import Batches, Ready, Round

KEYS = rng.key(4, torch.arange(40))
X = torch.rand(40, 2, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 24 images 3x6x5 of three users, whose own mean and deviation are far from 0 and 1."""
    source, path = np.random.default_rng(0), tmp_path / "shades.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = source.integers(20, 90, (24, 3, 6, 5), dtype=np.uint8), np.arange(24) % 2
        file["client"] = np.arange(24) // 2 % 3
        file["x_test"], file["y_test"] = source.integers(0, 256, (9, 3, 6, 5), dtype=np.uint8), np.arange(9) % 2
        file["client_test"] = np.arange(9) % 3
    return path


def people(path: Path, scheme: str = "natural", **fields: Any) -> Population:
    settings = PartitionSettings(name=scheme, clients=0 if scheme == "natural" else 3, min_images=1)
    return populate(DataSettings(name="file", path=str(path), **fields), settings, 0)


def shown(population: Population, feed: Feed, client: int, ready: bool = False) -> tuple[Tensor, Tensor]:
    """All that the client sees in an epoch of the feed, and which images these are."""
    batches = Batches(population, feed, [client], [0], Round(0, 1), "cpu", torch.float64, ready=Ready() if ready else None)
    x = torch.cat([step.x[0] for step in batches])
    return x, batches.images[0][torch.tensor([int(i) for i in batches.plan[0].flatten() if i >= 0])]


# ---- borders


@pytest.mark.parametrize("pad", [1, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_a_window_of_the_reflected_image(pad, flip) -> None:
    """numpy's and torchvision's own reflection, which leaves the edge out."""
    out = moved(X, KEYS, pad, flip, "reflect")
    shifts = rng.integers(rng.fold(KEYS, "crop"), 2, 2 * pad + 1)
    mirrored = rng.integers(rng.fold(KEYS, "flip"), 1, 2).flatten() if flip else torch.zeros(40)
    assert set(shifts.flatten().tolist()) == set(range(2 * pad + 1))
    for i in range(40):
        padded = np.pad(X[i].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        assert torch.equal(torch.from_numpy(padded), vision.pad(X[i], [pad], padding_mode="reflect"))
        window = torch.from_numpy(padded)[:, shifts[i, 0] : shifts[i, 0] + 6, shifts[i, 1] : shifts[i, 1] + 5]
        assert torch.equal(out[i], window.flip(-1) if mirrored[i] else window)
    assert not torch.equal(out, moved(X, KEYS, pad, flip))


def test_the_job_s_border_reaches_the_batches(path) -> None:
    """Of 0s there are none in these images, normalised or not, nor in what is reflected into them."""
    feed = Feed("train", epochs=1, batch=4)
    for border in ("zeros", "reflect"):
        population = people(path, augment=("crop",), crop_pad=2, crop_border=border, scheme="iid", normalise=False)
        x, index = shown(population, feed, 0)
        assert bool((x == 0).any()) == (border == "zeros")
        if border == "reflect":
            for image, i in zip(x, index, strict=True):
                whole = np.pad(population.train.images(i[None])[0].double() / 255, ((0, 0), (2, 2), (2, 2)), mode="reflect")
                windows = [whole[:, a : a + 6, b : b + 5] for a in range(5) for b in range(5)]
                assert any(np.array_equal(image, window) for window in windows)


@pytest.mark.parametrize(("pad", "border", "augment", "fits"), [
    (4, "reflect", ("crop",), True),
    (5, "reflect", ("crop",), False),
    (6, "reflect", ("crop", "flip"), False),
    (6, "zeros", ("crop",), True),
    (6, "reflect", ("flip",), True),
])  # fmt: skip
def test_there_must_be_as_many_pixels_as_are_reflected(path, pad, border, augment, fits) -> None:
    if fits:
        population = people(path, augment=augment, crop_pad=pad, crop_border=border)
        assert (population.crop_pad, population.crop_border) == (pad, border)
        shown(population, Feed("train", epochs=1, batch=4), 0)
    else:
        with pytest.raises(BadInput, match=f"crop_pad = {pad} is too large to reflect into 6x5 images; at most 4"):
            people(path, augment=augment, crop_pad=pad, crop_border=border)


def test_a_border_that_does_not_exist_is_reported() -> None:
    with pytest.raises(BadInput, match="There are: zeros, reflect"):
        DataSettings(crop_border="edge")


# ---- pixels as they are


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(("split", "augment"), [("train", ()), ("train", ("flip",)), ("test", ()), ("global", ())])
def test_pixels_that_are_not_normalised_are_their_value_over_255(path, split, augment, ready) -> None:
    population = people(path, "iid", normalise=False, augment=augment)
    x, index = shown(population, Feed(split, epochs=1, batch=4), 1, ready)
    data = population.train if split == "train" else population.test
    expected = data.images(index).double() / 255
    assert len(x) == len(index) > 1
    if augment:
        assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(x, expected, strict=True))
    else:
        assert torch.equal(x, expected)


def test_normalised_ones_have_the_training_images_mean_and_deviation(path) -> None:
    population = people(path, "iid")
    whole = population.train.images(torch.arange(24)).double() / 255
    mean, std = whole.mean((0, 2, 3), keepdim=True)[0], whole.std((0, 2, 3), correction=0, keepdim=True)[0]
    for split, data in (("train", population.train), ("global", population.test)):
        x, index = shown(population, Feed(split, epochs=1, batch=4, augment=False), 1)
        assert torch.allclose(x, (data.images(index).double() / 255 - mean) / std, atol=1e-9)


@pytest.mark.parametrize("scheme", ["iid", "natural"])
def test_only_the_values_change_and_not_who_has_what(path, scheme) -> None:
    one, other = (people(path, scheme, normalise=normalise) for normalise in (True, False))
    assert one.sha256 == other.sha256
    assert one.record == other.record
    for k in range(3):
        assert np.array_equal(one.shards["train"].of(k), other.shards["train"].of(k))
        assert np.array_equal(one.shards["test"].of(k), other.shards["test"].of(k))


def test_the_server_s_images_are_not_normalised_either(path) -> None:
    settings = PartitionSettings(name="iid", clients=3, min_images=1, public=1)
    public = populate(DataSettings(name="file", path=str(path), normalise=False), settings, 0).public()
    assert public is not None
    assert (public.mean, public.std) == ((0.0,) * 3, (1.0,) * 3)
