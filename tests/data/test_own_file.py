"""A stranger's own file: every kind of it is read rightly, or refused by one message that names the file, the array and what is right."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import fedsim
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import populate
from fedsim.data.settings import DataSettings
from fedsim.data.sources import open_data
from fedsim.errors import BadInput

draw = np.random.default_rng(17)
GREY = draw.integers(0, 256, (20, 6, 6), dtype=np.uint8)
COLOUR = draw.integers(0, 256, (20, 3, 6, 6), dtype=np.uint8)
Y = np.arange(20) % 2
NAMES = np.array(["ann", "bob", "cleo", "dan"])[np.arange(20) % 4]
WIDE = draw.integers(0, 65536, (20, 6, 6), dtype=np.uint16)


@dataclass(frozen=True)
class Kind:
    """One kind of file: what is in it, how it is written, and what comes of it."""

    sets: dict[str, Any] = field(default_factory=dict)
    said: str = ""  # of the refusal; empty: it is accepted
    x: Any = None  # (n, C, H, W) that comes out, where it is accepted
    y: Any = None
    notes: str = ""  # a pattern that the notes match together; empty: there are none
    fields: dict[str, Any] = field(default_factory=dict)  # of [data]
    write: Callable[[Path, dict[str, Any]], None] | None = None


def h5(path: Path, sets: dict[str, Any], **options: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            file.create_dataset(name, data=value, **(options if np.ndim(value) else {}))


def npz(path: Path, sets: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **sets)


def compressed(path: Path, sets: dict[str, Any]) -> None:
    h5(path, sets, compression="gzip", shuffle=True, chunks=True)


def truncated(path: Path, sets: dict[str, Any]) -> None:
    h5(path, sets)
    path.write_bytes(path.read_bytes()[:-400])


def torn(path: Path, sets: dict[str, Any]) -> None:
    npz(path, sets)
    whole = bytearray(path.read_bytes())
    whole[200:300] = bytes(100)
    path.write_bytes(whole)


def raw(content: bytes) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, sets: path.write_bytes(content) and None


def saved_module(path: Path, sets: dict[str, Any]) -> None:
    torch.save({"x": 1}, path)


def single(path: Path, sets: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, GREY)


def grouped(path: Path, sets: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file["train/x"], file["train/y"] = GREY, Y
        file.create_group("x")


def huge(path: Path, sets: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", shape=(10**9, 3, 1000, 1000), chunks=(1, 3, 100, 100), dtype=np.uint8)
        file.create_dataset("y", shape=(10**9,), chunks=(100,), dtype=np.uint8)


def objects(path: Path, sets: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.array([GREY[0], None], dtype=object), y=Y)


def folder(path: Path, sets: dict[str, Any]) -> None:
    path.mkdir()


def empty_zip(path: Path, sets: dict[str, Any]) -> None:
    zipfile.ZipFile(path, "w").close()


def grey(**more: Any) -> dict[str, Any]:
    return {"x": GREY, "y": Y, **more}


AS_8 = np.rint(WIDE.astype(float) * 255 / 65535).astype(np.uint8)
PLAIN = {"x": GREY[:, None], "y": Y}
BEYOND = np.where(GREY > 99, 1 + 1e-7, -1e-7)
HOT = np.eye(4, dtype=np.float32)[Y]
RARE = np.repeat(np.arange(8), [5, 5, 5, 1, 1, 1, 1, 1])
TEN = 1 + np.arange(20) % 10
RELABEL = {"relabel": True}

KINDS = {
    # the container
    "no file": Kind(said="there is no file", write=lambda path, sets: None),
    "h5": Kind(grey(), **PLAIN),
    "npz": Kind(grey(), **PLAIN, write=npz),
    "h5, compressed": Kind(grey(), **PLAIN, write=compressed),
    "names of keras": Kind({"x_train": GREY, "y_train": Y}, **PLAIN, write=npz),
    "both names": Kind(grey(x_train=GREY), "both 'x' and 'x_train'"),
    "datasets in groups": Kind(said=r"no array 'x'\. It has: train/x, train/y", write=grouped),
    "nothing": Kind({}, "no array 'x'. It has: nothing"),
    "no labels": Kind({"x": GREY}, "no array 'y'"),
    "truncated h5": Kind(grey(), "cannot be read: .*is the file complete", write=truncated),
    "torn npz": Kind(grey(), "cannot be read: .*is the file complete", write=torn),
    "text": Kind(said="neither an HDF5 file nor an npz file", write=raw(b"label,pixel0\n3,17\n")),
    "empty file": Kind(said="neither an HDF5 file nor an npz file", write=raw(b"")),
    "pickle": Kind(said="a pickle, which fedsim does not load", write=raw(pickle.dumps({"x": 1}))),
    "npy": Kind(said="a single array of numpy.save", write=single),
    "gzip": Kind(said="compressed by gzip", write=raw(b"\x1f\x8b\x08rest")),
    "matlab": Kind(said="scipy.io.loadmat", write=raw(b"MATLAB 5.0 MAT-file")),
    "torch.save": Kind(said="no array 'x'", write=saved_module),
    "zip without arrays": Kind(said="no array 'x'. It has: nothing", write=empty_zip),
    "folder": Kind(said="is a folder", write=folder),
    "more than any memory": Kind(said="needs more memory than there is: 3,000,000,000,000,000 bytes of images", write=huge),
    "npz of objects": Kind(said="Python objects, which only a pickle can hold", write=objects),
    # pixels
    "bool": Kind(grey(x=GREY > 99), x=255 * (GREY > 99)[:, None], y=Y, notes="true and false are taken as the pixels 255 and 0"),
    "int64 in 0 … 255": Kind(grey(x=GREY.astype(np.int64)), **PLAIN, notes="int64 pixels from .* are taken as 8-bit pixels.*exactly"),
    "big-endian int32": Kind(grey(x=GREY.astype(">i4")), **PLAIN, notes="exactly", write=npz),
    "uint16": Kind(grey(x=WIDE), x=AS_8[:, None], y=Y, notes="16-bit pixels and scaled to 8 bits, 65535 to 255, rounded by at most 0.5"),
    "12 bits": Kind(grey(x=GREY.astype(np.uint16) * 16), x=np.rint(GREY * (16 * 255 / 4095))[:, None], y=Y, notes="12-bit pixels"),
    "uint16 whose test part is dark": Kind(
        {"x": WIDE, "y": Y, "x_test": WIDE[:4] // 300, "y_test": Y[:4]}, x=AS_8[:, None], y=Y, notes="x and x_test: uint16 pixels"
    ),
    "negative pixels": Kind(grey(x=GREY.astype(np.int16) - 1), "int16 pixels from -1 .*it must be uint8"),
    "32-bit pixels": Kind(grey(x=GREY.astype(np.int64) << 20), "int64 pixels .*it must be uint8"),
    "floats in [0, 1], exact": Kind(grey(x=GREY / 255), **PLAIN, notes="scaled to 8 bits, 1.0 to 255, exactly"),
    "floats in [0, 1], rounded": Kind(
        grey(x=(WIDE / 65535).astype(np.float32)), x=AS_8[:, None], y=Y, notes=r"float32 .*rounded by at most 0\.(4|50)"
    ),
    "half floats in [0, 1]": Kind(grey(x=(GREY / 255).astype(np.float16)), **PLAIN, notes="float16 .*rounded by at most 0.0"),
    "whole floats": Kind(grey(x=GREY.astype(">f4")), **PLAIN, notes="taken as 8-bit pixels, where 255 is white, exactly", write=npz),
    "floats in [-1, 1]": Kind(grey(x=GREY / 127.5 - 1), r"x lies in -1 … 1; .*\(x \+ 1\) / 2"),
    "floats with fractions in 0 … 255": Kind(grey(x=GREY * 0.9 + 0.05), r"x lies in 0.05 … .* x / 255"),
    "floats a rounding outside of [0, 1]": Kind(
        grey(x=np.where(GREY > 99, 1 + 1e-7, -1e-7)), x=255 * (GREY > 99)[:, None], y=Y, notes="exactly"
    ),
    "standardised floats": Kind(grey(x=(GREY - 120.0) / 60), "x lies in -2.* fedsim normalises itself"),
    "floats of other scales": Kind(
        {"x": GREY / 255, "y": Y, "x_test": GREY[:4] * 1.0, "y_test": Y[:4]}, "x lies in 0 … 1; x_test lies in .*the same scale"
    ),
    "bytes beside floats": Kind({"x": GREY, "y": Y, "x_test": GREY[:4] / 255, "y_test": Y[:4]}, "x is uint8 and x_test is float64"),
    "NaN": Kind(grey(x=np.where(np.arange(20)[:, None, None] == 7, np.nan, GREY / 255)), "no numbers .*image 7"),
    "infinity": Kind(grey(x=np.where(np.arange(20)[:, None, None] == 3, np.inf, GREY / 255)), "no numbers .*image 3"),
    "complex pixels": Kind(grey(x=GREY * 1j), "x is an array of complex128; it must be uint8"),
    "text for pixels": Kind(grey(x=GREY.astype("S3")), r"x is an array of \|S3; it must be uint8"),
    "records": Kind(grey(x=np.zeros((20, 6, 6), [("r", "u1"), ("g", "u1")])), "x is an array of .*plain numbers or text"),
    # shapes
    "(n, C, H, W)": Kind({"x": COLOUR, "y": Y}, x=COLOUR, y=Y),
    "(n, H, W, C)": Kind({"x": COLOUR.transpose(0, 2, 3, 1), "y": Y}, x=COLOUR, y=Y, notes=r"read as \(n, H, W, C\): 6x6 pixels with 3"),
    "(n, H, W, C), Fortran order": Kind(
        {"x": np.asfortranarray(COLOUR.transpose(0, 2, 3, 1)), "y": Y}, x=COLOUR, y=Y, notes="with 3 channels", write=npz
    ),
    "(n, H, W, 1)": Kind(grey(x=GREY[..., None]), **PLAIN, notes="6x6 pixels with 1 channel$"),
    "(n, 3, 6, 3)": Kind(
        {"x": COLOUR[..., :3], "y": Y}, r"read as \(n, C, H, W\): 6x3 .*\"nchw\"\) or as \(n, H, W, C\): 3x6 .*\"nhwc\"\); set data.layout"
    ),
    "(n, 3, 6, 3) as nchw": Kind({"x": COLOUR[..., :3], "y": Y}, x=COLOUR[..., :3], y=Y, fields={"layout": "nchw"}),
    "(n, 3, 6, 3) as nhwc": Kind({"x": COLOUR[..., :3], "y": Y}, x=COLOUR[..., :3].transpose(0, 3, 1, 2), y=Y, fields={"layout": "nhwc"}),
    "feature maps": Kind({"x": np.tile(COLOUR, (1, 3, 1, 1)), "y": Y}, x=np.tile(COLOUR, (1, 3, 1, 1)), y=Y),
    "(n, H, W) under a layout": Kind(grey(), "x is .*grey images.*leave out data.layout", fields={"layout": "nchw"}),
    "(n, H W)": Kind(grey(x=GREY.reshape(20, 36)), r"rows of pixels: x\.reshape\(20, 6, 6\)"),
    "(H, W, C, n)": Kind({"x": COLOUR.transpose(2, 3, 1, 0), "y": Y}, r"along the first: x\.transpose\(3, 0, 1, 2\)"),
    "five axes": Kind({"x": COLOUR[:, :, None], "y": Y}, r"x is \(20, 3, 1, 6, 6\); it must be \(n, C, H, W\)"),
    "a number": Kind({"x": 5, "y": Y}, r"x is \(\) .*both must be arrays"),
    "no images": Kind({"x": GREY[:0], "y": Y[:0]}, r"x is \(0, 6, 6\).*not empty"),
    "fewer labels": Kind(grey(y=Y[:19]), r"x is \(20, 6, 6\) and y is \(19,\): 20 images and 19 labels"),
    "labels in a row": Kind(grey(y=Y[None]), r"y is \(1, 20\): 20 images and 1 labels; each image needs one"),
    "test images of another size": Kind(
        {**grey(), "x_test": GREY[:, :5], "y_test": Y}, r"images of x_test are \(1, 5, 6\), those of x are"
    ),
    "test images with other channels": Kind({**grey(), "x_test": COLOUR, "y_test": Y}, r"images of x_test are \(3, 6, 6\)"),
    "test images without labels": Kind({**grey(), "x_test": GREY}, "no array 'y_test'"),
    "no test images": Kind({**grey(), "x_test": GREY[:0], "y_test": Y[:0]}, "x_test is .*not empty"),
    # labels
    "labels (n, 1)": Kind(grey(y=Y[:, None]), **PLAIN),
    "float labels": Kind(grey(y=Y.astype(">f8")), **PLAIN, write=npz),
    "bool labels": Kind(grey(y=Y == 1), **PLAIN),
    "uint64 labels": Kind(grey(y=Y.astype(np.uint64)), **PLAIN),
    "one-hot labels": Kind(grey(y=HOT), **PLAIN, notes="one-hot rows.*\n4 classes, of which 2, 3 have no image"),
    "several labels": Kind(grey(y=np.ones((20, 3))), "Images with several labels cannot be used"),
    "probabilities": Kind(grey(y=np.full((20, 2), 0.5)), "rows with a single 1"),
    "float labels with fractions": Kind(grey(y=Y * 0.5), r"y has the value 0\.5 \(image 1\)"),
    "NaN labels": Kind(grey(y=np.where(Y, np.nan, 0)), r"y has the value nan \(image 1\)"),
    "labels from 1 to 10": Kind(
        grey(y=TEN),
        x=GREY[:, None],
        y=TEN,
        notes=r"of which 0 has no image \(images by class: 1 has 2, 2 has 2, .*data.relabel = true",
    ),
    "labels from 1 to 10, numbered anew": Kind(grey(y=TEN), x=GREY[:, None], y=TEN - 1, notes="1 -> 0, .*10 -> 9", fields=RELABEL),
    "labels with gaps": Kind(grey(y=Y * 7), x=GREY[:, None], y=Y * 7, notes="8 classes, of which 1, 2, 3, 4, 5, 6 have no image"),
    "labels with gaps, numbered anew": Kind(grey(y=Y * 7), **PLAIN, notes="0 -> 0, 7 -> 1", fields=RELABEL),
    "negative labels": Kind(grey(y=2 * Y - 1), "y has the label -1; .*data.relabel = true"),
    "negative labels, numbered anew": Kind(grey(y=2 * Y - 1), **PLAIN, notes="-1 -> 0, 1 -> 1", fields=RELABEL),
    "labels of text": Kind(grey(y=np.array(["cat", "dog"])[Y].astype("S")), "labels of text, such as 'cat'; data.relabel"),
    "labels of text, numbered anew": Kind(
        grey(y=np.array(["cat", "dog"])[Y]), **PLAIN, notes="cat -> 0, dog -> 1", fields=RELABEL, write=npz
    ),
    "numbers for hashes": Kind(grey(y=Y * 4_000_000_000), "the largest label is 4000000000, .*data.relabel"),
    "labels above int64": Kind(grey(y=Y.astype(np.uint64) * np.uint64(2**64 - 1)), "whole numbers are at most"),
    "one class": Kind(grey(y=Y * 0), "all labels are equal"),
    "a class of the test set alone": Kind(
        {**grey(), "x_test": GREY[:3], "y_test": [0, 2, 2]}, **PLAIN, notes=r"alone has class 2 \(2 of its 3 images\)"
    ),
    "a class of the fifth alone": Kind(
        {"x": GREY[:, None], "y": RARE}, x=GREY[:, None], y=RARE, notes=r"the test set alone has class 3 \(1 of its 4 images\)"
    ),
    # users
    "users of text": Kind(grey(client=NAMES.astype("S")), **PLAIN),
    "users of text, npz": Kind(grey(users=NAMES), **PLAIN, write=npz),
    "users as floats": Kind(grey(client=(np.arange(20) % 4) * 10.0), **PLAIN),
    "users with fractions": Kind(grey(client=np.arange(20) / 2), r"client has the value 0\.5 \(image 1\)"),
    "too few users": Kind(grey(client=NAMES[:19].astype("S")), r"client is \(19,\) .*one value for each image"),
    "a user without a name": Kind(grey(client=np.where(Y, NAMES, "").astype("S")), "client has an empty text"),
    "users of the test set alone": Kind(
        {**grey(), "x_test": GREY, "y_test": Y, "client_test": NAMES.astype("S")}, "has client_test, but no client"
    ),
    "users of two kinds": Kind(
        {**grey(client=Y), "x_test": GREY, "y_test": Y, "client_test": NAMES.astype("S")}, "one has numbers and one has text"
    ),
    "test users without a test set": Kind(grey(client=Y, client_test=Y), "has client_test, but no x_test"),
}


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_rightly_or_refused_well(tmp_path: Path, kind: str) -> None:
    made = KINDS[kind]
    path = tmp_path / "mine.data"
    (made.write or h5)(path, made.sets)
    settings = DataSettings(name="file", path=str(path), **made.fields)
    if made.said:
        with pytest.raises(BadInput, match=made.said) as error:
            open_data(settings, 0)
        assert str(error.value).startswith("[data]")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return
    train, test = open_data(settings, 0)
    if "x_test" in made.sets:
        assert np.array_equal(train.x, made.x)
        assert np.array_equal(train.y, made.y)
    else:  # a fifth of the images, in their order, is the test set
        rows = [*(train.x.flatten(1).tolist()), *(test.x.flatten(1).tolist())]
        found = sorted(zip(rows, [*train.y.tolist(), *test.y.tolist()], strict=True))
        wanted = sorted(zip(made.x.reshape(20, -1).astype(int).tolist(), made.y.tolist(), strict=True))
        assert train.shape == made.x.shape[1:]
        assert found == wanted
    assert bool(train.notes) == bool(made.notes), train.notes
    assert re.search(made.notes, "\n".join(train.notes), re.DOTALL), train.notes


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("gone.h5", "x", "x is a virtual dataset, and a part of it is missing: there is no file gone.h5"),
        ("there.h5", "images", "x is a virtual dataset, and a part of it is missing: there.h5 has no images"),
        ("there.h5", "x", ""),
        (".", "stored", ""),
    ],
)
def test_a_virtual_dataset_is_read_where_its_sources_are_and_refused_where_not(tmp_path: Path, source: str, name: str, said: str) -> None:
    """HDF5 gives zeros for what is missing, and no error."""
    h5(tmp_path / "there.h5", {"x": GREY})
    layout = h5py.VirtualLayout(GREY.shape, "u1")
    layout[...] = h5py.VirtualSource(source, name, GREY.shape)
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["y"], file["stored"] = Y, GREY
        file.create_virtual_dataset("x", layout)
    settings = DataSettings(name="file", path=str(tmp_path / "mine.h5"))
    if said:
        with pytest.raises(BadInput, match=said):
            open_data(settings, 0)
    else:
        train, test = open_data(settings, 0)
        assert int(train.images(torch.arange(16)).sum() + test.images(torch.arange(4)).sum()) == int(GREY.sum(dtype=int))


def test_users_of_text_are_clients_with_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.h5"
    tested = {"x_test": GREY[:3], "y_test": Y[:3], "client_test": np.array([b"dan", b"eve", b"ann"])}
    h5(path, grey(client=NAMES.astype("S")) | tested)
    settings = DataSettings(name="file", path=str(path))
    made = populate(settings, PartitionSettings(name="natural", clients=0, min_images=1), 0)
    assert made.names == {"client": ("ann", "bob", "cleo", "dan")}
    assert [sorted({NAMES[i] for i in made.shards["train"].of(client).tolist()}) for client in range(4)] == [
        ["ann"],
        ["bob"],
        ["cleo"],
        ["dan"],
    ]
    assert [made.shards["test"].of(client).tolist() for client in range(4)] == [[2], [], [], [0]]
    few = populate(settings, PartitionSettings(name="natural", clients=0, min_images=6), 0)
    assert made.record["notes"] == []
    assert few.record["notes"] == ["the 4 users are 2 clients: users with fewer than partition.min_images = 6 images are put together"]
    merged = populate(settings, PartitionSettings(name="natural", clients=2, min_images=1), 0)
    assert sorted(", ".join(merged.names["client"]).split(", ")) == ["ann", "bob", "cleo", "dan"]


def test_users_with_numbers_of_their_own_keep_them(tmp_path: Path) -> None:
    for users, names in ((Y * 40 + 7, {"client": ("7", "47")}), (Y, {})):
        h5(tmp_path / "mine.h5", grey(client=users))
        made = populate(
            DataSettings(name="file", path=str(tmp_path / "mine.h5")), PartitionSettings(name="natural", clients=0, min_images=1), 0
        )
        assert made.names == names


def test_the_run_file_keeps_the_names(tmp_path: Path) -> None:
    npz(tmp_path / "mine.npz", {"x": COLOUR, "y": np.array(["cat", "dog"])[Y], "users": NAMES})
    job = {
        "rounds": 1,
        "data": {"name": "file", "path": str(tmp_path / "mine.npz"), "relabel": True},
        "partition": {"name": "natural", "min_images": 1},
        "model": {"width": 2},
        "execution": {"plan": "reference"},
        "method": {"name": "fedavg"},
    }
    found = fedsim.run(job, out=tmp_path / "run.h5", progress=False)
    assert found.called("client") == ["ann", "bob", "cleo", "dan"]
    assert found.called("class") == ["cat", "dog"]
    assert "cat -> 0, dog -> 1" in found.attributes["partition"]
    assert fedsim.run(job, out=tmp_path / "run.h5", progress=False).attributes["finished"]
