"""record: what is written is read back with labels, and no cut of the writing loses a row that the counter vouches for."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.tree import sha256_of
from fedsim.errors import BadInput
from fedsim.storage import disk_room, encoding, layout, writer
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS, Column
from fedsim.storage.reader import RunReader, read_model
from fedsim.storage.writer import RunWriter

ATTRIBUTES = {"job": 'name = "a"\n', "method": "fedavg", "seed": 3, "rounds_planned": 60, "fedsim_version": "0.1"}


def create(path: Path, clients: int = 5, **more: Any) -> RunWriter:
    return RunWriter.create(path, **{"attributes": ATTRIBUTES, "layers": ["conv1", "fc"], "clients": clients, **more})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of 5 clients with rows 0 to 3; clients r and 4 are measured in row r."""
    with create(tmp_path / "run.h5", counts=np.arange(15).reshape(5, 3)) as record:
        for r in range(4):
            record.row(
                r,
                {"accuracy": 0.1 * r, "loss": 1.0 - r},
                {"accuracy": (np.array([4, r]), np.array([0.5, r]))},
                {"density": np.array([1.0, 0.1 * r])},
                {"mask/fc": torch.tensor([[True, r > 1, False]])},
                {"compute": 2.0 * r},
            )
    return tmp_path / "run.h5"


def test_rows_come_back(path: Path) -> None:
    run = RunReader(path)
    assert run.rounds == 3
    assert run.attributes["finished"] is False
    assert run.attributes["weights_sha256"] == ""
    assert run.attributes["job"] == ATTRIBUTES["job"]
    assert run.attributes["seed"] == 3
    np.testing.assert_array_equal(run.column("loss"), [1, 0, -1, -2])
    np.testing.assert_array_equal(run.timing("compute"), [0, 2, 4, 6])
    np.testing.assert_allclose(run.layers("density"), [[1, 0], [1, 0.1], [1, 0.2], [1, 0.3]])
    assert np.isnan(run.column("density")).all()
    assert len(run.column("density")) == 4


def test_clients_are_nan_where_not_measured(path: Path) -> None:
    nan = np.nan
    expected = [[0, nan, nan, nan, 0.5], [nan, 1, nan, nan, 0.5], [nan, nan, 2, nan, 0.5], [nan, nan, nan, 3, 0.5]]
    np.testing.assert_array_equal(RunReader(path).clients("accuracy"), expected)
    np.testing.assert_array_equal(RunReader(path).clients("accuracy", 2), expected[2])
    assert np.isnan(RunReader(path).clients("loss")).all()


def test_masks_are_stored_where_they_changed(path: Path) -> None:
    with h5py.File(path, locking=False) as file:
        assert sorted(file["masks"]) == ["0", "2"]
    assert [RunReader(path).masks(r)["mask/fc"].tolist() for r in (0, 1, 2, 3)] == [[[True, False, False]]] * 2 + [
        [[True, True, False]]
    ] * 2


def test_a_name_not_declared_has_nan_before(path: Path) -> None:
    with RunWriter.resume(path, 3) as record:
        record.row(4, {"weights_swapped": 1.0}, {"votes": (np.array([0]), np.array([7.0]))})
    np.testing.assert_array_equal(RunReader(path).column("weights_swapped"), [np.nan] * 4 + [1])
    np.testing.assert_array_equal(RunReader(path).clients("votes")[4], [7] + [np.nan] * 4)


def test_xarray_finds_labels_in_every_group(path: Path) -> None:
    labels = {"round": [0, 1, 2, 3], "client": [0, 1, 2, 3, 4], "layer": ["conv1", "fc"], "class": [0, 1, 2]}
    axes = {"rounds": ["round"], "clients": ["round", "client"], "layers": ["round", "layer"], "timing": ["round"]}
    for group, expected in (axes | {"partition": ["client", "class"]}).items():
        with xarray.open_dataset(path, group=group, engine="h5netcdf") as data:
            assert set(data.coords) == set(data.dims) == set(expected), group
            assert {name: data[name].values.tolist() for name in data.coords} == {name: labels[name] for name in data.coords}, group
            if group == "clients":
                assert data.accuracy.sel(round=2, client=2) == 2.0
                assert data.accuracy.attrs["units"] == "1"
            if group == "timing":
                assert data["compute"].dtype == float  # seconds stay numbers
    with xarray.open_datatree(path, engine="h5netcdf", phony_dims="sort") as tree:
        assert tree["rounds"].loss.sel(round=1) == 0.0


def test_columns_have_units_and_a_description(path: Path) -> None:
    assert RunReader(path).about("rounds", "bytes_up") == COLUMNS["rounds/bytes_up"]
    assert all(column.about and column.units for column in COLUMNS.values())
    assert set(RunReader(path).names("timing")) == {"broadcast", "compute", "reduce", "server", "evaluate", "record"}


def test_own_columns_may_be_declared(tmp_path: Path) -> None:
    create(tmp_path / "run.h5", columns={"rounds/age": Column("round", "since the last adjustment")}).close()
    assert RunReader(tmp_path / "run.h5").names() == ["age"]
    with pytest.raises(ValueError, match="'round/age' is under none of rounds, clients, layers, timing"):
        create(tmp_path / "other.h5", columns={"round/age": Column()})


def test_counts_are_left_out_of_large_populations(tmp_path: Path, path: Path) -> None:
    counts = RunReader(path).counts()
    assert counts is not None
    assert counts[4, 2] == 14
    create(tmp_path / "large.h5", clients=100_001, counts=np.zeros((100_001, 1), np.int32)).close()
    assert RunReader(tmp_path / "large.h5").counts() is None


def test_kinds_of_devices_stand_beside_the_clients(tmp_path: Path, path: Path) -> None:
    assert RunReader(path).kinds() is None
    create(tmp_path / "some.h5", kinds=np.array([1, 0, 2, 1, 0])).close()
    assert RunReader(tmp_path / "some.h5").kinds().tolist() == [1, 0, 2, 1, 0]
    create(tmp_path / "large.h5", clients=100_001, kinds=np.zeros(100_001, np.int32)).close()
    assert RunReader(tmp_path / "large.h5").kinds() is None


def test_only_touched_chunks_of_a_million_clients_are_written(tmp_path: Path) -> None:
    ids = np.arange(0, 1_000_000, 100_003)
    with create(tmp_path / "run.h5", clients=1_000_000) as record:
        for r in range(3):
            record.row(r, {}, {"loss": (ids, ids + float(r))})
    with h5py.File(tmp_path / "run.h5", locking=False) as file:
        assert file["clients/loss"].id.get_num_chunks() == 3 * len(ids)
        assert file["clients/accuracy"].id.get_num_chunks() == 1  # made with row 0
    row = RunReader(tmp_path / "run.h5").clients("loss", 2)
    assert np.flatnonzero(~np.isnan(row)).tolist() == ids.tolist()
    assert (row[ids] == ids + 2).all()
    assert (tmp_path / "run.h5").stat().st_size < 1_000_000


def test_rows_follow_one_another(path: Path) -> None:
    with RunWriter(path) as record, pytest.raises(ValueError, match="row 5 cannot follow row 3"):
        record.row(5, {})


@pytest.mark.parametrize(("ids", "values"), [([5], [1.0]), ([-1], [1.0]), ([1, 2], [1.0])])
def test_wrong_clients_are_refused_and_the_row_can_be_written_again(path: Path, ids: list[int], values: list[float]) -> None:
    with RunWriter(path) as record:
        with pytest.raises(ValueError, match="clients/loss: ids are"):
            record.row(4, {}, {"loss": (np.array(ids), np.array(values))})
        record.row(4, {"loss": 9.0})
    assert RunReader(path).column("loss")[4] == 9.0


# --- resume


def test_resume_cuts_later_rows(path: Path) -> None:
    with RunWriter.resume(path, 1) as record:
        assert record.rounds == 1
    run = RunReader(path)
    assert run.rounds == 1
    assert run.column("loss").tolist() == [1, 0]
    assert run.clients("accuracy").shape == (2, 5)
    with h5py.File(path, locking=False) as file:
        assert sorted(file["masks"]) == ["0"]
        assert file["rounds/loss"].shape == (2,)
        assert file["round"].shape == (2,)
    with RunWriter.resume(path, 1) as record:
        record.row(2, {"loss": 7.0}, masks={"mask/fc": torch.tensor([[True, False, False]])})
    assert RunReader(path).column("loss").tolist() == [1, 0, 7]
    with h5py.File(path, locking=False) as file:
        assert sorted(file["masks"]) == ["0"]  # no change against row 1


def test_resume_of_a_finished_run_takes_its_end_back(path: Path) -> None:
    with RunWriter(path) as record:
        record.finish({"w/fc": torch.ones(1, 3)}, "ab" * 32)
    assert RunReader(path).attributes["finished"] is True
    assert RunReader(path).attributes["weights_sha256"] == "ab" * 32
    RunWriter.resume(path, -1).close()
    run = RunReader(path)
    assert run.rounds == -1
    assert run.attributes["finished"] is False
    assert run.attributes["weights_sha256"] == ""
    with pytest.raises(BadInput, match="has not finished"):
        run.model()


def test_a_run_file_behind_its_checkpoint_is_refused(path: Path) -> None:
    with pytest.raises(BadInput, match="ends with round 3, before its checkpoint of round 7"):
        RunWriter.resume(path, 7)


# --- the final model


def test_the_model_comes_back_bit_for_bit(path: Path) -> None:
    mask = torch.rand(7, 3, 3) < 0.3
    model = {
        "w/conv1.weight": torch.randn(7, 3, 3) * mask,
        "mask/conv1.weight": mask,
        "w/conv1.bias": torch.tensor([float("nan"), -0.0, 1e-40]),
        "w/off.weight": torch.full((2, 2), -0.0),  # not the bits of 0 where the mask is 0
        "mask/off.weight": torch.zeros(2, 2, dtype=torch.bool),
        "w/half": torch.randn(3).bfloat16(),
        "buf/steps": torch.tensor(7),
        "w/scale": torch.tensor(2.5, dtype=torch.float64),
    }
    model["w/conv1.weight"][~mask] = 0.0
    with RunWriter(path) as record:
        record.finish(model, sha256_of(model))
    back = read_model(path)
    assert back.keys() == model.keys()
    for key, value in model.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert torch.equal(back[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), key
    with h5py.File(path, locking=False) as file:
        assert file["model/w/conv1.weight"].shape == (int(mask.sum()),)
        assert file["model/mask/conv1.weight"].shape == (8,)  # 63 bits


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4), st.integers(0, 99))
def test_masks_pack_and_unpack(shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {f"mask/{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    layout, packed = encoding.pack(masks)
    assert len(packed) == sum((mask.numel() + 7) // 8 for mask in masks.values())
    back = encoding.unpack(layout, packed)
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[key], masks[key]) for key in masks)


# --- gates of clients


def hard(seed: int, clients: tuple[int, ...] = (1, 3), groups: tuple[int, ...] = (9, 4)) -> Gates:
    generator = np.random.default_rng(seed)
    names = {f"conv{i}": size for i, size in enumerate(groups)}
    return Gates(np.array(clients), generator.random((len(clients), sum(groups))) < 0.5, names)


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """Gates at rounds 1 to 5: new ones at 1, 3 (other bits), 4 (a smaller network) and 5 (other clients)."""
    given = [None, hard(0), hard(0), hard(1), hard(1, groups=(5, 3)), hard(1, (0, 1, 4), (5, 3))]
    with create(tmp_path / "gated.h5") as record:
        for r, gates in enumerate(given):
            record.row(r, {"loss": 1.0}, gates=gates)
        record.row(6, {"loss": 1.0})
        record.finish({"w/fc": torch.ones(1)}, "0" * 64, hard(2, (0, 1, 2, 3, 4), (5, 3)))
    return tmp_path / "gated.h5"


def stored(path: Path) -> list[str]:
    with h5py.File(path, locking=False) as file:
        return sorted(file["client_gates"])


def test_gates_are_stored_where_they_changed(gated: Path) -> None:
    run = RunReader(gated)
    assert stored(gated) == ["1", "3", "4", "5", "final"]
    for r, expected in ((1, hard(0)), (2, hard(0)), (3, hard(1)), (4, hard(1, groups=(5, 3))), (6, hard(1, (0, 1, 4), (5, 3)))):
        ids, bits = run.gates(r)
        assert Gates(ids, bits, run.groups(r)).same(expected)
    assert Gates(*run.gates(), run.groups()).same(hard(2, (0, 1, 2, 3, 4), (5, 3)))
    assert [part.size for part in run.gates(0)] == [0, 0]
    assert run.groups(0) == {}
    with h5py.File(gated, locking=False) as file:
        assert file["client_gates/1/gates"].shape == (2, 2)  # 13 bits
        assert file["client_gates/1"].attrs["n"] == 13


def test_a_run_without_gates_has_none(path: Path) -> None:
    with h5py.File(path, locking=False) as file:
        assert "client_gates" not in file
    assert [part.size for part in RunReader(path).gates()] == [0, 0]


def test_resume_cuts_later_gates(gated: Path) -> None:
    with RunWriter.resume(gated, 3) as record:
        record.row(4, {}, gates=hard(1))  # no change against round 3
        record.row(5, {}, gates=hard(7))
    assert stored(gated) == ["1", "3", "5"]
    run = RunReader(gated)
    assert Gates(*run.gates(4), run.groups(4)).same(hard(1))
    assert Gates(*run.gates(), run.groups()).same(hard(7))  # the run has not finished


def test_xarray_opens_a_file_with_gates(gated: Path) -> None:
    with xarray.open_datatree(gated, engine="h5netcdf", phony_dims="sort") as tree:
        assert tree["client_gates/final"].gates.shape == (5, 1)
        assert tree["client_gates/5"].clients.values.tolist() == [0, 1, 4]


# --- bad input


def test_another_run_is_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"already holds another job: fedavg, seed 3, 3 of 60 rounds; .*--resume must; choose another --out"):
        create(path, attributes={**ATTRIBUTES, "job": 'name = "b"\n'})
    with pytest.raises(BadInput, match=r"already holds this job .* --resume must"):
        create(path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["run.h5"]


def test_a_stranger_s_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.h5").write_text("thesis")
    with pytest.raises(BadInput, match="no run file that can be read"):
        create(tmp_path / "run.h5")
    assert (tmp_path / "run.h5").read_text() == "thesis"


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be written: .*; choose another --out"):
        create(tmp_path / "file" / "run.h5")


def test_what_cannot_be_read_says_so(tmp_path: Path, path: Path) -> None:
    with pytest.raises(BadInput, match="there is no run file"):
        RunReader(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(BadInput, match="cannot be read"):
        RunReader(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(BadInput, match="is it a run file of fedsim"):
        RunReader(tmp_path / "other.h5")
    with pytest.raises(BadInput, match=r"has no rounds/acuracy; it has .*accuracy"):
        RunReader(path).column("acuracy")


def test_a_newer_format_says_which_version_wrote_it(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"], file.attrs["fedsim_version"] = 99, "7.1"
    with pytest.raises(BadInput, match=r"written by fedsim 7\.1 in a newer format"):
        RunReader(path)


def test_a_half_written_file_is_tried_again(path: Path) -> None:
    whole, waits = path.read_bytes(), []
    path.write_bytes(whole[:-100])

    def heal(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            path.write_bytes(whole)

    assert RunReader(path, heal).rounds == 3
    assert len(waits) == 3
    path.write_bytes(whole[:-100])
    waits.clear()
    with pytest.raises(BadInput, match="cannot be read"):
        RunReader(path, waits.append)
    assert 1.5 < sum(waits) <= 2


# --- every cut of the writing


def test_splits_of_an_index_are_foreseen(tmp_path: Path) -> None:
    path, generator, foreseen, seen = tmp_path / "index.h5", np.random.default_rng(0), [], []
    with h5py.File(path, "w") as file:
        column = file.create_dataset("x", (0, 1), maxshape=(None, 1), chunks=(1, 1), dtype=float)
        held = nodes = 0
        for step in range(600):
            if step % 50 == 49:  # a resumed run
                held -= int(generator.integers(0, min(held, 90)))
                column.resize(held, axis=0)
                file.flush()
                nodes = path.read_bytes().count(b"TREE\x01")
            foreseen.append(layout.splits(held, 1))
            column.resize(held + 1, axis=0)
            column[held] = step
            held += 1
            file.flush()
            before, nodes = nodes, path.read_bytes().count(b"TREE\x01")
            seen.append(held > 1 and nodes > before)
    assert sum(seen) >= 5
    assert not [step for step in range(600) if seen[step] and not foreseen[step]]
    assert not [step for step in range(49) if foreseen[step]]
    assert sum(foreseen) < 2 * sum(seen) + 5
    assert layout.splits(60, 5)
    assert not layout.splits(60, 4)
    assert layout.splits(65, 114)


ROWS = 75
WHOLE = (24, 32)
LATE = 6  # the row that first measures what was declared but not measured before
IDS = np.array([3, 100, 599])  # of 600 clients: 2 chunks a row, so nodes of an index split at rows 32, 60 …


class Disk:
    """Every change of what stands at one path: (offset, bytes) written in place, or (None, bytes) renamed into place."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.changes = path, [(None, path.read_bytes())]
        self.files: list[Logged] = []
        self.synced, self.asides = [1], {}
        rename, sync = Path.rename, disk_room.sync

        def watched(source: Path, target: Path) -> Path:
            self.changes.append((None, source.read_bytes()))
            if self.asides.get(source) == source.read_bytes():
                self.synced.append(len(self.changes))
            self.files[-1].shown = True
            return rename(source, target)

        def noted(what: Path) -> None:
            if what.is_file():
                self.asides[what] = what.read_bytes()
            self.synced += [len(self.changes)] * (what == path)
            sync(what)

        monkeypatch.setattr(Path, "rename", watched)
        monkeypatch.setattr(disk_room, "sync", noted)
        monkeypatch.setattr(writer, "writable", self.writable)

    changes: list[tuple[int | None, bytes]]
    synced: list[int]  # how many changes the disk had, whenever it had all of them
    asides: dict[Path, bytes]  # what the disk has of each file

    def writable(self, path: Path) -> h5py.File:
        self.files.append(Logged(self, path))
        return h5py.File(self.files[-1], "r+", **layout.ACCESS)


class Logged(io.FileIO):
    """A file that tells the disk what is written to it once it stands at the disk's path."""

    def __init__(self, disk: Disk, path: Path) -> None:
        super().__init__(path, "r+")
        self.disk, self.shown = disk, path == disk.path
        self.end = path.stat().st_size  # of what was written; after it there may be room that is reserved

    def write(self, data: Any) -> int:
        if self.shown:
            self.disk.changes.append((self.tell(), bytes(data)))
        self.end = max(self.end, self.tell() + len(data))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        if self.shown and size is not None:
            assert size >= self.end, "a file that readers see never shrinks"
            self.disk.changes.append((self.end, bytes(size - self.end)))
        self.end = size or 0
        return super().truncate(size)


def value(r: int) -> float:
    return r + 0.5


def write_row(record: RunWriter, r: int) -> None:
    late = r >= LATE and r % 3 == 0
    measured = {"loss": (IDS, IDS + value(r))} | ({"accuracy": (IDS, IDS + value(r))} if late else {})
    values = {"loss": value(r)} | ({"accuracy": value(r)} if late else {}) | ({f"new{r}": value(r)} if r in (20, 21) else {})
    record.row(
        r,
        values,
        measured,
        {"density": np.full(2, value(r))},
        {"mask/a": torch.arange(40) % (1 + r // 5) == 0},
        {"compute": value(r)},
        hard(r // 7) if r >= 7 else None,
    )


def check(path: Path) -> int:
    """Every row that the counter vouches for is whole; the counter."""
    with h5py.File(path, "r", locking=False) as file:
        rounds = int(file.attrs["rounds"])
        expected = np.arange(rounds + 1) + 0.5
        late = np.array([r >= LATE and r % 3 == 0 for r in range(rounds + 1)], bool)
        assert (file["round"][: rounds + 1] == np.arange(rounds + 1)).all()
        assert (file["rounds/loss"][: rounds + 1] == expected).all()
        assert (file["timing/compute"][: rounds + 1] == expected).all()
        assert (file["layers/density"][: rounds + 1] == expected[:, None]).all()
        np.testing.assert_array_equal(file["rounds/accuracy"][: rounds + 1], np.where(late, expected, np.nan))
        for name, here in (("loss", np.ones_like(late)), ("accuracy", late)):
            found = file[f"clients/{name}"][: rounds + 1]
            np.testing.assert_array_equal(found[:, IDS], np.where(here[:, None], IDS + expected[:, None], np.nan))
            assert np.isnan(found[:, [0, 300, 598]]).all()
        assert [r for r in (20, 21) if f"new{r}" in file["rounds"] and r <= rounds] == [r for r in (20, 21) if r <= rounds]
        assert sorted(int(name) for name in file["masks"] if int(name) <= rounds) == list(range(0, rounds + 1, 5))
        gates = [int(name) for name in file.get("client_gates", ()) if name != "final" and int(name) <= rounds]
        assert sorted(gates) == list(range(7, rounds + 1, 7))
        for r in gates:
            assert (file[f"client_gates/{r}/gates"][()] == np.packbits(hard(r // 7).hard, axis=1)).all()
        assert not file.attrs["finished"] or ("model/w/a" in file and "client_gates/final" in file)
    reader = RunReader(path)  # which checks the checksums
    assert (reader.column("loss") == expected).all()
    assert (reader.timing("compute") == expected).all()
    assert (reader.layers("density") == expected[:, None]).all()
    assert [bool(np.isfinite(reader.column(f"new{r}")[r])) for r in (20, 21) if r <= rounds] == [True] * sum(r <= rounds for r in (20, 21))
    return rounds


def replay(changes: list[tuple[int | None, bytes]], path: Path) -> Iterator[None]:
    """Applies the changes to `path`, one by one."""
    for offset, data in changes:
        if offset is None:
            path.write_bytes(data)
        else:
            with path.open("r+b", buffering=0) as file:
                file.seek(offset)
                file.write(data)
        yield


FEW = {
    name: COLUMNS[name]
    for name in ("rounds/loss", "rounds/accuracy", "clients/loss", "clients/accuracy", "layers/density", "timing/compute")
}


def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Disk], None]) -> list[tuple[int | None, bytes]]:
    create(tmp_path / "run.h5", clients=600, columns=FEW).close()
    disk = Disk(tmp_path / "run.h5", monkeypatch)
    act(disk)
    for file in disk.files:
        file.close()
    return disk.changes


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.full)])
def test_every_cut_of_the_writing_leaves_all_counted_rows_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """After every fourth write, and after each one of two whole rows: one is written in place, the other on a copy, as a node splits."""
    whole: list[int] = []  # the changes of these rows

    def act(disk: Disk) -> None:
        with RunWriter(disk.path) as record:
            for r in range(ROWS):
                before = len(disk.changes)
                write_row(record, r)
                whole.extend(range(before, len(disk.changes)) if r in WHOLE else ())
        with RunWriter.resume(disk.path, ROWS - 20) as record:
            for r in range(ROWS - 19, ROWS - 10):
                write_row(record, r)
            record.finish(model := {"w/a": torch.ones(3)}, sha256_of(model), hard(99))

    changes = recorded(tmp_path, monkeypatch, act)
    assert len(changes) > 500
    cut, last = tmp_path / "cut.h5", len(changes) - 1
    seen = [check(cut) for step, _ in enumerate(replay(changes, cut)) if step % every == 0 or step in (*whole, last)]
    assert seen == [*sorted(seen[: seen.index(ROWS - 1)]), *seen[seen.index(ROWS - 1) :]]
    assert set(seen) == set(range(-1, ROWS))
    assert seen[-1] == ROWS - 11
    assert read_model(cut)["w/a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.full)])
def test_a_row_is_counted_when_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """The machine dies after any change: of what was written since the last sync, some is on the disk."""
    disks = list[Disk]()

    def act(disk: Disk) -> None:
        disks.append(disk)
        with RunWriter(disk.path) as record:
            for r in range(12):
                write_row(record, r)

    changes, cut, draw = recorded(tmp_path, monkeypatch, act), tmp_path / "cut.h5", random.Random(0)
    for step in range(0, len(changes), every):
        safe = max(number for number in disks[0].synced if number <= step + 1)
        for _ in replay(changes[: step + 1], cut):
            size = cut.stat().st_size
        for _ in replay([*changes[:safe], *survivors(changes[safe : step + 1], draw)], cut):
            pass
        os.truncate(cut, size)  # it had this room before anything was written
        counted = check(cut)
        for _ in replay(changes[:safe], cut):
            pass
        assert counted >= check(cut)


def survivors(changes: list[tuple[int | None, bytes]], draw: random.Random) -> Iterator[tuple[int | None, bytes]]:
    """Some of the writes; of a whole file that took this place the name alone, and its size."""
    odds = draw.choice((0.1, 0.5, 0.9))
    for offset, data in changes:
        if offset is None:
            yield None, bytes(len(data))
        elif draw.random() < odds:
            yield offset, data


def test_a_first_row_that_is_cut_short_leaves_a_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask; it makes the index of every column."""

    def act(disk: Disk) -> None:
        with RunWriter(disk.path) as record:
            record.row(0, {"loss": 1.0}, {"loss": (IDS, IDS + 0.5)})

    cut = tmp_path / "cut.h5"
    for _ in replay(recorded(tmp_path, monkeypatch, act), cut):
        reader = RunReader(cut)
        for name in reader.names("clients"):
            assert len(reader.clients(name)) == reader.rounds + 1


@pytest.mark.full
def test_a_run_goes_on_from_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(disk: Disk) -> None:
        with RunWriter(disk.path) as record:
            for r in range(36):
                write_row(record, r)

    changes = recorded(tmp_path, monkeypatch, act)
    monkeypatch.undo()
    cut, copy = tmp_path / "cut.h5", tmp_path / "copy.h5"
    for step, _ in enumerate(replay(changes, cut)):
        if step % 7 == 0:
            copy.write_bytes(cut.read_bytes())
            rounds = check(copy)
            with RunWriter.resume(copy, max(rounds - 1, -1)) as record:
                for r in range(record.rounds + 1, record.rounds + 4):
                    write_row(record, r)
            assert check(copy) == max(rounds - 1, -1) + 3


def flip(path: Path, dataset: str) -> None:
    with h5py.File(path, "r+") as file:
        values = file[dataset][()]
        values[0] ^= 1
        file[dataset][...] = values


def test_a_damaged_file_is_not_continued(path: Path) -> None:
    flip(path, "masks/2")
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"run\.h5 cannot be continued: masks/2 is damaged: its checksum is another; choose another --out"):
        RunWriter.resume(path, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("sign", ["\u00a0", "\u200c", "\u3000", "\U0001f468\u200d\U0001f52c"], ids=ascii)
def test_spaces_and_joiners_of_all_languages_come_back(tmp_path: Path, sign: str) -> None:
    names = [f"a{sign}b", " a", "a"]
    job = {"job": f'name = "a{sign}b"\n'}
    with create(tmp_path / "run.h5", clients=3, attributes=job, called={"client": names}):
        run = RunReader(tmp_path / "run.h5")
    assert run.attributes["job"] == job["job"]
    assert run.job == {"name": f"a{sign}b"}
    assert run.called("client") == names
