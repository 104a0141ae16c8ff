"""A full disk: NoRoom before anything has changed, with real small disks and limits; and no change outgrows what is reserved for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_disk import limited, small_disk

from fedsim.errors import NoRoom
from fedsim.storage import checkpoint, disk_room
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

FEW = {name: COLUMNS[name] for name in ("rounds/loss", "rounds/accuracy", "clients/loss", "layers/density", "timing/compute")}
CLIENTS, LAYERS, SMALL = 600, 3, 900_000
IDS = np.arange(0, CLIENTS, 7)
MODEL = {f"w/{name}": torch.randn(300, generator=torch.Generator().manual_seed(0)) for name in range(40)}


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(SMALL) as folder:
        yield folder


def create(path: Path) -> RunWriter:
    return RunWriter.create(path, attributes={"job": "", "seed": 0}, layers=["a"] * LAYERS, clients=CLIENTS, columns=FEW)


def gates(r: int) -> Gates:
    return Gates(np.arange(8), np.arange(8 * 96).reshape(8, 96) % (r + 2) == 0, {"a": 64, "b": 32})


def write(record: RunWriter, r: int, moving: bool) -> None:
    values = {"loss": r + 0.5} | ({"later": 1.0} if moving and r == 5 else {})
    masks = {"mask/a": torch.arange(9000) % (2 + moving * r) == 0}
    density = {"density": np.full(LAYERS, r)}
    record.row(r, values, {"loss": (IDS, IDS + 0.5 * r)}, density, masks, {"compute": 1.0}, gates(r * moving))


def assert_whole(path: Path, last: int) -> None:
    reader = RunReader(path)
    assert reader.rounds == last
    np.testing.assert_array_equal(reader.column("loss"), np.arange(last + 1) + 0.5)
    np.testing.assert_array_equal(reader.clients("loss")[last][IDS], IDS + 0.5 * last)


def until_full(record: RunWriter, first: int, moving: bool) -> int:
    """Writes rows until there is no room; the last that was written."""
    for r in range(first, 3000):
        try:
            write(record, r, moving)
        except NoRoom:
            return r - 1
    raise AssertionError("it never was full")


@pytest.mark.parametrize("moving", [False, True])
def test_a_full_disk_leaves_the_rows_whole_and_the_run_goes_on(disk: Path, moving: bool) -> None:
    """The last row before it is cut and written again, as a resumed run does, into the room that was made."""
    path, filler = disk / "run.h5", disk / "other"
    filler.write_bytes(bytes(SMALL // 3))
    record = create(path)
    last = until_full(record, 0, moving)
    assert last > 3
    with pytest.raises(NoRoom, match=r"run\.h5: it needs [\d,]+ bytes, and [\d,]+ are free; make room, and the same command goes on"):
        write(record, last + 1, moving)
    assert_whole(path, last)
    record.close()
    assert sorted(each.name for each in disk.iterdir()) == ["other", "run.h5"]
    filler.unlink()
    with RunWriter.resume(path, last - 1) as again:
        for r in range(last, last + 3):
            write(again, r, moving)
        assert until_full(again, last + 3, moving) > last + 3
        with pytest.raises(NoRoom):
            again.finish({"w/a": torch.zeros(SMALL)}, "")
    assert RunReader(path).rounds > last + 3


def test_a_run_file_that_does_not_fit_is_not_begun(disk: Path) -> None:
    (disk / "other").write_bytes(bytes(SMALL - 20_000))
    with pytest.raises(NoRoom):
        create(disk / "run.h5")
    assert [each.name for each in disk.iterdir()] == ["other"]


@pytest.mark.parametrize("moving", [False, True])
def test_the_limit_on_the_size_of_files(tmp_path: Path, moving: bool) -> None:
    path = tmp_path / "run.h5"
    with limited(500_000):
        record = create(path)
        last = until_full(record, 0, moving)
        with pytest.raises(NoRoom, match=r"a file may have 500,000 at most \(ulimit -f\); raise the limit, and the same command goes on"):
            record.finish(MODEL | {"w/large": torch.zeros(300_000)}, "")
        record.close()
        assert_whole(path, last)
        with limited(100_000), pytest.raises(NoRoom):  # less than the file has
            RunWriter.resume(path, last)
    with RunWriter.resume(path, last) as again:
        write(again, last + 1, moving)
        again.finish(MODEL, "")
    assert_whole(path, last + 1)


@pytest.mark.parametrize("moving", [False, True])
def test_nothing_grows_by_more_than_was_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moving: bool) -> None:
    """Of rows, columns that come late, masks, gates and the model. What is left over at the end is given back."""
    asked: list[tuple[int, int, Path]] = []
    reserve = disk_room.reserve

    def noted(file: Any, path: Path, needed: int, called: Path) -> None:
        assert not asked or file.id.get_filesize() <= max(end + needed for end, needed, _ in asked)
        asked[:] = [(file.id.get_filesize(), needed, path)]
        reserve(file, path, needed, called)

    monkeypatch.setattr(disk_room, "reserve", noted)
    path = tmp_path / "run.h5"
    with create(path) as record:
        for r in range(30 if moving else 1030):
            write(record, r, moving)
        record.finish(MODEL, "", gates(9))
    end, needed, _ = asked[0]
    assert path.stat().st_size <= end + needed
    assert path.stat().st_size == _end_of(path)


def _end_of(path: Path) -> int:
    """Where the file ends by its own account (HDF5 File Format Specification, superblock of version 0)."""
    return int.from_bytes(path.read_bytes()[40:48], "little")


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(disk: Path) -> None:
    folder = disk / "run.h5.checkpoint"
    checkpoint.save(folder, 1, {"w": torch.ones(1000)}, {})
    before = {each.name for each in folder.iterdir()}
    with pytest.raises(NoRoom, match=r"no room for .*000002\.state\.safetensors"):
        checkpoint.save(folder, 2, {"w": torch.ones(SMALL)}, {})
    assert {each.name for each in folder.iterdir()} == before
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.round == 1


def test_a_disk_that_cannot_take_the_folder_either_has_no_room() -> None:
    with small_disk("1m,nr_inodes=1") as folder, pytest.raises(NoRoom, match=r"no room for .*/a/b/run\.h5: the disk cannot take another"):
        create(folder / "a" / "b" / "run.h5")
