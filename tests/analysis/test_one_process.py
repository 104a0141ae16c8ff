"""Run files that something else has open in the same process: HDF5 would refuse a second open, or show it the sizes of the first."""

from __future__ import annotations

import threading
from pathlib import Path

import fedsim_analysis
import h5py
import numpy as np
import xarray
from fedsim_analysis import run_file

import fedsim
from fedsim.data.own_file import arrays
from fedsim.storage.writer import RunWriter


def grow(path: Path, rows: int) -> None:
    """A run of two clients, or more rows of it."""
    if path.exists():
        writer = RunWriter(path)
    else:
        writer = RunWriter.create(path, attributes={"job": "", "seed": 0, "method": "fedavg"}, layers=["fc"], clients=2)
    with writer as record:
        for r in range(record.rounds + 1, rows):
            record.row(r, {"accuracy": r / 10})


def test_a_file_that_xarray_has_open_can_be_read_and_the_other_way_round(tmp_path: Path) -> None:
    grow(path := tmp_path / "run.h5", 2)
    with xarray.open_dataset(path, group="rounds", engine="h5netcdf") as held:
        assert len(fedsim_analysis.load(path).rounds) == 2
        assert fedsim.open_run(path).rounds == 1
        with xarray.open_dataset(path, group="clients", engine="h5netcdf") as clients:
            assert clients.sizes["round"] == 2
        assert held.accuracy.values.tolist() == [0, 0.1]


def test_rows_that_came_since_another_open_are_seen(tmp_path: Path) -> None:
    grow(longer := tmp_path / "longer.h5", 5)
    grow(path := tmp_path / "run.h5", 2)
    with h5py.File(path, "r") as held:
        assert held["rounds/accuracy"].shape == (2,)
        with path.open("r+b") as file:
            file.write(longer.read_bytes())  # as another process would have grown it
        assert fedsim_analysis.load(path).rounds.accuracy.tolist() == [0, 0.1, 0.2, 0.3, 0.4]
        assert fedsim_analysis.open(path).sizes["round"] == 5


def test_a_users_own_file_that_is_open_elsewhere_can_be_read(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "mine.h5", "w") as file:
        file["x"], file["y"] = np.zeros((4, 3, 3), np.uint8), np.arange(4)
    with h5py.File(path, "r"), arrays.opened(str(path)) as source:
        assert source.has("x")


def test_a_run_goes_on_while_xarray_holds_its_file(tmp_path: Path) -> None:
    grow(path := tmp_path / "run.h5", 2)
    with xarray.open_dataset(path, group="rounds", engine="h5netcdf") as held:
        with RunWriter(path) as record:
            record.row(2, {"accuracy": 0.2})
            record.row(3, {"accuracy": 0.3, "another": 1.0})  # a new column, for which the file is written anew
            assert fedsim_analysis.load(path).rounds.another.iloc[3] == 1
            with xarray.open_dataset(path, group="layers", engine="h5netcdf") as again:
                record.row(4, {"accuracy": 0.4})
                assert again.sizes["round"] == 4
        with xarray.open_dataset(path, group="layers", engine="h5netcdf"), RunWriter.resume(path, 1) as resumed:
            resumed.row(2, {"accuracy": 0.5})
        assert held.accuracy.values.tolist() == [0, 0.1]
    assert fedsim_analysis.load(path).rounds.accuracy.tolist() == [0, 0.1, 0.5]


def test_a_run_that_another_thread_reads_goes_on_after_it(tmp_path: Path) -> None:
    """A callback reads the file while the thread that writes opens it anew."""
    grow(path := tmp_path / "run.h5", 2)
    entered, begun, errors = threading.Event(), threading.Event(), []

    def write() -> None:
        try:
            with RunWriter(path) as record:
                record.row(2, {"accuracy": 0.2, "another": 1.0})
        except OSError as error:
            errors.append(error)

    def look(file: h5py.File) -> int:
        entered.set()
        begun.wait()
        writer.join(0.5)  # it would fail in this time
        return len(file["rounds/accuracy"])

    writer = threading.Thread(target=write)
    reader = threading.Thread(target=lambda: run_file.read(path, look))
    reader.start()
    entered.wait()
    writer.start()
    begun.set()
    reader.join()
    writer.join()
    assert not errors
    assert fedsim_analysis.load(path).rounds.another.iloc[2] == 1
