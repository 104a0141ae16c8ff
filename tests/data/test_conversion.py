"""Images in the forms in which data sets are published become the file that jobs read: the same pixels, labels, users and parts."""

from __future__ import annotations

import csv
import gzip
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from fedsim.data.conversion import batches as batching
from fedsim.data.conversion import writing
from fedsim.data.conversion.batches import batches
from fedsim.data.conversion.opening import open_source
from fedsim.data.conversion.options import Options
from fedsim.data.conversion.source import Row
from fedsim.data.conversion.survey import drawn, survey
from fedsim.data.own_file.writing import FileWriter
from fedsim.data.settings import DataSettings
from fedsim.data.showing.description import describe
from fedsim.data.showing.sheet import _font
from fedsim.data.sources import open_data
from fedsim.errors import BadInput, NoRoom

draw = np.random.default_rng(5)
PIXELS = draw.integers(0, 256, (24, 5, 6), dtype=np.uint8)
COLOURS = draw.integers(0, 256, (24, 5, 6, 3), dtype=np.uint8)


def png(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def table(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def converted(source: Path, **given: Any) -> Path:
    """The file that a source becomes, beside it."""
    out = source.with_name("out.h5")
    options = Options(**given)
    opened = open_source(str(source), options)
    assert opened is not None
    found = survey(opened, options)
    for _ in writing.write(batches(opened, found, options), found, out):
        pass
    return out


def arrays(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {name: (file[name].asstr()[()] if file[name].dtype.kind == "O" else file[name][()]).tolist() for name in file}


def tree(root: Path, form: str = "{part}/{label}/{i}.png") -> Path:
    """Eight training images and four test images of two classes and two users."""
    for i in range(12):
        names = {"part": "test" if i >= 8 else "train", "label": ("cat", "ant")[i % 2], "user": ("u7", "u1")[i // 2 % 2], "i": i}
        png(root / form.format(**names), PIXELS[i])
    return root


# Every form


def test_image_folders_become_classes_in_sorted_order(tmp_path: Path) -> None:
    made = arrays(converted(tree(tmp_path / "tree")))
    assert made["x"] == PIXELS[[1, 3, 5, 7, 0, 2, 4, 6]].tolist()
    assert made["y"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert made["x_test"] == PIXELS[[11, 9, 10, 8]].tolist()  # by the names of the files: 11 before 9
    assert made["y_test"] == [0, 0, 1, 1]
    assert made["class_names"] == ["ant", "cat"]
    assert "client" not in made


@pytest.mark.parametrize("levels", ["user/class", "class/user"])
def test_a_level_of_folders_names_the_users(tmp_path: Path, levels: str) -> None:
    form = {"user/class": "{part}/{user}/{label}/{i}.png", "class/user": "{part}/{label}/{user}/{i}.png"}[levels]
    made = arrays(converted(tree(tmp_path / "tree", form), levels=levels))
    rows = {tuple(np.ravel(x)): (made["class_names"][y], user) for x, y, user in zip(made["x"], made["y"], made["client"], strict=True)}
    assert rows == {tuple(PIXELS[i].ravel()): (("cat", "ant")[i % 2], ("u7", "u1")[i // 2 % 2]) for i in range(8)}
    assert sorted(made["client_test"]) == ["u1", "u1", "u7", "u7"]


def test_the_parts_of_a_tree(tmp_path: Path) -> None:
    """`val` is tested on where there is no `test`; a tree without parts trains on everything; hidden files are no images."""
    for part in ("train", "val", "extra"):
        for i, label in enumerate("ab"):
            png(tmp_path / "tree" / part / label / "1.PNG", PIXELS[i])
    (tmp_path / "tree" / "train" / "a" / "._1.png").write_bytes(b"left by another system")
    (tmp_path / "tree" / "train" / "a" / "readme.txt").write_text("no image")
    opened = open_source(str(tmp_path / "tree"), Options())
    assert opened is not None
    assert [(row.where, row.label, row.test) for row in opened.rows()] == [
        ("train/a/1.PNG", "a", False),
        ("train/b/1.PNG", "b", False),
        ("val/a/1.PNG", "a", True),
        ("val/b/1.PNG", "b", True),
    ]
    assert opened.notes == [
        f"of {tmp_path / 'tree'} these folders are left out: extra",
        "files that are no images are left out: 1, such as train/a/readme.txt",
    ]
    alone = open_source(str(tmp_path / "tree" / "val"), Options())
    assert alone is not None
    assert not any(row.test for row in alone.rows())


def test_a_csv_of_paths(tmp_path: Path) -> None:
    for i in range(6):
        png(tmp_path / "images" / f"{i}.png", COLOURS[i])
    rows = [[f"images/{i}.png", i % 3, f"w{i % 2}", "test" if i == 5 else "train", "x"] for i in range(6)]
    table(tmp_path / "all.csv", [["Path", "label", "user", "split", "other"], *rows])
    out = converted(tmp_path / "all.csv")
    made = arrays(out)
    assert made["x"] == COLOURS[:5].transpose(0, 3, 1, 2).tolist()
    assert made["y"] == [0, 1, 2, 0, 1]
    assert made["client"] == ["w0", "w1", "w0", "w1", "w0"]
    assert (made["y_test"], made["client_test"]) == ([2], ["w1"])
    table(tmp_path / "elsewhere.csv", [["file", "class"], *([f"{i}.png", i % 2] for i in range(4))])
    assert arrays(converted(tmp_path / "elsewhere.csv", images=str(tmp_path / "images")))["x"] == made["x"][:4]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_csv_of_pixels(tmp_path: Path, header: bool, packed: bool) -> None:
    """As MNIST is passed on: the label first, then the pixels row by row; two files."""
    squares = draw.integers(0, 256, (8, 4, 4), dtype=np.uint8)
    head = [["label", *(f"{i}x{j}" for i in range(4) for j in range(4))]] if header else []
    for name, some in (("train", range(5)), ("test", range(5, 8))):
        table(tmp_path / f"{name}.csv", head + [[i % 2, *squares[i].ravel()] for i in some])
        if packed:
            (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress((tmp_path / f"{name}.csv").read_bytes()))
    ending = ".csv.gz" if packed else ".csv"
    made = arrays(converted(tmp_path / f"train{ending}", test=str(tmp_path / f"test{ending}")))
    assert made["x"] == squares[:5].tolist()
    assert made["y"] == [0, 1, 0, 1, 0]
    assert made["x_test"] == squares[5:].tolist()
    assert made["y_test"] == [1, 0, 1]


def test_a_csv_of_coloured_pixels(tmp_path: Path) -> None:
    """The label need not stand first."""
    shaped = draw.integers(0, 256, (4, 3, 2, 5), dtype=np.uint8)
    table(tmp_path / "c.csv", [[*(f"p{i}" for i in range(30)), "target"], *([*shaped[i].ravel(), i % 2] for i in range(4))])
    assert arrays(converted(tmp_path / "c.csv", shape=(3, 2, 5)))["x"] == shaped.tolist()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(tmp_path: Path, ending: str) -> None:
    labels = np.arange(24) % 3
    for name, some in (("train", slice(18)), ("t10k", slice(18, 24))):
        idx(tmp_path / "raw" / f"{name}-images-idx3-ubyte{ending}", PIXELS[some])
        idx(tmp_path / "raw" / f"{name}-labels-idx1-ubyte{ending}", labels[some])
    made = arrays(converted(tmp_path / "raw"))
    assert made["x"] == PIXELS[:18].tolist()
    assert made["y"] == labels[:18].tolist()
    assert made["x_test"] == PIXELS[18:].tolist()
    alone = arrays(converted(tmp_path / "raw" / f"t10k-images-idx3-ubyte{ending}"))
    assert alone["x"] == made["x_test"]
    assert "x_test" not in alone


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Folders whose names are not UTF-8 are classes as others are."""
    for i, name in enumerate((b"\xe9t\xe9", b"hiver")):
        png(tmp_path / "tree" / os.fsdecode(name) / "1.png", PIXELS[i])
    made = arrays(converted(tmp_path / "tree", test_share=0.0))
    assert made["class_names"] == ["\\xe9t\\xe9", "hiver"]


def test_a_job_reads_what_was_written(tmp_path: Path) -> None:
    out = converted(tree(tmp_path / "tree", "{part}/{user}/{label}/{i}.png"), levels="user/class")
    train, test = open_data(DataSettings(name="file", path=str(out)), 0)
    assert (train.classes, len(train), len(test)) == (2, 8, 4)
    assert train.class_names == ("ant", "cat")  # type: ignore[attr-defined]
    assert train.user_names == ("u1", "u7")  # type: ignore[attr-defined]
    assert train.notes == ()  # type: ignore[attr-defined]


# Labels, users and parts


@dataclass
class Listed:
    """A source in memory."""

    labels: list[str]
    users: list[str | None] = field(default_factory=list)
    tested: list[bool] = field(default_factory=list)
    numbers: str = "words"
    name: str = "listed"
    classes: int = 0
    class_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    alive: int = 0  # images that somebody holds
    most: int = 0
    changed: int = 0  # images more in the second reading

    def rows(self) -> Iterator[Row]:
        for i, label in enumerate(self.labels):
            yield Row(f"image {i}", label, self.users[i] if self.users else None, self.tested[i] if self.tested else False)

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        for i in range(len(self.labels) + self.changed):
            picture = np.full((1, 8, 8), i % 251, np.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(picture, self._died)
            yield f"image {i}", picture
            del picture

    def _died(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize(
    ("labels", "numbers", "relabel", "y", "names"),
    [
        (["1", "0", "1.0"], "words", False, [1, 0, 1], None),
        (["10", "9", "2"], "words", True, [2, 1, 0], ("2", "9", "10")),  # numbers are sorted as numbers
        (["-1", "1"], "words", True, [0, 1], ("-1", "1")),
        (["dog", "ant"], "words", False, [1, 0], ("ant", "dog")),
        (["1", "cat", "0.5"], "words", True, [1, 2, 0], ("0.5", "1", "cat")),
        (["0", "1", "10", "2", *"3456789"], "names", False, [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9], None),
        (["0", "00", "1"], "names", False, [0, 1, 2], ("0", "00", "1")),  # two folders stay two classes
        (["0", "b"], "names", False, [0, 1], ("0", "b")),
    ],
)
def test_labels(labels: list[str], numbers: str, relabel: bool, y: list[int], names: tuple[str, ...] | None) -> None:
    found = survey(Listed(labels, numbers=numbers), Options(relabel=relabel))
    assert (found.y.tolist(), found.class_names) == (y, names)
    assert found.classes == len(set(y))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["0", "1.5"], "the label '1.5' (image 1) is no whole number; --relabel takes"),
        (["0", "cat", "1"], "the label 'cat' (image 1) is no whole number, and others such as '0' are numbers"),
        (["1", "3"], "the labels go from 1 to 3, and no image has 0, 2; labels should be 0 … classes-1, and --relabel"),
        (["0", "9" * 18], "no image has 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …"),
        (["0", "-2", "1"], "the label -2 (image 1) is below 0"),
        (["0", "0"], "all images have the label '0'|all images have the label 0"),
        (["a", "a"], "all images have the label 'a'"),
        ([], "listed has no images"),
    ],
)
def test_labels_that_are_refused(labels: list[str], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        survey(Listed(labels), Options())
    assert any(text in str(refused.value) for text in said.split("|"))


def test_users_are_numbers_where_all_are() -> None:
    every = np.ones(3, bool)
    assert survey(Listed(["0", "1", "0"], ["7", "12", "7"]), Options()).user(every).tolist() == [7, 12, 7]  # type: ignore[union-attr]
    assert survey(Listed(["0", "1", "0"], ["7", "012", "b"]), Options()).user(every) == ["7", "012", "b"]
    assert survey(Listed(["0", "1", "0"]), Options()).user(every) is None
    with pytest.raises(BadInput, match="some training images have a user and some have none"):
        survey(Listed(["0", "1", "0"], ["7", None, "b"]), Options())
    with pytest.raises(BadInput, match="the test images have users, the training images have none"):
        survey(Listed(["0", "1", "0"], [None, None, "b"], [False, False, True]), Options())


def test_a_share_of_each_class_is_tested_on() -> None:
    """The number of each class is rounded, the choice depends on names alone, and it has nothing to do with the order."""
    labels = ["0"] * 50 + ["1"] * 7 + ["2"] * 2 + ["3"]
    found = survey(Listed(labels), Options(test_share=0.2))
    assert np.bincount(found.y[found.test], minlength=4).tolist() == [10, 1, 1, 0]
    assert (survey(Listed(labels), Options(test_share=0.2)).test == found.test).all()
    keys = draw.integers(0, 1000, 40)
    order = draw.permutation(40)
    y = np.arange(40) % 2
    assert (drawn(y, keys, 0.3)[order] == drawn(y[order], keys[order], 0.3)).all()
    chosen = drawn(np.zeros(10_000, np.int64), np.array([hash((7, i)) for i in range(10_000)]), 0.5)
    assert 2300 < chosen[:5000].sum() < 2700
    assert not survey(Listed(labels), Options(test_share=0.0)).test.any()
    with pytest.raises(BadInput, match=r"--test-share: listed has 1 test images of its own"):
        survey(Listed(["0", "1"], tested=[False, True]), Options(test_share=0.5))


def test_a_share_of_single_images_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--test-share 0.2: each class of listed has one image"):
        survey(Listed(["0", "1", "2"]), Options(test_share=0.2))


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    with FileWriter(out, {"x": 2}) as first:
        first.add("x", PIXELS[:1, None])
        with pytest.raises(BadInput, match=r"out.h5 is being written by another command"):
            FileWriter(out, {"x": 2})
        first.add("x", PIXELS[1:2, None])
    with h5py.File(out) as file:
        assert (file["x"][()] == PIXELS[:2]).all()


def test_a_sheet_writes_letters_of_other_languages() -> None:
    """Each letter has a shape of its own, and none is drawn as the box of an unknown one."""
    shapes = {letter: bytes(_font().getmask(letter)) for letter in "üïßłж\U000f0000"}
    assert len(set(shapes.values())) == len(shapes)


def test_a_class_that_is_only_tested_on_is_noted() -> None:
    found = survey(Listed(["a", "b", "c"], tested=[False, False, True]), Options())
    assert "the test set alone has class c (1 of its 1 images): no client trains on it" in found.notes


# The writer


def test_never_more_than_two_batches_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are alive at any time, while 500 are converted; each batch of both parts has 8 at most."""
    monkeypatch.setattr(batching, "IMAGES", 8)
    source = Listed([str(i % 5) for i in range(500)])
    found = survey(source, Options(test_share=0.2))
    sizes = [len(batch.x) for batch in writing.write(batches(source, found, Options()), found, tmp_path / "out.h5")]
    assert max(sizes) == 8
    assert 8 <= source.most <= 17
    assert sum(sizes) == 500
    made = arrays(tmp_path / "out.h5")
    assert [x[0][0] for x in made["x"]] == [i % 251 for i in np.flatnonzero(~found.test)]
    assert [x[0][0] for x in made["x_test"]] == [i % 251 for i in np.flatnonzero(found.test)]


def test_large_images_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BYTES", 200)  # three images of 64 bytes
    source = Listed(list("0101010"))
    assert [len(batch.x) for batch in batches(source, survey(source, Options()), Options())] == [3, 3, 1]


def test_what_stops_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "IMAGES", 2)
    source = Listed(list("010101"))
    found = survey(source, Options())
    written = writing.write(batches(source, found, Options()), found, tmp_path / "out.h5")
    next(written)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.new"]  # what a kill would leave, under another name
    written.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.h5.new").write_bytes(b"the rest of a command that was killed")
    list(writing.write(batches(source, found, Options()), found, tmp_path / "out.h5"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


@pytest.mark.parametrize("more", [2, -2])
def test_a_source_that_changes_is_refused(tmp_path: Path, more: int) -> None:
    source = Listed(list("010101"), changed=more)
    found = survey(source, Options())
    with pytest.raises(BadInput, match="had 6 images at first and has another number now"):
        list(writing.write(batches(source, found, Options()), found, tmp_path / "out.h5"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = Listed(list("0101"))
    found = survey(source, Options())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoRoom, match=r"no room for .*out\.h5"):
        list(writing.write(batches(source, found, Options()), found, tmp_path / "out.h5"))
    assert not list(tmp_path.iterdir())


def test_the_file_is_as_long_as_its_content(tmp_path: Path) -> None:
    """What was reserved on the disk is given back."""
    with FileWriter(tmp_path / "out.h5", {"x": 1000}) as file:
        file.add("x", np.zeros((1000, 1, 10, 10), np.uint8))
    assert 100_000 <= (tmp_path / "out.h5").stat().st_size < 110_000


def test_the_description(tmp_path: Path) -> None:
    """Counts, moments and users are those that numpy finds."""
    opened = open_source(str(tree(tmp_path / "tree", "{part}/{user}/{label}/{i}.png")), options := Options(levels="user/class"))
    assert opened is not None
    found = survey(opened, options)
    shown = describe(batches(opened, found, options), found, keep=3)
    mean, std = shown.parts["train"].moments()
    assert np.allclose([mean, std], [[(PIXELS[:8] / 255).mean()], [(PIXELS[:8] / 255).std()]])
    assert shown.parts["train"].classes.tolist() == [4, 4]
    assert shown.parts["test"].users == {"u7": 2, "u1": 2}
    assert (shown.shape, shown.class_names) == ((1, 5, 6), ("ant", "cat"))
    assert [len(images) for images in shown.examples.values()] == [3, 3]


# Images


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[Any, Any], Path]:
    """A tree of two images."""

    def make(a: Any, b: Any) -> Path:
        png(tmp_path / "tree" / "a" / "1.png", a)
        png(tmp_path / "tree" / "b" / "2.png", b)
        return tmp_path / "tree"

    return make


def test_sizes(pair: Callable[[Any, Any], Path]) -> None:
    other = np.zeros((8, 4), np.uint8)
    with pytest.raises(BadInput, match=r"a/1.png has 6x5 pixels and b/2.png has 4x8 pixels.*--size N"):
        converted(pair(PIXELS[0], other))
    made = arrays(converted(pair(PIXELS[0], other), size=4))
    expected = [np.asarray(Image.fromarray(image).resize((4, 4), Image.Resampling.BILINEAR)).tolist() for image in (PIXELS[0], other)]
    assert made["x"] == expected


def test_grey_and_colours(pair: Callable[[Any, Any], Path]) -> None:
    with pytest.raises(BadInput, match=r"a/1.png is grey and b/2.png is in colours; --grey or --rgb"):
        converted(pair(PIXELS[0], COLOURS[1]))
    grey = np.asarray(Image.fromarray(COLOURS[1]).convert("L"))
    assert arrays(converted(pair(PIXELS[0], COLOURS[1]), grey=True))["x"] == [PIXELS[0].tolist(), grey.tolist()]
    made = arrays(converted(pair(PIXELS[0], COLOURS[1]), rgb=True))["x"]
    assert made == [[PIXELS[0].tolist()] * 3, COLOURS[1].transpose(2, 0, 1).tolist()]


def test_kinds_of_pixels(pair: Callable[[Any, Any], Path], tmp_path: Path) -> None:
    """Palettes are colours; transparency is left away; black and white is 0 and 255; more than 8 bits are refused."""
    for mode, a, kept in (("RGBA", COLOURS[0], "RGB"), ("P", COLOURS[0], "RGB"), ("LA", PIXELS[0], "L"), ("1", PIXELS[0], "L")):
        image = Image.fromarray(a).convert(mode)
        folder = pair(a, a)
        for path in folder.rglob("*.png"):
            image.save(path)
        expected = np.asarray(image.convert(kept))
        assert arrays(converted(folder))["x"][0] == (expected if kept == "L" else expected.transpose(2, 0, 1)).tolist(), mode
    with pytest.raises(BadInput, match=r"a/1.png has pixels of more than 8 bits"):
        converted(pair(PIXELS[0].astype(np.uint16), PIXELS[0]))


# The names of classes in the file


def named(path: Path, names: Any, y: list[int], **more: Any) -> Any:
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = PIXELS[: len(y)], y
        file["class_names"] = names
    return open_data(DataSettings(name="file", path=str(path), **more), 0)[0]


def test_names_of_classes_are_read(tmp_path: Path) -> None:
    y = [0, 0, 0, 2, 2, 2]
    whole = named(tmp_path / "a.h5", ["ant", "bee", "cat", "dog"], y)
    assert (whole.classes, whole.class_names) == (4, ("ant", "bee", "cat", "dog"))
    closed = named(tmp_path / "a.h5", ["ant", "bee", "cat", "dog"], y, relabel=True)
    assert (closed.classes, closed.class_names) == (2, ("ant", "cat"))


@pytest.mark.parametrize(("names", "said"), [(["ant", "bee"], "has 2 texts"), ([1, 2, 3], "has int64"), ("ant", r"it must be \(0,\)")])
def test_names_of_classes_that_do_not_fit(tmp_path: Path, names: Any, said: str) -> None:
    with pytest.raises(BadInput, match=f"class_names .*{said}|{said}"):
        named(tmp_path / "a.h5", names, [0, 0, 0, 2, 2, 2])
