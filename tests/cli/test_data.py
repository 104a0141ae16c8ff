"""`fedsim data` as a user meets it: what it shows, what it writes, and every mistake answered by one message and exit code 2."""

from __future__ import annotations

import csv
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from captured_console import Fedsim
from PIL import Image

ROOT = Path(__file__).parents[2]
draw = np.random.default_rng(11)
PIXELS = draw.integers(0, 256, (24, 6, 6), dtype=np.uint8)

JOB = """
[data]
name = "digits"

[partition]
name = "dirichlet_class"
clients = {clients}
min_images = 1

[method]
name = "fedavg"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """tree/train/{ant,cat}/*.png and tree/test/{ant,cat}/*.png in the working folder."""
    for i in range(12):
        png(Path("tree", "train" if i < 8 else "test", ("ant", "cat")[i % 2], f"{i}.png"), PIXELS[i], tmp_path)
    return tmp_path / "tree"


def png(path: Path, pixels: Any, root: Path) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / path)


def table(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def cells(text: str, first: str) -> list[str]:
    """The words of the line that begins with a word."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


# Show


def test_a_data_set_by_its_name(fedsim: Fedsim, tmp_path: Path) -> None:
    from fedsim.data.sources import digits

    train, test = digits(8)
    ended = fedsim("data", "digits", "--sheet", "sheet.png")
    assert ended.code == 0, ended.err
    assert "1,437 training images, 360 test images, 10 classes" in ended.out
    assert cells(ended.out, "mean")[1] == f"{(train.x / 255).mean():.4f}"
    assert cells(ended.out, "deviation")[1] == f"{(train.x / 255).std():.4f},"
    for label in range(10):
        assert cells(ended.out, str(label)) == [str(label), str(int((train.y == label).sum())), str(int((test.y == label).sum()))]
    assert "clients" not in ended.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        first = np.asarray(sheet)[4 : 4 + 56, -60 * 10 : -4 - 60 * 9]  # 8 pixels, each enlarged to 7
        zero = train.x[train.y == 0][0, 0].numpy()
        assert (first[:, :, 0] == np.kron(zero, np.ones((7, 7)))).all()


def test_settings_of_a_data_set(fedsim: Fedsim) -> None:
    ended = fedsim("data", "shapes", "--set", "data.train_images=60", "--set", "data.test_images=20", "--set", "data.classes=3")
    assert "60 training images, 20 test images, 3 classes" in ended.out


def test_many_classes_are_put_together(fedsim: Fedsim) -> None:
    ended = fedsim(
        "data", "fake", *(f"--set=data.{field}" for field in ("train_images=400", "test_images=9", "image_size=2", "classes=90"))
    )
    assert "70 more" in ended.out
    assert len(ended.out.splitlines()) < 40


@pytest.mark.parametrize("clients", [5, 90])
def test_a_job_shows_its_partition(fedsim: Fedsim, tmp_path: Path, clients: int) -> None:
    from fedsim.data.partition import PartitionSettings
    from fedsim.data.population import populate
    from fedsim.data.settings import DataSettings

    (tmp_path / "job.toml").write_text(JOB.format(clients=7))
    ended = fedsim("data", "job.toml", "--set", f"partition.clients={clients}", "--set", "seed=3", "--partition", "figure.png")
    assert ended.code == 0, ended.err
    made = populate(DataSettings(), PartitionSettings("dirichlet_class", clients, min_images=1), 3)
    counts = made.counts()
    assert counts is not None
    shown = ended.out[ended.out.index("dirichlet_class") :].splitlines()
    if clients == 5:
        rows = [line.split() for line in shown if line[:1].isdigit() and "images" not in line]
        assert rows == [[str(k), *map(str, row), str(row.sum())] for k, row in enumerate(counts)]
    else:
        first = next(line.split() for line in shown if line.startswith(f"{counts.sum(1).min()} to"))
        low, high = int(first[0]), int(first[2])
        assert int(first[3]) == ((low <= counts.sum(1)) & (counts.sum(1) <= high)).sum()
        assert [int(line.split()[1]) for line in shown[-1 - len(set((counts > 0).sum(1))) :] if line[:1].isdigit()]
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 500


def test_a_name_with_partition_settings_is_dealt_too(fedsim: Fedsim) -> None:
    assert "iid  4 clients, seed 0" in fedsim("data", "digits", "--set", "partition.name=iid", "--set", "partition.clients=4").out


def test_a_folder_is_checked_and_nothing_is_written(fedsim: Fedsim, tree: Path) -> None:
    ended = fedsim("data", "tree")
    assert "8 training images, 4 test images, 2 classes" in ended.out
    assert cells(ended.out, "1") == ["1", "cat", "4", "2"]
    assert [path.name for path in tree.parent.iterdir()] == ["tree"]


# Convert


def test_a_converted_folder_is_a_data_set(fedsim: Fedsim, tmp_path: Path) -> None:
    for i in range(12):
        png(Path("tree", f"u{i % 3}", ("ant", "cat")[i % 2], f"{i}.png"), PIXELS[i], tmp_path)
    ended = fedsim("data", "tree", "--levels", "user/class", "--test-share", "0.25", "--out", "mine.h5")
    assert ended.code == 0, ended.err
    assert '[data]\nname = "file"\npath = "mine.h5"\n\n[partition]\nname = "natural"' in ended.out
    assert "training users  3 with" in ended.out
    again = fedsim("data", "mine.h5", "--set", "partition.name=natural", "--set", "partition.min_images=1")
    assert again.code == 0, again.err
    for said in ("8 training images, 4 test images, 2 classes", "natural  3 clients", "u2", "ant"):
        assert said in again.out


def test_a_data_set_by_its_name_is_converted(fedsim: Fedsim, tmp_path: Path) -> None:
    """Fashion-MNIST from genuine IDX files; the job then reads the same images."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = draw.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 10
    for prefix, some in (("train", slice(20)), ("t10k", slice(20, 30))):
        head = struct.pack(">HBB3I", 0, 8, 3, *images[some].shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images[some].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels[some])) + labels[some].tobytes())
    ended = fedsim("data", "fashion_mnist", "--out", "mine.h5")
    assert ended.code == 0, ended.err
    assert "normalised by  0.2860 and 0.3530" in ended.out
    with h5py.File(tmp_path / "mine.h5") as file:
        assert (file["x"][()] == images[:20]).all()
        assert (file["y_test"][()] == labels[20:]).all()
    assert "20 training images, 10 test images" in fedsim("data", "data/FashionMNIST/raw").out


def test_a_file_is_replaced_by_force_alone(fedsim: Fedsim, refuses: Callable[..., str], tree: Path) -> None:
    (tree.parent / "mine.h5").write_bytes(b"mine")
    assert "--out mine.h5 is there already; --force replaces it" in refuses("data", "tree", "--out", "mine.h5")
    assert fedsim("data", "tree", "--out", "mine.h5", "--force").code == 0
    assert h5py.is_hdf5(tree.parent / "mine.h5")
    assert "is the source itself" in refuses("data", "mine.h5", "--out", "mine.h5", "--force")


def test_force_spares_what_is_no_hdf5_file(refuses: Callable[..., str], tree: Path) -> None:
    """It may be one of the images themselves."""
    image = tree / "train" / "ant" / "0.png"
    before = image.read_bytes()
    said = "train/ant/0.png is there already and is no HDF5 file; choose another name, such as tree/train/ant/0.h5"
    assert said in refuses("data", "tree", "--out", "tree/train/ant/0.png", "--force")
    assert "may be one of the images of tree" in refuses("data", "tree", "--sheet", "tree/train/ant/0.png")
    assert image.read_bytes() == before


def test_test_images_alone_are_no_file_for_jobs(refuses: Callable[..., str], tmp_path: Path) -> None:
    table(tmp_path / "all.csv", [["label", "part", "p"], [0, "test", 1], [1, "test", 2]])
    assert "all.csv has test images alone" in refuses("data", "all.csv", "--out", "mine.h5")
    assert not (tmp_path / "mine.h5").exists()


def test_pipes_are_not_waited_for(refuses: Callable[..., str], tree: Path) -> None:
    os.mkfifo(tree.parent / "pipe")
    assert "pipe is neither a file nor a folder" in refuses("data", "pipe")
    assert "pipe is neither a file nor a folder" in refuses("data", "tree/train", "--test", "pipe")
    os.mkfifo(tree / "train" / "ant" / "9.png")
    assert "tree: train/ant/9.png is no file" in refuses("data", "tree")


@pytest.mark.processes
def test_a_killed_conversion_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    """The process stops itself by SIGKILL when it has written the first images."""
    table(tmp_path / "all.csv", [[i % 2, *PIXELS[i % 24].ravel()] for i in range(50)])
    code = "import os, signal, sys\nfrom fedsim.data.conversion import batches as batching\nfrom fedsim.cli import commands\n"
    code += "from fedsim.data.own_file import writing\nbatching.IMAGES = 4\nadd = writing.FileWriter.add\n"
    code += "def once(self, name, images):\n    add(self, name, images)\n    self.file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "writing.FileWriter.add = once\nsys.argv[1:] = ['data', 'all.csv', '--test-share', '0', '--out', 'mine.h5']\ncommands.main()\n"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "mine.h5.new"]


# Mistakes


def test_an_unknown_name_is_answered_with_the_known_ones(refuses: Callable[..., str]) -> None:
    message = refuses("data", "digit")
    assert "there is no such file, folder or data set (did you mean 'digits'?). Data sets: digits, shapes, " in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits", "--sheet", "sheet.jpg"], "should end in .png"),
        (["digits", "--sheet", "no/sheet.png"], "there is no folder no"),
        (["digits", "--partition", "p.txt"], "should end in .png, .pdf, .svg"),
        (["digits", "--out", "no/mine.h5", "--force"], "there is no folder no"),
        (["digits", "--out", "tree", "--force"], "--out tree is a folder"),
        (["digits", "--force"], "give --out MINE.h5"),
        (["digits", "--grey", "--rgb"], "--grey and --rgb exclude each other"),
        (["digits", "--test-share", "1"], "should be at least 0 and below 1"),
        (["digits", "--test-share", "0.1"], "has 360 test images of its own"),
        (["digits", "--test-share", "0.1", "--test", "tree"], "give one of them"),
        (["digits", "--levels", "class"], "--levels is for folders of images, CSV and IDX files; leave it out for digits"),
        (["digits", "--set", "data.colour=3"], "[data] has no field 'colour'"),
        (["digits", "--set", "data.colour"], "write section.field=value"),
        (["file"], 'name = "file" needs path'),
        (["cifar10"], "cifar10 is not complete"),
        (["no.toml"], "no such job file"),
        (["no.h5"], "there is no such file, folder or data set"),
        (["tree", "--set", "seed=1"], "tree is not in a form that jobs read"),
        (["tree", "--partition", "p.png"], "--partition shows the clients of a job"),
        (["tree", "--shape", "1,2"], "should be C,H,W"),
        (["tree", "--shape", "1,2,3"], "--shape is for a CSV of pixels, which tree is not"),
        (["tree", "--test", "no"], "there is no file or folder no"),
        (["tree", "--test", "tree"], "has test images of its own (test/"),
        (["tree", "--levels", "class/user"], "tree: train/ant/0.png lies in no folder of a user"),
        (["tree/train", "--levels", "user/class"], "lies in no folder of a class"),
        (["tree/train", "--out", "mine.h5"], "tree/train has no test images; --test-share 0.2"),
        (["tree/train/ant"], "lies in no folder of a class"),
        (["tree/train/ant/0.png"], "it looks like one image; `fedsim data FOLDER --out mine.h5` converts a folder of images"),
        (["tree", "--levels", "user"], "Invalid value"),
    ],
)
def test_words_that_cannot_be_meant(refuses: Callable[..., str], tree: Path, words: list[str], said: str) -> None:
    assert said in refuses("data", *words)


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty class": (lambda tree: (tree / "train" / "dog").mkdir(), "tree: train/dog is an empty folder"),
    "no images": (lambda tree: [path.unlink() for path in (tree / "test").rglob("*.png")], "tree: test/ant is an empty folder"),
    "no classes": (lambda tree: (tree / "test").rename(tree.parent / "x") and (tree / "test").mkdir(), "tree: test is empty"),
    "other files alone": (lambda tree: (tree / "train" / "x").mkdir() or (tree / "train/x/a.txt").write_text(""), "train/x has no image"),
    "no train": (lambda tree: (tree / "train").rename(tree / "val"), "tree has test but no train"),
    "one class": (lambda tree: [(tree / part / "cat").rename(tree.parent / part) for part in ("train", "test")], "at least 2 classes"),
    "a broken image": (lambda tree: (tree / "train/ant/x.png").write_bytes(b"no"), "train/ant/x.png cannot be read as an image"),
    "half an image": (
        lambda tree: (tree / "train/ant/0.png").write_bytes((tree / "train/ant/0.png").read_bytes()[:60]),
        "train/ant/0.png cannot be read as an image",
    ),
    "folders below": (lambda tree: (tree / "train/ant/more").mkdir(), "train/ant/more is a folder where images should be"),
    "a link out": (lambda tree: link(tree / "train/ant/x.png", Path("/etc/hostname")), "train/ant/x.png leads out of the folder"),
    "a folder out": (lambda tree: link(tree / "train/dog", Path("../..")), "train/dog leads out of the folder"),
    "a part out": (
        lambda tree: (tree / "test").rename(tree.parent / "moved") and link(tree / "test", Path("../moved")),
        "tree: test leads out of the folder",
    ),
    "a circle": (lambda tree: link(tree / "train/ant/x.png", Path("x.png")), "train/ant/x.png"),
    "another size": (lambda tree: png(Path("train/ant/x.png"), PIXELS[0][:5], tree), "train/ant/x.png has 6x5 pixels; all must have"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_are_refused(refuses: Callable[..., str], tree: Path, kind: str) -> None:
    spoil, said = FOLDERS[kind]
    spoil(tree)
    assert said in refuses("data", "tree", "--out", "mine.h5")


def test_a_link_inside_is_followed(fedsim: Fedsim, tree: Path) -> None:
    link(tree / "train/ant/x.png", Path("0.png"))
    assert "9 training images" in fedsim("data", "tree").out


PATHS = [["path", "label"], ["tree/train/ant/0.png", 0], ["tree/train/cat/1.png", 1]]
PLAIN = [["label", "a", "b", "c", "d"], [0, 1, 2, 3, 4], [1, 1, 2, 3, 4]]
TABLES: dict[str, tuple[list[list[Any]], str]] = {
    "nothing": ([], "all.csv is empty"),
    "names alone": ([["label", "p"]], "all.csv has no images"),
    "no labels": ([["path", "user"], ["a", "b"]], "has no column label or class or target. Its columns are path, user"),
    "a column twice": ([["label", "path", "Label"], [1, "a", 1]], "has two columns 'label'"),
    "two names": ([["label", "path", "class"], [1, "a", 1]], "has the columns 'label' and 'class', which both mean the label"),
    "a fraction": ([*PATHS, ["tree/train/ant/2.png", "1.5"]], "the label '1.5' (image 2) is no whole number"),
    "no label": ([*PATHS, ["tree/train/ant/2.png", " "]], "all.csv, line 4: the label is empty"),
    "gaps": ([*PATHS, ["tree/train/ant/2.png", 5]], "no image has 2, 3, 4"),
    "a short line": ([*PATHS, ["tree/train/ant/2.png"]], "all.csv, line 4 has 1 columns, the first line has 2"),
    "an absent image": ([*PATHS, ["tree/no.png", 1]], "all.csv, line 4: tree/no.png is not there"),
    "a path out": ([*PATHS, ["../../../etc/hostname", 1]], "all.csv, line 4: ../../../etc/hostname leads out of the folder"),
    "a path from the root": ([*PATHS, ["/etc/hostname", 1]], "/etc/hostname leads out of the folder"),
    "another part": ([["path", "label", "part"], ["a", 0, "dev"]], "the part is 'dev'; it should be train or test"),
    "no square": ([["label", "a", "b"], [0, 1, 2]], "has 2 columns of pixels, which are no square; give --shape C,H,W"),
    "a large pixel": ([*PLAIN, [0, 1, 2, 3, 256]], "all.csv, line 4: column 5 is '256'; pixels are whole numbers in 0 … 255"),
    "a long word for a pixel": ([*PLAIN, [0, 1, "9" * 500, 3, 25]], "column 3 is '" + 39 * "9" + "…'; pixels"),
    "a long label": ([*PLAIN, ["9" * 5000 + ".5", 1, 2, 3, 4]], "the label '" + 39 * "9" + "…' (image 2)"),
    "a word for a pixel": ([*PLAIN, [0, 1, "x", 3, 25]], "all.csv, line 4: column 3 is 'x'"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_are_refused(refuses: Callable[..., str], tree: Path, kind: str) -> None:
    rows, said = TABLES[kind]
    table(tree.parent / "all.csv", rows)
    assert said in refuses("data", "all.csv", "--out", "mine.h5", "--test-share", "0")


def test_a_table_that_is_no_text(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"label,\xff\xfe\n")
    assert "a.csv cannot be read as CSV in UTF-8" in refuses("data", "a.csv")
    (tmp_path / "b.csv.gz").write_bytes(b"label,a\n")
    assert "b.csv.gz cannot be read" in refuses("data", "b.csv.gz")


def test_relabel_closes_gaps(fedsim: Fedsim, tree: Path) -> None:
    table(tree.parent / "all.csv", [*PATHS, ["tree/train/ant/2.png", 5]])
    ended = fedsim("data", "all.csv", "--out", "mine.h5", "--test-share", "0", "--relabel")
    assert "labels are numbered in sorted order: 0 -> 0, 1 -> 1, 5 -> 2" in ended.out
    with h5py.File(tree.parent / "mine.h5") as file:
        assert file["y"][()].tolist() == [0, 1, 2]
        assert file["class_names"].asstr()[()].tolist() == ["0", "1", "5"]


IDX = struct.pack(">HBB3I", 0, 8, 3, 4, 2, 2) + bytes(range(16))
LABELS = struct.pack(">HBBI", 0, 8, 1, 4) + bytes([0, 1, 0, 1])
FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "half of the images": ({"images": IDX[:-3], "labels": LABELS}, "ends within image 3 of 4"),
    "half of the labels": ({"images": IDX, "labels": LABELS[:-1]}, "ends within label 0 of 4"),
    "too many images": ({"images": IDX + b"x", "labels": LABELS}, "goes on after what its beginning says"),
    "another number": ({"images": IDX, "labels": LABELS[:7] + b"\5" + LABELS[8:]}, "has 4 images and raw/labels has 5 labels"),
    "no labels": ({"images": IDX}, "has no file of labels beside it; it should be called labels"),
    "labels for images": ({"images": LABELS, "labels": LABELS}, "raw/images has 1 axes of >u1; it should hold images (n, H, W)"),
    "floats": ({"images": IDX, "labels": b"\0\0\x0d\1" + LABELS[4:]}, "raw/labels is no IDX file of whole numbers"),
    "huge images": ({"images": IDX[:8] + b"\xff" * 8, "labels": LABELS}, "the file is broken"),
    "half a beginning": ({"images": IDX[:9], "labels": LABELS}, "ends within its beginning"),
    "a broken gzip": ({"images-idx3.gz": b"\x1f\x8b" + IDX, "labels-idx1": LABELS}, "raw/images-idx3.gz cannot be read"),
    "two sets": (
        {"images": IDX, "labels": LABELS, "b-images": IDX, "b-labels": LABELS},
        "has 2 files of training images: b-images, images",
    ),
    "tests alone": ({"t10k-images": IDX, "t10k-labels": LABELS}, "raw has test images alone"),
}


@pytest.mark.parametrize("kind", FILES)
def test_idx_files_that_are_refused(refuses: Callable[..., str], tmp_path: Path, kind: str) -> None:
    contents, said = FILES[kind]
    (tmp_path / "raw").mkdir()
    for name, content in contents.items():
        (tmp_path / "raw" / name).write_bytes(content)
    assert said in refuses("data", "raw", "--out", "mine.h5", "--test-share", "0")


def test_an_idx_file_that_is_a_link_out(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(LABELS)
    link(tmp_path / "raw" / "labels", Path("../labels"))
    (tmp_path / "raw" / "images").write_bytes(IDX)
    assert "raw/labels leads out of the folder" in refuses("data", "raw")


def test_archives_are_not_opened(refuses: Callable[..., str], tree: Path) -> None:
    import shutil

    for kind in ("zip", "gztar"):
        name = Path(shutil.make_archive(str(tree), kind, tree)).name
        assert f"{name} is an archive; unpack it, and give the folder" in refuses("data", name)


def test_a_sweep_of_partitions_is_not_one_partition(refuses: Callable[..., str], fedsim: Fedsim, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.format(clients=4) + '[sweep]\n"partition.alpha" = [0.1, 1.0]\n"train.lr" = [0.1, 0.2]\n')
    assert "[sweep] varies partition.alpha; fix it, for example --set partition.alpha=0.1" in refuses("data", "job.toml")
    assert fedsim("data", "job.toml", "--set", "partition.alpha=0.1").code == 0
