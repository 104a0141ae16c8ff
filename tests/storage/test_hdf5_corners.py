"""HDF5's own corners: netCDF-4 opens all of a run file, nothing leaks when it is opened again, and files of the former writer go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import netCDF4
import numpy as np
import pytest
import torch
import xarray
from fedsim_analysis import checksums, load, run_file

from fedsim.core.tree import sha256_of
from fedsim.errors import BadInput
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS
from fedsim.storage.reader import RunReader, read_model
from fedsim.storage.writer import RunWriter

ATTRIBUTES = {"job": 'name = "a"\n', "method": "fedavg", "seed": 3, "hosts": "", "plan": "{}", "rounds_planned": 3}
OF_SCALES = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST"}  # which netCDF-4 shows as dimensions
MODEL = {
    "w/pruned.weight": torch.zeros(2, 3),
    "mask/pruned.weight": torch.zeros(2, 3, dtype=torch.bool),
    "w/kept.weight": torch.tensor([[0.5, 0.0]]),
    "mask/kept.weight": torch.tensor([[True, False]]),
    "w/none": torch.zeros(0, 3),
    "w/half": torch.tensor([1.5, -2.0]).half(),
    "w/brain": torch.tensor([1.5, -2.0]).bfloat16(),
    "w/scale": torch.tensor(2.5, dtype=torch.float64),
    "buf/steps": torch.tensor(7),
    "buf/flag": torch.tensor(True),
}


def create(path: Path, clients: int = 5, **more: Any) -> RunWriter:
    return RunWriter.create(path, **{"attributes": ATTRIBUTES, "layers": ["conv1", "fc"], "clients": clients, **more})


def gates(count: int) -> Gates:
    return Gates(np.arange(count), np.ones((count, 9), bool), {"conv1": 9})


def whole(path: Path) -> Path:
    """All that a run file may hold, and much of it with no entries: masks, gates and weights of nothing."""
    called = {"client": ["a,b", '"c"', "ä", " ", "e"], "class": ["x", "y", "z"]}
    with create(path, counts=np.arange(15).reshape(5, 3), called=called) as record:
        for r in range(3):
            masks = {"mask/fc.weight": torch.tensor([[True, r > 1]]), "mask/none": torch.zeros(0, 3, dtype=torch.bool)}
            measured = {"accuracy": (np.array([1, 4]), np.array([r, 2.0]))}
            layers = {"density": np.array([1.0, 0.5])}
            record.row(r, {"accuracy": r / 2}, measured, layers, masks, {"compute": 2.0 * r}, gates(r), {"record_bytes": 8.0})
        record.finish(MODEL, sha256_of(MODEL), gates(0))
    return path


def corners(folder: Path) -> Iterator[Path]:
    yield whole(folder / "whole.h5")
    for name, more in {"before row 0": {}, "no columns": {"columns": {}}}.items():
        create(folder / f"{name}.h5", **more).close()
        yield folder / f"{name}.h5"
    with create(folder / "no masks.h5") as record:
        record.row(0, {}, masks={}, gates=Gates(np.array([1]), np.zeros((1, 0), bool), {}, np.zeros((1, 0), np.float32)))
    yield folder / "no masks.h5"


def compare(theirs: netCDF4.Dataset, ours: h5py.Group) -> int:
    """All attributes and values of a group and those in it, as netCDF4 and h5py read them; how many arrays these are."""
    seen = 0
    for name in set(ours.attrs) - OF_SCALES:
        assert theirs.getncattr(name) == plain(ours.attrs[name]), name
    for name, stored in ours.items():
        if isinstance(stored, h5py.Group):
            seen += compare(theirs[name], stored)
            continue
        for about in set(stored.attrs) - OF_SCALES:
            assert theirs[name].getncattr(about) == plain(stored.attrs[about]), (stored.name, about)
        text = h5py.check_string_dtype(stored.dtype) is not None
        found, expected = theirs[name][...], stored.asstr()[()] if text else stored[()]
        assert found.shape == stored.shape, stored.name
        np.testing.assert_array_equal(found, expected, err_msg=stored.name)
        seen += 1
    return seen


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def test_netcdf4_sees_all_that_is_in_a_run_file(tmp_path: Path) -> None:
    for path in corners(tmp_path):
        with h5py.File(path, locking=False) as ours, netCDF4.Dataset(path) as theirs:
            theirs.set_auto_mask(False)
            assert compare(theirs, ours) > 5, path
    assert compare_is_strict(tmp_path / "whole.h5")


def compare_is_strict(path: Path) -> bool:
    """Whether a bool that netCDF4 leaves out would have been seen."""
    with h5py.File(path, "r+") as file:
        file.attrs["a bool"] = True
    with h5py.File(path, locking=False) as ours, netCDF4.Dataset(path) as theirs, pytest.raises(AttributeError, match="not found"):
        compare(theirs, ours)
    return True


def test_every_dataset_and_attribute_has_a_plain_type_and_a_shape(tmp_path: Path) -> None:
    """No bool, which is an enumeration, no half precision, which netCDF-4 lacks, and no null space, for which netCDF4 refuses the file."""

    def look(name: str, held: h5py.Group | h5py.Dataset) -> None:
        values = [held.attrs.get_id(about) for about in held.attrs] + ([held.id] if isinstance(held, h5py.Dataset) else [])
        for value in values:
            assert value.get_space().get_simple_extent_type() != h5py.h5s.NULL, name
            assert not isinstance(value.get_type(), h5py.h5t.TypeEnumID), name
            assert value.dtype != np.float16, name

    for path in corners(tmp_path):
        with h5py.File(path, locking=False) as file:
            look("/", file)
            file.visititems(look)


def test_truth_values_are_bools_for_users(tmp_path: Path) -> None:
    path = whole(tmp_path / "run.h5")
    with h5py.File(path, locking=False) as file:
        assert (file.attrs["finished"], file["model/w/kept.weight"].attrs["masked"], file["model/w/half"].attrs["masked"]) == (1, 1, 0)
    assert RunReader(path).attributes["finished"] is True
    assert load(path).attributes["finished"] is True
    RunWriter.resume(path, 1).close()
    assert RunReader(path).attributes["finished"] is False
    assert load(path).attributes["finished"] is False


@pytest.mark.parametrize("value", [2, -1])
def test_finished_is_0_or_1(tmp_path: Path, value: int) -> None:
    create(tmp_path / "run.h5").close()
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file.attrs["finished"] = value
    with pytest.raises(BadInput, match=f"the attribute 'finished' is {value}, neither 0 nor 1"):
        RunReader(tmp_path / "run.h5")


def as_formerly_written(path: Path) -> None:
    """With bools, and half precision as such."""
    with h5py.File(path, "r+") as file:
        file.attrs["finished"], file.attrs["format_version"] = bool(file.attrs["finished"]), 2
        for stored in (file["model"][key] for key in MODEL if "model" in file):
            stored.attrs["masked"] = bool(stored.attrs["masked"])
        about = dict(file["model/w/half"].attrs)
        del file["model/w/half"]
        file.create_dataset("model/w/half", data=MODEL["w/half"].numpy()).attrs.update(about)
        checksums.put_attributes(file)


def test_files_of_the_former_writer_open_and_go_on(tmp_path: Path) -> None:
    path = whole(tmp_path / "run.h5")
    as_formerly_written(path)
    with h5py.File(path, locking=False) as file:
        assert file.attrs["finished"].dtype == bool
    assert load(path).attributes["finished"] is True
    found = read_model(path)
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in MODEL.items())
    with RunWriter.resume(path, 1) as record:
        record.row(2, {"accuracy": 0.25})
        record.finish(MODEL, sha256_of(MODEL))
    assert load(path).attributes["finished"] is True
    assert load(path).rounds["accuracy"].tolist() == [0, 0.5, 0.25]
    with h5py.File(path, locking=False) as file:
        assert file.attrs["finished"] == 1
        assert file.attrs["finished"].dtype == np.int64
        assert file.attrs["format_version"] == run_file.FORMAT


# --- growth

FEW = {name: COLUMNS[name] for name in ("rounds/accuracy", "clients/loss", "clients/accuracy")}


def repacked(path: Path) -> int:
    """Bytes of the same content, written at once by h5py into a new file."""
    other = path.with_suffix(".again")
    with h5py.File(path, locking=False) as file, h5py.File(other, "w") as again:
        again.attrs.update(file.attrs)
        for name in file:
            file.copy(name, again, expand_refs=True)
    return other.stat().st_size


def write(record: RunWriter, r: int, generator: np.random.Generator, gated: bool = False) -> None:
    ids = np.arange(20)
    masks = {"mask/fc.weight": torch.from_numpy(generator.random(800) < 0.5)}
    moved = Gates(ids, generator.random((20, 128)) < 0.5, {f"layer{i}.conv": 16 for i in range(8)}) if gated else None
    record.row(r, {"accuracy": 0.5}, {name: (ids, generator.random(20)) for name in ("loss", "accuracy")}, masks=masks, gates=moved)


@pytest.mark.parametrize("gated", [False, True])
def test_masks_and_gates_that_change_in_each_round_cost_what_they_hold(tmp_path: Path, gated: bool) -> None:
    path, generator = tmp_path / "run.h5", np.random.default_rng(0)
    with create(path, clients=20, columns=FEW) as record:
        for r in range(60):
            write(record, r, generator, gated)
    assert path.stat().st_size < 1.05 * repacked(path)


def test_fifty_resumes_cost_nothing(tmp_path: Path) -> None:
    path, generator = tmp_path / "run.h5", np.random.default_rng(0)
    create(path, clients=20, columns=FEW).close()
    for r in range(50):
        with RunWriter.resume(path, r - 1, {"hosts": f"node{r * '1'}", "plan": '{"fleet": "packed"}', "seed": 3}) as record:
            write(record, r, generator)
    found = RunReader(path).attributes
    assert (found["hosts"], found["plan"]) == (f"node{49 * '1'}", '{"fleet": "packed"}')
    assert path.stat().st_size < 1.05 * repacked(path)


def test_a_file_that_is_closed_after_each_row_does_not_grow_more(tmp_path: Path) -> None:
    sizes = []
    for closed in (False, True):
        path, generator = tmp_path / f"{closed}.h5", np.random.default_rng(0)
        record = create(path, clients=20, columns=FEW)
        for r in range(30):
            write(record, r, generator)
            if closed:
                record.close()
                record = RunWriter(path)
        record.close()
        sizes.append(path.stat().st_size)
    assert sizes[1] < 1.01 * sizes[0]


# --- the same file twice in one process


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_a_run_goes_on_while_a_notebook_has_its_file_open(tmp_path: Path, engine: Literal["h5netcdf", "netcdf4"]) -> None:
    path = whole(tmp_path / "run.h5")
    with xarray.open_dataset(path, group="rounds", engine=engine) as held:
        with RunWriter.resume(path, 1) as record:
            record.row(2, {"accuracy": 0.25})
        assert held.accuracy.values.tolist() == [0, 0.5, 1]  # of the file that it opened
    assert load(path).rounds["accuracy"].tolist() == [0, 0.5, 0.25]
