"""The hash that says whether two places have the same images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsim.data import digest
from fedsim.data.image_sets import Fake, Stored, Unscaled
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import populate
from fedsim.data.settings import DataSettings


def images(n: int = 50) -> Stored:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 4, 5), dtype=torch.uint8, generator=generator)
    return Stored("mine", x, torch.arange(n) % 3, 3, (0.5,), (0.25,))


TRAIN, TEST = images(), images(20)


def changed(what: str) -> Stored:
    x, y = TRAIN.x.clone(), TRAIN.y.clone()
    if what == "a pixel":
        x[17, 0, 3, 4] += 1
    if what == "two labels":
        y[[3, 4]] = y[[4, 3]]
    if what == "the order of images":
        x = x.flip(0)
    if what == "the form of images":
        x = x.reshape(50, 1, 5, 4)
    more = {"mean": (0.4,)} if what == "the mean" else {"classes": 4} if what == "the number of classes" else {}
    return replace(TRAIN, x=x, y=y, **more)


@pytest.mark.parametrize(
    "what", ["a pixel", "two labels", "the order of images", "the form of images", "the mean", "the number of classes"]
)
def test_it_changes_with_what_is_learned_from(what: str) -> None:
    known = digest.digest(TRAIN, TEST)
    assert digest.digest(images(), images(20)) == known
    assert digest.digest(changed(what), TEST) != known
    assert digest.digest(TEST, changed(what)) != digest.digest(TEST, TRAIN)


def test_of_a_large_set_evenly_spaced_images_and_labels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "MOST", 26 * 20)  # 26 images of 20 bytes: of 50 every second, from the first to the last
    monkeypatch.setattr(digest, "MOST_LABELS", 26)
    known = digest.digest(TRAIN, TEST)
    for place, seen in {0: True, 49: True, 1: False, 2: True}.items():
        x, y = TRAIN.x.clone(), TRAIN.y.clone()
        x[place] += 1
        y[place] = (y[place] + 1) % 3
        assert (digest.digest(replace(TRAIN, x=x), TEST) != known) == seen
        assert (digest.digest(replace(TRAIN, y=y), TEST) != known) == seen


def test_of_a_set_that_makes_its_images_few_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Fake):
        def images(self, index: torch.Tensor) -> torch.Tensor:
            asked.append(len(index))
            return super().images(index)

    asked: list[int] = []
    data = Made(10_000, (1, 4, 4), 3, 0, name="of a package")
    assert digest.digest(data, data)
    assert sum(asked) == 2 * digest.FEW


def test_the_population_has_it_whatever_the_scale_and_not_of_drawn_images() -> None:
    one = populate(DataSettings(), PartitionSettings(), 0)
    other = populate(DataSettings(), PartitionSettings(alpha=0.1), 1)
    assert one.data_sha256 == other.data_sha256 == digest.digest(one.train, one.test) != ""
    assert digest.digest(Unscaled(TRAIN), Unscaled(TEST)) != digest.digest(TRAIN, TEST)
    assert populate(DataSettings(name="fake", image_size=8, train_images=100), PartitionSettings(), 0).data_sha256 == ""
