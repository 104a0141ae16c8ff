"""netCDF-4: one file that netCDF4, h5netcdf and xarray open, with the numbers of the run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import fedsim_analysis
import netCDF4
import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from fedsim_analysis.export import command
from hand_made_run import ACCURACY, ATTRIBUTES, COUNTS, DENSITY, MASKS, NAMES, OF_CLIENTS, hand_made_run

from fedsim.storage.columns import Column
from fedsim.storage.writer import RunWriter


@pytest.fixture
def made(tmp_path: Path) -> Path:
    assert command.write(hand_made_run(tmp_path / "run.h5"), "netcdf")[0] == str(tmp_path / "run.nc")
    return tmp_path / "run.nc"


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_the_groups_have_the_numbers_and_labels(made: Path, engine: Literal["h5netcdf", "netcdf4"]) -> None:
    with xarray.open_datatree(made, engine=engine) as tree:
        np.testing.assert_array_equal(tree["rounds"].accuracy, ACCURACY)
        assert tree["rounds"].bytes_up.sel(round=2) == 2000
        assert tree["timing"]["compute"].values.tolist() == [0, 0.5, 1, 1.5]
        np.testing.assert_array_equal(tree["clients"].accuracy, OF_CLIENTS)
        assert tree["clients"].client_name.values.tolist() == NAMES["client"]
        assert "client_name" in tree["clients"].coords
        assert tree["layers"].density.sel(layer="fc").values.tolist() == [row[1] for row in DENSITY]
        assert tree["partition"].counts.values.tolist() == COUNTS
        assert tree["partition"].counts.dtype == np.int32
        assert tree["partition"].class_name.values.tolist() == NAMES["class"]
        assert tree["devices"].kind.values.tolist() == ["fast", "slow", "fast"]


def test_every_number_of_the_file_is_there(made: Path) -> None:
    """Held against `open`."""
    with xarray.open_datatree(made, engine="netcdf4") as tree:
        ours = fedsim_analysis.open(made.with_suffix(".h5"))
        for group in ("rounds", "timing", "speed", "clients", "layers"):
            assert set(tree[group].data_vars) == set(ours[group].data_vars)
            for name, values in ours[group].data_vars.items():
                np.testing.assert_array_equal(tree[group][name], values.isel(run=0))
                assert tree[group][name].attrs["long_name"] == values.attrs["long_name"]


def test_attributes_are_plain(made: Path) -> None:
    with netCDF4.Dataset(made) as file:
        assert (file.finished, file.rounds, file.seed, file.method, file.hosts) == (1, 3, 3, "fedtiny", "")
        assert file.job == ATTRIBUTES["job"]
        assert (file.Conventions, file.title, file.source) == ("CF-1.11", "run", "run file of fedsim 0.3.0")
        assert "crc32" not in file.ncattrs()
        column = file["rounds/bytes_up"]
        assert (column.units, column.long_name) == ("byte", "sent by all clients of the cohort")
        assert file["rounds/accuracy"].units == "1"
        assert np.isnan(file["rounds/accuracy"].get_fill_value())


def test_masks_are_bytes_with_a_meaning(made: Path) -> None:
    with netCDF4.Dataset(made) as file:
        stored = file["masks/fc.weight"]
        assert stored.dtype == np.int8
        assert stored.flag_values.tolist() == [0, 1]
        assert stored.flag_meanings == "pruned kept"
        assert file["masks/round"][:].tolist() == [0, 2]
        assert stored[:].astype(bool).tolist() == [MASKS[0], MASKS[2]]


def test_a_mask_of_several_shapes_is_a_variable_for_each(tmp_path: Path) -> None:
    """After channels were cut, and where a round has no mask of this weight."""
    masks = [{"mask/fc.weight": torch.ones(2, 3)}, {"mask/fc.weight": torch.zeros(1, 3)}, {"mask/conv1.weight": torch.ones(2)}]
    with RunWriter.create(tmp_path / "run.h5", attributes=ATTRIBUTES, layers=["conv1", "fc"], clients=3) as record:
        for r, mask in enumerate(masks):
            record.row(r, {}, masks={key: value.bool() for key, value in mask.items()})
    command.write(tmp_path / "run.h5", "netcdf")
    with netCDF4.Dataset(tmp_path / "run.nc") as file:
        file.set_auto_mask(False)
        assert file["masks/fc.weight"][:].tolist() == [[[1, 1, 1]] * 2, [[-1] * 3] * 2, [[-1] * 3] * 2]
        assert file["masks/fc.weight_1x3"][:].tolist() == [[[-1] * 3], [[0] * 3], [[-1] * 3]]
        assert file["masks/conv1.weight"][:].tolist() == [[-1, -1], [-1, -1], [1, 1]]


def test_names_that_netcdf_does_not_take(tmp_path: Path) -> None:
    """Of a method's own columns, of layers and of weights."""
    names = {" loss": "loss", "loss": "loss_", "=1": "_=1", "tab\there": "tab_here", "round_": "round_", "Güte": "Güte"}
    columns = {f"rounds/{name}": Column() for name in names} | {"clients/client_name": Column()}
    about: dict[str, Any] = {"attributes": ATTRIBUTES, "layers": ["a/b", "\tc"], "columns": columns, "called": {"client": ["x", "y"]}}
    with RunWriter.create(tmp_path / "run.h5", clients=2, **about) as record:
        values = {name: float(i) for i, name in enumerate(names)}
        masks = {"mask/a/b.weight": torch.tensor([True, False]), "mask/\tc.weight": torch.tensor([True])}
        record.row(0, values, {"client_name": (np.array([1]), np.array([7.0]))}, masks=masks)
    for form in command.FORMS:
        command.write(tmp_path / "run.h5", form)
    with netCDF4.Dataset(tmp_path / "run.nc") as file:
        assert {name: float(file["rounds"].variables[name][0]) for name in names.values()} == dict(
            zip(names.values(), range(6), strict=True)
        )
        assert file["masks"].variables["a_b.weight"][0].tolist() == [1, 0]
        assert file["masks"].variables["_c.weight"].long_name == "mask of \tc.weight"
        assert file["clients"].variables["client_name_"][0, 1] == 7
    for form, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        clients = read(tmp_path / f"run-{form}" / f"clients.{form}")
        assert clients[["client", "client_name"]].to_numpy().tolist() == [[1, 7]]


def test_pieces_are_put_together(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim_analysis.export.netcdf.ROWS", 3)
    command.write(made.with_suffix(".h5"), "netcdf", made.with_name("pieces.nc"))
    with xarray.open_datatree(made) as whole, xarray.open_datatree(made.with_name("pieces.nc")) as pieces:
        for group in whole.children:
            assert pieces[group].to_dataset().equals(whole[group].to_dataset())
