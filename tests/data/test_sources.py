"""The sources of images that need no files: bundled, drawn, random."""

import hashlib

import h5py
import pytest
import torch

from fedsim.data.drawn_shapes import FIGURES
from fedsim.data.image_sets import Fake, Stored, fifth, moments
from fedsim.data.settings import AUGMENTS, DataSettings
from fedsim.data.sources import digits, open_data
from fedsim.errors import BadInput


def opened(seed=0, **fields):
    return open_data(DataSettings(**fields), seed)


def every(data):
    return data.images(torch.arange(len(data))), data.labels(torch.arange(len(data)))


# Settings


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "cifar"}, "cifar10, cifar100, svhn"),
        ({"name": "cifar10", "image_size": 64}, "image_size applies to digits, shapes and fake"),
        ({"name": "digits", "classes": 5}, "classes applies to shapes and fake"),
        ({"name": "shapes", "classes": 1}, "classes = 1 is too small"),
        ({"name": "digits", "image_size": 7}, "the least is 8"),
        ({"name": "fake", "train_images": 0}, "train_images = 0"),
        ({"name": "file"}, "path"),
        ({"name": "digits", "path": "x.h5"}, "path"),
        ({"name": "emnist", "split": "greek"}, "byclass, bymerge"),
        ({"name": "svhn", "split": "letters"}, "split applies to emnist"),
        ({"augment": ("rotate",)}, "crop, flip, cutout"),
        ({"crop_pad": -1}, "crop_pad = -1"),
    ],
)
def test_senseless_settings_are_refused(fields, said):
    with pytest.raises(BadInput, match=said):
        DataSettings(**fields)


def test_augmentations_default_to_the_usual_ones():
    assert DataSettings(name="cifar10").augments() == ("crop", "flip")
    assert DataSettings(name="cifar10", augment=()).augments() == ()
    assert DataSettings(augment=("cutout",)).augments() == ("cutout",)
    assert set(AUGMENTS) >= {"digits", "shapes", "fake", "file", "tiny_imagenet", "cinic10"}


# Digits


def test_digits_are_1437_and_360_real_images():
    train, test = opened()
    assert (len(train), len(test), train.shape, train.classes) == (1437, 360, (1, 8, 8), 10)
    x, y = every(train)
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert int(x.max()) == 255
    share = torch.bincount(every(test)[1]) / (torch.bincount(y) + torch.bincount(every(test)[1]))
    assert ((share - 0.2).abs() < 0.005).all()


def test_the_split_of_digits_never_changes():
    from sklearn.datasets import load_digits

    chosen = torch.nonzero(fifth(torch.from_numpy(load_digits().target).long())).squeeze(1)
    found = hashlib.sha256(chosen.numpy().astype("<i8").tobytes()).hexdigest()
    assert found == "5bc4861055e8125c79fe4aafb4ebc19205707d5fd4353a8ddcdb1f1191e28767"


def test_digits_are_scikit_learns_to_the_last_grey_level(monkeypatch):
    from sklearn.datasets import load_digits

    train, test = digits(8)
    whole = torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)
    chosen = fifth(torch.from_numpy(load_digits().target).long())
    assert torch.equal(test.x.squeeze(1), whole[chosen])
    assert torch.equal(train.x.squeeze(1), whole[~chosen])
    monkeypatch.setattr("fedsim.data.sources.find_spec", lambda name: None)  # a scikit-learn with its file elsewhere
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip((train, test), digits(8), strict=True))


def test_digits_do_not_depend_on_the_seed():
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(opened(seed=0), opened(seed=1), strict=True))


def test_digits_upsample_bilinearly():
    small, large = opened()[0], opened(image_size=16)[0]
    assert large.shape == (1, 16, 16)
    a = small.x[0, 0].double() / 255 * 16  # 0 … 16, exact but for the rounding to uint8
    inner = 0.75 * 0.75 * a[0, 0] + 0.75 * 0.25 * (a[0, 1] + a[1, 0]) + 0.25 * 0.25 * a[1, 1]
    assert abs(float(large.x[0, 0, 1, 1]) - float(inner) * 255 / 16) <= 1


def test_moments_are_those_of_the_training_images():
    train, test = opened()
    x = train.x.double() / 255
    assert train.mean == pytest.approx([float(x.mean())])
    assert train.std == pytest.approx([float(x.std(correction=0))])
    assert test.mean == train.mean


def test_moments_per_channel_and_of_a_constant_channel():
    x = torch.randint(0, 256, (50, 2, 3, 3), dtype=torch.uint8)
    x[:, 1] = 51
    mean, std = moments(x)
    assert mean == pytest.approx([float(x[:, 0].double().mean() / 255), 0.2])
    assert std == pytest.approx([float((x[:, 0].double() / 255).std(correction=0)), 1.0])


def test_stored_refuses_what_does_not_fit():
    x, y = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="uint8"):
        Stored("a", x.float(), y, 2, (0.0,), (1.0,))
    with pytest.raises(ValueError, match="labels of a"):
        Stored("a", x, y[:3], 2, (0.0,), (1.0,))
    with pytest.raises(ValueError, match="classes are 0 … 1"):
        Stored("a", x, y + 2, 2, (0.0,), (1.0,))


# Fake


def test_fake_is_a_function_of_the_index():
    data = Fake(20_000_000, (3, 32, 32), 10, seed=7)
    index = torch.tensor([19_999_999, 0, 123_456, 0])
    x, y = data.images(index), data.labels(index)
    assert x.shape == (4, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert torch.equal(x[1], x[3])
    assert not torch.equal(x[0], x[1])
    assert torch.equal(data.images(index[2:3])[0], x[2])
    assert torch.equal(data.labels(index[:2]), y[:2])


def test_fake_differs_by_seed_and_part_and_looks_uniform():
    (train, test), (other, _) = (
        opened(name="fake", train_images=2000, test_images=500, image_size=8, channels=1, classes=4),
        opened(seed=1, name="fake", train_images=2000),
    )
    x, y = every(train)
    assert not torch.equal(x[:500], every(test)[0])
    assert not torch.equal(y[:500], every(other)[1][:500])
    assert torch.bincount(y, minlength=4).min() > 420
    mean, std = moments(x)
    assert mean == pytest.approx(train.mean, abs=0.01)
    assert std == pytest.approx(train.std, abs=0.01)


def test_fake_images_of_odd_size_and_out_of_range():
    data = Fake(10, (1, 3, 3), 2, seed=0)
    assert data.images(torch.arange(10)).shape == (10, 1, 3, 3)
    with pytest.raises(IndexError, match="of 10 fake images"):
        data.images(torch.tensor([10]))


# Shapes


@pytest.mark.parametrize(("size", "channels", "classes"), [(8, 1, 2), (13, 3, 20), (32, 3, 10)])
def test_shapes_in_any_size(size, channels, classes):
    train, test = opened(name="shapes", image_size=size, channels=channels, classes=classes, train_images=60, test_images=40)
    assert train.shape == (channels, size, size)
    assert torch.bincount(train.y, minlength=classes).min() >= 60 // classes
    assert not torch.equal(train.x[:40], test.x)
    assert float(train.x.float().std()) > 20


def test_shapes_depend_on_the_number_of_the_image_alone():
    few, many = (
        opened(seed=0, name="shapes", train_images=30, test_images=5)[0],
        opened(seed=5, name="shapes", train_images=700, test_images=5)[0],
    )
    assert torch.equal(few.x, many.x[:30])


def test_shapes_name_their_limits():
    with pytest.raises(BadInput, match="at most 20 classes"):
        opened(name="shapes", classes=21)
    with pytest.raises(BadInput, match="1 or 3"):
        opened(name="shapes", channels=2)


def test_figures_are_different_and_fill_part_of_their_frame():
    line = torch.linspace(-1.2, 1.2, 61)
    inside = torch.stack([figure(line.expand(61, 61), line[:, None].expand(61, 61)) < 0 for figure in FIGURES]).flatten(1).float()
    area = inside.mean(1)
    assert ((area > 0.1) & (area < 0.6)).all()
    overlap = inside @ inside.T / torch.maximum(inside.sum(1), inside.sum(1)[:, None])
    assert (overlap - torch.eye(len(FIGURES))).max() < 0.9


@pytest.mark.full
def test_shapes_can_be_learned_but_not_by_a_line():
    train, test = opened(name="shapes", image_size=16, channels=1, classes=4, train_images=3200, test_images=400)
    mean, std = train.mean[0], train.std[0]
    (x, y), (u, v) = every(train), every(test)
    x, u = (x / 255 - mean) / std, (u / 255 - mean) / std
    torch.manual_seed(0)
    conv = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(512, 4)),
    )
    line = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))
    got = [_fitted(model, x, y, u, v) for model in (conv, line)]
    assert got[0] > 0.65
    assert got[1] < 0.45


def _fitted(model, x, y, u, v):
    step = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for batch in torch.arange(len(x)).repeat(8).split(32):
        step.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        step.step()
    with torch.no_grad():
        return float((model.eval()(u).argmax(1) == v).float().mean())


def test_a_fifth_is_stratified_and_fixed():
    y = torch.tensor([0] * 7 + [1] * 13 + [3] * 5)
    chosen = fifth(y)
    assert int(chosen.sum()) == 5
    assert torch.bincount(y[chosen], minlength=4).tolist() == [1, 3, 0, 1]
    assert torch.equal(chosen, fifth(y))


def test_a_part_of_a_stored_set_has_its_classes_in_proportion_and_is_the_same_for_every_seed() -> None:
    whole, part, again = opened(name="digits"), opened(name="digits", train_images=200), opened(seed=7, name="digits", train_images=200)
    assert [len(data) for data in part] == [200, len(whole[1])]
    shares = torch.bincount(whole[0].y) / len(whole[0])
    assert ((torch.bincount(part[0].y) - 200 * shares).abs() < 1).all()
    assert torch.equal(part[0].x, again[0].x)
    assert part[0].mean == whole[0].mean
    images = {bytes(image.numpy()) for image in whole[0].x}
    assert {bytes(image.numpy()) for image in part[0].x} <= images
    assert len(opened(name="digits", test_images=50)[1]) == 50


def test_more_images_than_a_set_has_are_refused() -> None:
    with pytest.raises(BadInput, match=r"train_images = 1,438: digits has 1,437; leave it out to take all"):
        opened(name="digits", train_images=1438)
    assert len(opened(name="digits", train_images=1437)[0]) == 1437


def test_a_part_of_a_users_own_file_keeps_the_user_of_each_image(tmp_path) -> None:
    """Every image shows the number of its user."""
    users = torch.arange(60) % 7
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["x"], file["y"], file["client"] = users.view(-1, 1, 1).expand(-1, 4, 4).byte().numpy(), (users % 3).numpy(), users.numpy()
        file["x_test"], file["y_test"] = torch.zeros(3, 4, 4).byte().numpy(), [0, 1, 2]
    part, _ = opened(name="file", path=str(tmp_path / "mine.h5"), train_images=20)
    assert len(part) == 20
    assert torch.equal(part.users, part.x[:, 0, 0, 0].long())
