"""The published sets and a user's own file, read from small files in their genuine formats, written here."""

import gzip
import hashlib
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from fedsim.data.settings import EMNIST_SPLITS, DataSettings
from fedsim.data.sources import open_data
from fedsim.data.torchvision_sets import EMNIST_CLASSES, SOURCES
from fedsim.errors import BadInput


def opened(**fields):
    return open_data(DataSettings(**fields), 0)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder, names, label_key, classes, rng):
    """CIFAR's python batches: a pickled dictionary with data (n, 3072) and a list of labels."""
    folder.mkdir()
    rows = {}
    for name in names:
        rows[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, classes, 4).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": rows[name][0], label_key: rows[name][1]}, protocol=2))
    return rows


def publish(monkeypatch, name, folder):
    """Sets the table of checksums to those of the files in the folder."""
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], files={file: md5(folder / file) for file in SOURCES[name].files}))


@pytest.fixture
def cifar10(tmp_path, monkeypatch, rng):
    folder, train = tmp_path / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
    rows = write_cifar(folder, [*train, "test_batch"], "labels", 10, rng)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, protocol=2))
    publish(monkeypatch, "cifar10", folder)
    return folder, rows


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_cifar10(cifar10):
    folder, rows = cifar10
    train, test = opened(name="cifar10", root=str(folder.parent))
    assert (len(train), len(test), train.classes, train.shape) == (20, 4, 10, (3, 32, 32))
    assert train.x.is_contiguous()
    assert np.array_equal(train.x[4:8].numpy().reshape(4, 3072), rows["data_batch_2"][0])
    assert train.y[4:8].tolist() == rows["data_batch_2"][1]
    assert test.y.tolist() == rows["test_batch"][1]
    assert test.mean == (0.4914, 0.4822, 0.4465)


def test_cifar_batches_are_not_unpickled_before_their_checksum(cifar10, tmp_path):
    folder, _ = cifar10
    trap = tmp_path / "sprung"
    (folder / "data_batch_3").write_bytes(b"cos\nmkdir\n(S'" + str(trap).encode() + b"'\ntR.")
    with pytest.raises(BadInput, match="corrupted"):
        opened(name="cifar10", root=str(folder.parent))
    assert not trap.exists()


def test_a_cifar_batch_that_names_anything_else_is_refused_whatever_its_checksum(cifar10, monkeypatch):
    folder, rows = cifar10
    more = {"data": rows["data_batch_3"][0], "labels": OrderedDict()}
    (folder / "data_batch_3").write_bytes(pickle.dumps(more, protocol=2))
    publish(monkeypatch, "cifar10", folder)
    with pytest.raises(BadInput, match=r"data_batch_3: it names collections\.OrderedDict, .* it is not loaded"):
        opened(name="cifar10", root=str(folder.parent))


def test_missing_files_are_named_once(cifar10):
    folder, _ = cifar10
    (folder / "data_batch_2").unlink()
    (folder / "batches.meta").unlink()
    with pytest.raises(BadInput, match=r"data_batch_2, batches\.meta missing in") as error:
        opened(name="cifar10", root=str(folder.parent))
    assert "cifar-10-python.tar.gz" in str(error.value)
    assert "data.download = true" in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist", "emnist", "cinic10", "tiny_imagenet"])
def test_an_absent_or_impossible_root_is_bad_input(name, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(BadInput, match=r"\[data\]"):
            opened(name=name, root=str(root))
    assert not (tmp_path / "absent").exists()


def test_checksums_and_classes_are_those_of_torchvision():
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        there = dict(kind.train_list + kind.test_list) | {kind.meta["filename"]: kind.meta["md5"]}
        assert SOURCES[name].files == there
    assert SOURCES["svhn"].files == {file: checksum for part, (_, file, checksum) in datasets.SVHN.split_list.items() if part != "extra"}
    classes = {split: [name for name in names if name != "N/A"] for split, names in datasets.EMNIST.classes_split_dict.items()}
    assert {split: len(names) for split, names in classes.items()} == EMNIST_CLASSES
    assert set(EMNIST_CLASSES) == set(EMNIST_SPLITS)


def test_a_failed_download_is_bad_input(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(BadInput, match=r"cannot be downloaded to .*no route to host"):
        opened(name="cifar10", root=str(tmp_path), download=True)


@pytest.fixture
def served(tmp_path):
    """A folder, and the address at which a server on this machine offers its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_cifar_is_downloaded_unpacked_and_read_but_not_twice(cifar10, served, tmp_path, monkeypatch):
    (made, rows), (folder, address) = cifar10, served
    packed = folder / datasets.CIFAR10.filename
    with tarfile.open(packed, "w:gz") as file:
        file.add(made, made.name)
    monkeypatch.setattr(datasets.CIFAR10, "url", address + packed.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(packed))
    new = tmp_path / "new"
    for _ in range(2):  # once more after a download that was cut short
        train, _ = opened(name="cifar10", root=str(new), download=True)
        assert np.array_equal(train.x[4:8].numpy().reshape(4, 3072), rows["data_batch_2"][0])
        batch = new / made.name / "data_batch_2"
        whole = batch.read_bytes()
        batch.write_bytes(whole[:100])
    with pytest.raises(BadInput, match=r"data_batch_2 is corrupted .* data\.download = true fetches"):
        opened(name="cifar10", root=str(new))
    batch.write_bytes(whole)
    monkeypatch.setattr(datasets.CIFAR10, "download", None)  # whoever calls it fails
    assert len(opened(name="cifar10", root=str(new), download=True)[0]) == 20


def test_svhn_is_downloaded(served, tmp_path, monkeypatch, rng):
    folder, address = served
    for part in ("train", "test"):
        name = f"{part}_32x32.mat"
        savemat(folder / name, {"X": rng.integers(0, 256, (32, 32, 3, 2), dtype=np.uint8), "y": np.array([[10], [7]], np.uint8)})
        monkeypatch.setitem(datasets.SVHN.split_list, part, [address + name, name, md5(folder / name)])
    publish(monkeypatch, "svhn", folder)
    assert opened(name="svhn", root=str(tmp_path / "new"), download=True)[1].y.tolist() == [0, 7]


def test_fashion_mnist_is_downloaded(served, tmp_path, monkeypatch, rng):
    folder, address = served
    wrote, found = rng.integers(0, 256, (6, 28, 28)), []
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3-ubyte", wrote), ("labels-idx1-ubyte", np.arange(6))):
            write_idx(folder / "raw", array)
            packed = folder / f"{prefix}-{kind}.gz"
            packed.write_bytes(gzip.compress((folder / "raw").read_bytes()))
            found.append((packed.name, md5(packed)))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", found)
    train, _ = opened(name="fashion_mnist", root=str(tmp_path / "new"), download=True)
    assert np.array_equal(train.x.numpy()[:, 0], wrote)


def test_emnist_is_downloaded(served, tmp_path, monkeypatch, rng):
    folder, address = served
    wrote, packed = rng.integers(0, 256, (3, 28, 28)), folder / "gzip.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for part in ("train", "test"):
            for kind, array in (("images-idx3-ubyte", wrote), ("labels-idx1-ubyte", np.array([46, 0, 5]))):
                write_idx(folder / "raw", array)
                file.writestr(f"gzip/emnist-balanced-{part}-{kind}.gz", gzip.compress((folder / "raw").read_bytes()))
    monkeypatch.setattr(datasets.EMNIST, "url", address + packed.name)
    monkeypatch.setattr(datasets.EMNIST, "md5", md5(packed))
    train, _ = opened(name="emnist", root=str(tmp_path / "new"), download=True)
    assert np.array_equal(train.x.numpy()[:, 0], wrote.transpose(0, 2, 1))
    assert train.y.tolist() == [46, 0, 5]


def test_cifar100(tmp_path, monkeypatch, rng):
    folder = tmp_path / "cifar-100-python"
    rows = write_cifar(folder, ["train", "test"], "fine_labels", 100, rng)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, protocol=2))
    publish(monkeypatch, "cifar100", folder)
    train, _ = opened(name="cifar100", root=str(tmp_path))
    assert train.classes == 100
    assert train.y.tolist() == rows["train"][1]


def test_svhn(tmp_path, monkeypatch, rng):
    wrote = {}
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        wrote[part] = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
        savemat(file, {"X": wrote[part], "y": np.array([[10], [1], [2], [9], [10]], np.uint8)})
    publish(monkeypatch, "svhn", tmp_path)
    train, test = opened(name="svhn", root=str(tmp_path))
    assert train.y.tolist() == [0, 1, 2, 9, 0]
    assert np.array_equal(test.x.numpy(), wrote["test"].transpose(3, 2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"spoilt")
    with pytest.raises(BadInput, match="corrupted"):
        opened(name="svhn", root=str(tmp_path))


def write_idx(path, array):
    """The format of MNIST's files: two zero bytes, the type 8 (uint8), the number of dimensions, the dimensions, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes())


def test_fashion_mnist_from_its_raw_files_alone(tmp_path, rng):
    raw = tmp_path / "FashionMNIST" / "raw"
    wrote = rng.integers(0, 256, (6, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", wrote)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(6))
    for name in ("training.pt", "test.pt"):  # torchvision would load these instead
        (raw.parent / "processed").mkdir(exist_ok=True)
        torch.save((torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1)), raw.parent / "processed" / name)
    train, _ = opened(name="fashion_mnist", root=str(tmp_path))
    assert np.array_equal(train.x.numpy()[:, 0], wrote)
    assert train.y.tolist() == [0, 1, 2, 3, 4, 5]
    images = raw / "t10k-images-idx3-ubyte"
    whole = images.read_bytes()
    broken = {
        b"\0\0\x08\x03\0\0": r"ends within its beginning; is the file complete\? Its",
        whole + b"\0": r"goes on after what its .* broken\. Its",
    }
    for content, said in broken.items():
        images.write_bytes(content)
        with pytest.raises(BadInput, match=rf"fashion_mnist cannot be read .*{said} files must be the published ones"):
            opened(name="fashion_mnist", root=str(tmp_path))
    images.write_bytes(whole)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(5))
    with pytest.raises(BadInput, match=r"has 6 images and .* has 5 labels"):
        opened(name="fashion_mnist", root=str(tmp_path))


def test_emnist_is_turned_upright_and_letters_count_from_0(tmp_path, rng):
    raw = tmp_path / "EMNIST" / "raw"
    wrote = rng.integers(0, 256, (3, 28, 28))
    for part in ("train", "test"):
        write_idx(raw / f"emnist-letters-{part}-images-idx3-ubyte", wrote)
        write_idx(raw / f"emnist-letters-{part}-labels-idx1-ubyte", np.array([1, 26, 5]))
    train, _ = opened(name="emnist", split="letters", root=str(tmp_path))
    assert train.y.tolist() == [0, 25, 4]
    assert train.classes == 26
    assert np.array_equal(train.x.numpy()[:, 0], wrote.transpose(0, 2, 1))
    with pytest.raises(BadInput, match="emnist-balanced-train-images-idx3-ubyte"):
        opened(name="emnist", root=str(tmp_path))


# Folders


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def cinic10(tmp_path, rng):
    from fedsim.data.image_folders import CINIC_CLASSES

    for part in ("train", "valid", "test"):
        for c, name in enumerate(CINIC_CLASSES):
            for i in range(2):
                write_image(tmp_path / "CINIC-10" / part / name / f"cifar10-{part}-{i}.png", np.full((32, 32, 3), 10 * c + i, np.uint8))
    return tmp_path


def test_cinic10(cinic10):
    train, test = opened(name="cinic10", root=str(cinic10))
    assert (len(train), len(test), train.shape) == (20, 20, (3, 32, 32))
    assert train.y.tolist() == [c for c in range(10) for _ in range(2)]
    assert train.x[:, 0, 0, 0].tolist() == [10 * c + i for c in range(10) for i in range(2)]


def test_cinic10_names_what_is_wrong(cinic10):
    bad = cinic10 / "CINIC-10" / "test" / "frog" / "cifar10-test-0.png"
    bad.write_bytes(b"no png")
    with pytest.raises(BadInput, match=r"cifar10-test-0\.png cannot be read"):
        opened(name="cinic10", root=str(cinic10))
    write_image(bad, np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(BadInput, match="16x16"):
        opened(name="cinic10", root=str(cinic10))
    for file in bad.parent.iterdir():
        file.unlink()
    with pytest.raises(BadInput, match="frog"):
        opened(name="cinic10", root=str(cinic10))


def test_files_of_other_systems_beside_the_images(cinic10):
    frog = cinic10 / "CINIC-10" / "test" / "frog"
    (frog / "cifar10-test-1.png").rename(frog / "CIFAR10-TEST-1.PNG")
    (frog / "._cifar10-test-0.png").write_bytes(b"of another system")
    (frog / "more").mkdir()
    assert len(opened(name="cinic10", root=str(cinic10))[1]) == 20
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(frog / "cifar10-test-0.png")
    with pytest.raises(BadInput, match=r"test-0\.png has pixels of mode I;16; the published images have 8 bits"):
        opened(name="cinic10", root=str(cinic10))


@pytest.fixture
def tiny(tmp_path):
    top = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(("n01", "n02")):
        for i in range(3):
            write_image(top / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", np.full((64, 64, 3), 100 * c + 10, np.uint8))
    write_image(top / "val" / "images" / "val_0.JPEG", np.full((64, 64), 110, np.uint8))  # a grey image, as some are
    write_image(top / "val" / "images" / "val_1.JPEG", np.full((64, 64, 3), 10, np.uint8))
    (top / "wnids.txt").write_text("n02\nn01\n")
    (top / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return top


def test_tiny_imagenet(tiny):
    train, test = opened(name="tiny_imagenet", root=str(tiny.parent))
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.y.tolist() == [1, 0]
    assert test.x.shape == (2, 3, 64, 64)
    assert abs(int(test.x[0, 2, 5, 5]) - 110) <= 2
    assert abs(int(train.x[3, 0, 5, 5]) - 110) <= 2


@pytest.mark.parametrize(
    ("line", "said"), [("val_9.JPEG\tn02\n", "val_9.JPEG cannot be read"), ("val_0.JPEG\tn77\n", "n77"), ("../x\tn01\n", "x")]
)
def test_tiny_imagenet_names_what_is_wrong(tiny, line, said):
    (tiny / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(BadInput, match=said):
        opened(name="tiny_imagenet", root=str(tiny.parent))


# A user's own file


def write_file(path, **sets):
    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            file[name] = value
    return str(path)


def test_file_with_users_and_a_test_part(tmp_path, rng):
    x, u = rng.integers(0, 256, (8, 3, 5, 5), dtype=np.uint8), rng.integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    who = np.array([7, 7, 3, 3, 3, 7, 9, 9])
    path = write_file(tmp_path / "a.h5", x=x, y=np.arange(8) % 3, client=who, x_test=u, y_test=[3, 0, 1, 2], client_test=[9, 3, 3, 11])
    train, test = opened(name="file", path=path)
    assert np.array_equal(train.x, x)
    assert train.classes == test.classes == 4
    assert train.users.tolist() == who.tolist()
    assert test.users.tolist() == [9, 3, 3, 11]
    assert train.mean == pytest.approx((x / 255).mean((0, 2, 3)))


def test_file_without_a_test_part_gives_a_stratified_fifth(tmp_path, rng):
    x = rng.integers(0, 256, (50, 4, 6), dtype=np.uint8)
    path = write_file(tmp_path / "a.h5", x=x, y=np.repeat([0, 1], [40, 10]).astype(np.uint8), client=np.arange(50))
    train, test = opened(name="file", path=path)
    assert train.shape == (1, 4, 6)
    assert torch.bincount(test.y).tolist() == [8, 2]
    assert sorted([*train.users.tolist(), *test.users.tolist()]) == list(range(50))
    assert np.array_equal(test.x[:, 0], x[test.users])
