"""`fedsim_analysis.open`: the numbers of run files under their labels, read when they are used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import fedsim_analysis
import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from fedsim_analysis.dataset.sources import sources
from hand_made_run import hand_made_run

from fedsim.storage.writer import RunWriter

KEPT = {1: [True, False, True, False], 3: [False, False, True, True]}  # of the weight fc, after these rounds


def write(path: Path, rows: int = 4, clients: int = 3, layers: Any = ("conv", "fc"), masks: bool = True, **job: Any) -> Path:
    """A run of which round r has the accuracy r / 10; client k of it r + k / 10, where k and r are both even; layer i the density r + i."""
    fields = {"method.name": '"fedtiny"', "method.density": 0.1, "seed": 0} | job
    text = "\n".join(f"{name} = {value}" for name, value in fields.items())
    attributes = {"job": text, "seed": int(fields["seed"]), "method": "fedtiny", "rounds_planned": 9, "hosts": "node1"}
    counts = np.arange(clients * 2).reshape(clients, 2)
    with RunWriter.create(path, attributes=attributes, layers=list(layers), clients=clients, counts=counts) as record:
        for r in range(rows):
            ids = np.arange(0, clients, 2) if r % 2 == 0 else np.empty(0, np.int64)
            kept = {"mask/fc.weight": torch.tensor(KEPT[max(n for n in KEPT if n <= r)])} if masks and r else None
            record.row(
                r,
                {"accuracy": r / 10, "bytes_up": 100.0 * r},
                {"accuracy": (ids, r + ids / 10)},
                {"density": np.array([r + layers.index(name) for name in layers])},
                kept,
                {"compute": 1.0 + r},
            )
    return path


def test_one_run(tmp_path: Path) -> None:
    tree = fedsim_analysis.open(write(tmp_path / "a.h5"))
    rounds = tree["rounds"]
    assert rounds.accuracy.dims == ("run", "round")
    assert rounds.accuracy.sel(run="a").values.tolist() == [0, 0.1, 0.2, 0.3]
    assert rounds.bytes_up.attrs["units"] == "B"
    assert rounds.bytes_up.attrs["long_name"] == "sent by all clients of the cohort"
    assert np.isnan(rounds.train_loss).all()
    assert tree["timing"]["compute"].values.tolist() == [[1, 2, 3, 4]]
    assert tree["layers"].density.sel(layer="fc", run="a").values.tolist() == [1, 2, 3, 4]
    clients = tree["clients"].accuracy.sel(run="a")
    np.testing.assert_array_equal(clients.sel(round=2), [2, np.nan, 2.2])
    np.testing.assert_array_equal(clients.sel(client=2), [0.2, np.nan, 2.2, np.nan])
    assert tree["partition"].counts.sel(run="a").values.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (str(tree.hosts.item()), tree.method.item(), tree.rounds_done.item(), tree.finished.item()) == ("node1", "fedtiny", 3, False)


def test_the_kind_of_each_clients_device(tmp_path: Path) -> None:
    first, second = hand_made_run(tmp_path / "a.h5"), write(tmp_path / "b.h5", clients=4)
    kind = fedsim_analysis.open([first, second], group="devices").kind
    assert kind.dims == ("run", "client")
    assert kind.values.tolist() == [["fast", "slow", "fast"], ["", "", ""]]
    assert not fedsim_analysis.open(second, group="devices").data_vars


@pytest.mark.parametrize("devices", ["{}", '{"kinds": [{"name": "slow"}]}', "no JSON"])
def test_kinds_of_devices_that_the_file_does_not_describe(tmp_path: Path, devices: str) -> None:
    with pytest.raises(ValueError, match="'devices' does not describe the kinds in /devices/kind"):
        fedsim_analysis.open(hand_made_run(tmp_path / "a.h5", devices=devices))


def test_masks_are_booleans_in_force_after_each_round(tmp_path: Path) -> None:
    kept = fedsim_analysis.open(write(tmp_path / "a.h5"), group="masks")["fc.weight"]
    assert kept.dtype == bool
    assert kept.dims == ("run", "round", "fc.weight_0")
    assert kept.sel(run="a").values.tolist() == [[True] * 4, KEPT[1], KEPT[1], KEPT[3]]
    assert kept.sel(run="a", round=2).values.tolist() == KEPT[1]


def test_runs_of_several_lengths_clients_layers_and_without_masks(tmp_path: Path) -> None:
    first = write(tmp_path / "a.h5", seed=0)
    second = write(tmp_path / "b.h5", rows=2, clients=5, layers=("fc", "conv", "head"), masks=False, seed=1, **{"method.density": 0.5})
    tree = fedsim_analysis.open([first, second])
    assert dict(tree.sizes) | dict(tree["clients"].sizes) | dict(tree["layers"].sizes) == {"run": 2, "round": 4, "client": 5, "layer": 3}
    np.testing.assert_array_equal(tree["rounds"].accuracy, [[0, 0.1, 0.2, 0.3], [0, 0.1, np.nan, np.nan]])
    np.testing.assert_array_equal(tree["clients"].accuracy.sel(round=0), [[0, np.nan, 0.2, np.nan, np.nan], [0, np.nan, 0.2, np.nan, 0.4]])
    np.testing.assert_array_equal(tree["layers"].density.sel(run="b", round=1), [2, 1, 3])  # conv, fc, head
    np.testing.assert_array_equal(tree["layers"].density.sel(run="a", layer="head"), [np.nan] * 4)
    np.testing.assert_array_equal(tree["partition"].counts.sel(run="a", client=4), [np.nan, np.nan])
    assert tree["masks"]["fc.weight"].sel(run="b").values.all()
    assert tree["rounds"]["method.density"].values.tolist() == [0.1, 0.5]
    assert tree["rounds"].seed.values.tolist() == [0, 1]
    assert tree.rounds_done.values.tolist() == [3, 1]


@pytest.mark.parametrize(
    "part",
    [
        {"run": [1, 0], "round": [3, 1], "client": [2, 0]},
        {"run": 0, "round": slice(None, None, -1), "client": slice(1, None)},
        {"round": 2, "client": 1},
        {"run": slice(0, 0)},
        {"round": [], "client": 0},
        {"run": xr.DataArray([0, 1], dims="both"), "client": xr.DataArray([2, 0], dims="both")},
    ],
    ids=str,
)
def test_any_part_is_the_part_of_the_whole(tmp_path: Path, part: dict[str, Any]) -> None:
    paths = [write(tmp_path / "a.h5"), write(tmp_path / "b.h5", rows=3, clients=2, seed=1)]
    lazy, whole = (fedsim_analysis.open(paths, group="clients") for _ in range(2))
    xr.testing.assert_identical(lazy.accuracy.isel(part), whole.accuracy.load().isel(part))
    lazy, whole = (fedsim_analysis.open(paths, group="masks") for _ in range(2))
    del_client = {name: places for name, places in part.items() if name != "client"}
    xr.testing.assert_identical(lazy["fc.weight"].isel(del_client), whole["fc.weight"].load().isel(del_client))


def test_a_damaged_column_is_refused_when_it_is_read_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["rounds/accuracy"][2] = 0.9
    os.utime(path, (0, 0))  # nobody is writing to it
    rounds = fedsim_analysis.open(path, group="rounds")
    assert rounds.bytes_up.values.tolist() == [[0, 100, 200, 300]]
    with pytest.raises(ValueError, match=r"a\.h5 is damaged: rounds/accuracy is damaged in round 2"):
        _ = rounds.accuracy.values


def test_what_was_opened_stays_as_it_was_while_the_run_goes_on(tmp_path: Path) -> None:
    longer, path = write(tmp_path / "longer.h5", rows=6), write(tmp_path / "a.h5")
    before = fedsim_analysis.open(path)
    path.write_bytes(longer.read_bytes())
    assert before["rounds"].accuracy.sel(run="a").values.tolist() == [0, 0.1, 0.2, 0.3]
    assert fedsim_analysis.open(path).sizes["round"] == 6
    path.write_bytes(write(tmp_path / "shorter.h5", rows=2).read_bytes())
    os.utime(path, (0, 0))  # nobody is writing to it
    with pytest.raises(ValueError, match="fewer rounds than the 4 that it had"):
        _ = before["rounds"].bytes_up.values


def test_files_of_one_name_are_labelled_by_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.h5", seed=int(folder == "y"))
    write(tmp_path / "x" / "b.h5", seed=2)
    assert fedsim_analysis.open([tmp_path / "x", tmp_path / "y"]).run.values.tolist() == ["x/a", "b", "y/a"]


def test_the_dataset_can_be_copied_pickled_and_written(tmp_path: Path) -> None:
    clients = fedsim_analysis.open(write(tmp_path / "a.h5"), group="clients")
    again = pickle.loads(pickle.dumps(clients))
    xr.testing.assert_identical(again.load(), clients.copy(deep=True).load())
    clients.to_netcdf(tmp_path / "copy.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "copy.nc", engine="h5netcdf") as copy:
        xr.testing.assert_equal(copy.accuracy.load(), clients.accuracy)


def test_before_the_first_round(tmp_path: Path) -> None:
    tree = fedsim_analysis.open(write(tmp_path / "a.h5", rows=0))
    assert tree.sizes["round"] == 0
    assert tree["rounds"].accuracy.values.shape == (1, 0)
    assert tree.rounds_done.item() == -1


def test_masks_of_several_shapes_are_left_out_by_name(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.h5"), tmp_path / "b.h5"]
    attributes = {"job": 'method.name = "x"', "seed": 0, "method": "x"}
    with RunWriter.create(paths[1], attributes=attributes, layers=["conv", "fc"], clients=1) as record:
        record.row(0, {}, masks={"mask/fc.weight": torch.ones(2, 3, dtype=torch.bool), "mask/conv.weight": torch.tensor([True])})
    masks = fedsim_analysis.open(paths, group="masks")
    assert list(masks) == ["conv.weight"]
    assert masks.attrs["left_out"] == "of several shapes, or of layers that a run has not: fc.weight"


def test_a_layer_may_have_a_slash_in_its_name(tmp_path: Path) -> None:
    attributes = {"job": 'method.name = "x"', "seed": 0, "method": "x"}
    with RunWriter.create(tmp_path / "a.h5", attributes=attributes, layers=["a/b"], clients=1) as record:
        record.row(0, {}, layers={"density": np.array([0.5])}, masks={"mask/a/b.weight": torch.tensor([True, False])})
    tree = fedsim_analysis.open(tmp_path / "a.h5")
    assert tree["masks"]["a|b.weight"].values.tolist() == [[[True, False]]]
    assert tree["layers"].density.sel(layer="a/b").item() == 0.5


def test_wrong_questions_are_answered(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with pytest.raises(
        ValueError, match=r"group='round': a run file has rounds, clients, layers, timing, speed, partition, devices, masks"
    ):
        fedsim_analysis.open(tmp_path, group="round")  # type: ignore[call-overload]
    with pytest.raises(FileNotFoundError, match="there is no run file"):
        fedsim_analysis.open(tmp_path / "b.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no run file \(\*\.h5\) in the folder"):
        fedsim_analysis.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there are no run files to open"):
        fedsim_analysis.open([])


def test_one_client_of_a_run_that_has_fewer_and_no_checksums(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.h5"), write(tmp_path / "b.h5", clients=5, seed=1)]
    with h5py.File(paths[0], "r+") as file:  # as an earlier writer left it
        del file["checksums"], file.attrs["crc32"]
    found = fedsim_analysis.open(paths, group="clients").accuracy.isel(client=4)
    np.testing.assert_array_equal(found, [[np.nan] * 4, [0.4, np.nan, 2.4, np.nan]])


def test_masks_beyond_the_last_complete_round_are_not_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs.modify("rounds", 2)
    assert [list(one.mask_rounds) for one in sources([path])] == [[1]]
