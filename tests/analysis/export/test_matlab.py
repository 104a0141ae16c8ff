"""MAT files: the numbers, names and units of the run file. scipy reads them back here, and Octave in test_other_programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fedsim_analysis
import numpy as np
import pytest
from fedsim_analysis.export import command, matlab, place
from hand_made_run import ACCURACY, ATTRIBUTES, COUNTS, DENSITY, NAMES, OF_CLIENTS, hand_made_run
from scipy.io import loadmat

from fedsim.storage.columns import COLUMNS, Column
from fedsim.storage.writer import RunWriter


def loaded(path: Path) -> dict[str, Any]:
    return loadmat(path, simplify_cells=True)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    lines = command.write(hand_made_run(tmp_path / "run.h5"), "mat")
    assert lines[0] == str(tmp_path / "run.mat")
    return loaded(tmp_path / "run.mat")


def test_the_columns_have_the_numbers_and_names(made: dict[str, Any]) -> None:
    np.testing.assert_array_equal(made["rounds"]["accuracy"], ACCURACY)
    np.testing.assert_array_equal(made["rounds"]["round"], [0, 1, 2, 3])
    np.testing.assert_array_equal(made["clients"]["accuracy"], OF_CLIENTS)
    np.testing.assert_array_equal(made["layers"]["density"], DENSITY)
    assert made["layers"]["layer"].tolist() == ["conv1", "fc"]
    assert made["clients"]["client_name"].tolist() == NAMES["client"]
    assert made["clients"]["device"].tolist() == ["fast", "slow", "fast"]
    assert made["partition"]["counts"].tolist() == COUNTS
    assert made["partition"]["class_name"].tolist() == NAMES["class"]


def test_every_number_of_the_run_is_there(tmp_path: Path, made: dict[str, Any]) -> None:
    """Held against `open`."""
    runs = fedsim_analysis.open(tmp_path / "run.h5")
    for group in ("rounds", "timing", "speed", "clients", "layers"):
        for name, values in runs[group].data_vars.items():
            np.testing.assert_array_equal(made[group][name], values.isel(run=0))
            assert made["units"][group][name] == values.attrs["units"]
            assert made["long_name"][group][name] == values.attrs["long_name"]


def test_attributes_are_numbers_and_text(made: dict[str, Any]) -> None:
    about = made["attributes"]
    assert (about["rounds"], about["finished"], about["seed"], about["method"]) == (3.0, 1.0, 3.0, "fedtiny")
    assert about["job"] == ATTRIBUTES["job"]
    assert np.size(about["hosts"]) == 0  # empty text
    assert "crc32" not in about


def test_one_layer_one_client_and_one_round_stay_tables(tmp_path: Path) -> None:
    """(rounds, 1), not (rounds,): a program that takes a row for a round goes on working."""
    columns = {name: COLUMNS[name] for name in ("clients/loss", "layers/density")}
    with RunWriter.create(tmp_path / "run.h5", attributes={"job": ""}, layers=["a"], clients=1, columns=columns) as record:
        for r in range(3):
            record.row(r, {}, {"loss": (np.array([0]), np.array([1.0 + r]))}, {"density": np.array([0.5])})
    command.write(tmp_path / "run.h5", "mat")
    found = loadmat(tmp_path / "run.mat")
    assert found["clients"]["loss"][0, 0].tolist() == [[1.0], [2.0], [3.0]]
    assert found["layers"]["density"][0, 0].shape == (3, 1)
    command.write(hand_made_run(tmp_path / "first.h5", rows=1, finished=False), "mat")
    assert loadmat(tmp_path / "first.mat")["clients"]["accuracy"][0, 0].shape == (1, 3)


def test_names_that_matlab_does_not_take(tmp_path: Path) -> None:
    names = ["2nd", "2nd ", "a-b", "a_b", "größe", "_own", 70 * "x", 69 * "x" + "y"]
    columns = {f"rounds/{name}": Column("1", name) for name in names}
    with RunWriter.create(tmp_path / "run.h5", attributes={"job": ""}, layers=["a"], clients=1, columns=columns) as record:
        record.row(0, {name: float(i) for i, name in enumerate(names)})
    command.write(tmp_path / "run.h5", "mat")
    found = loaded(tmp_path / "run.mat")["rounds"]
    assert sorted(value for name, value in found.items() if name != "round") == list(range(len(names)))
    assert {name for name in found if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{,62}", name)} == set()
    assert {names[int(found[name])] for name in ("a_b", "gr__e", "x_own")} <= {"a-b", "a_b", "größe", "_own"}


def test_what_is_too_large_for_such_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "MOST", 8 * 4 * 3 * 2)  # the two columns of three clients in four rounds
    with pytest.raises(place.Refused, match=r"run\.mat cannot hold clients: it has 0\.0 GB, .*; --to parquet can"):
        command.write(hand_made_run(tmp_path / "run.h5"), "mat")
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_text_that_is_not_ascii_has_room_for_its_bytes(tmp_path: Path) -> None:
    """Octave reads as many bytes as the text has signs; so there are as many signs as bytes, and the added ones are blanks."""
    with RunWriter.create(tmp_path / "run.h5", attributes={"job": "größe"}, layers=["a"], clients=1, called={"client": ["犬"]}) as record:
        record.row(0, {}, {"loss": (np.array([0]), np.array([1.0]))})
    command.write(tmp_path / "run.h5", "mat")
    found = loaded(tmp_path / "run.mat")
    assert (found["attributes"]["job"], found["clients"]["client_name"]) == ("größe  ", "犬  ")
