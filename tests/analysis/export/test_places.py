"""Where exports are written: whole or not at all, over a former export alone, and with one message where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest
from fedsim_analysis.export import command, place
from hand_made_run import hand_made_run
from small_disk import limited

from fedsim.storage.writer import RunWriter

FILES = ("netcdf", "mat")  # forms that are one file
FORMS = pytest.mark.parametrize("form", command.FORMS)


def content(place: Path) -> dict[str, bytes]:
    files = place.iterdir() if place.is_dir() else [place]
    return {path.name: path.read_bytes() for path in files}


@FORMS
def test_a_former_export_is_replaced(tmp_path: Path, form: str) -> None:
    few, all_rows = hand_made_run(tmp_path / "few.h5", rows=2, finished=False), hand_made_run(tmp_path / "run.h5")
    out = tmp_path / "new" / "out"
    assert command.write(few, form, out)[-1] == "The run has not finished: these are its rounds 0 to 1 of 3."
    before = content(out)
    assert command.write(all_rows, form, out)[-1] != "The run has not finished: these are its rounds 0 to 1 of 3."
    assert content(out) != before
    command.write(few, form, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    if form != "netcdf":  # whose library writes the time into no place that we know, and does not promise the same bytes
        assert content(out) == before


@FORMS
def test_what_is_no_export_is_left_alone(tmp_path: Path, form: str) -> None:
    run = hand_made_run(tmp_path / "run.h5")
    out = tmp_path / "thesis"
    if form in FILES:
        with h5py.File(out, "w") as file:
            file["x"] = 1
    else:
        out.mkdir()
        (out / "rounds.csv").write_text("mine")
    before = content(out)
    with pytest.raises(place.Refused, match=r"thesis holds something else than an export of fedsim; choose another --out"):
        command.write(run, form, out)
    assert content(out) == before
    with pytest.raises(place.Refused, match=r"run\.h5 (is a file|holds something else)"):
        command.write(run, form, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.h5", "thesis"]


@FORMS
def test_a_file_where_a_folder_belongs_and_the_other_way_round(tmp_path: Path, form: str) -> None:
    run = hand_made_run(tmp_path / "run.h5")
    wrong = tmp_path / "wrong"
    if form in FILES:
        wrong.mkdir()
    else:
        wrong.write_text("")
    with pytest.raises(place.Refused, match=r"wrong is a (file|folder), and this export is a (folder|file); choose another --out"):
        command.write(run, form, wrong)
    with pytest.raises(place.Refused, match=r"cannot be written: .*; (mend that, or )?choose another --out"):
        command.write(run, form, run / "below")


@FORMS
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, form: str) -> None:
    run, out = hand_made_run(tmp_path / "run.h5"), tmp_path / "out"
    command.write(run, form, out)
    before = content(out)
    with limited(300), pytest.raises(place.Refused, match=r"out cannot be written: .*; mend that, or choose another --out"):
        command.write(run, form, out)
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.h5"]


@FORMS
def test_a_run_without_rows_or_columns(tmp_path: Path, form: str) -> None:
    for name, more in {"empty": {}, "bare": {"columns": {}}}.items():
        RunWriter.create(tmp_path / f"{name}.h5", attributes={"job": ""}, layers=["a"], clients=2, **more).close()
        assert command.write(tmp_path / f"{name}.h5", form)[-1] == "The run has not finished: it has no rounds yet."


@FORMS
def test_a_run_that_cannot_be_read(tmp_path: Path, form: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run file"):
        command.write(tmp_path / "none.h5", form)
    (tmp_path / "text.h5").write_text("no HDF5, and long enough")
    path = hand_made_run(tmp_path / "run.h5")
    with h5py.File(path, "r+") as file:
        file["rounds/accuracy"][2] = 7
    for settled in (path, tmp_path / "text.h5"):
        os.utime(settled, (0, 0))  # so that nobody waits for its writer
    with pytest.raises(ValueError, match="is it a run file of fedsim"):
        command.write(tmp_path / "text.h5", form)
    with pytest.raises(ValueError, match=r"run\.h5 is damaged: rounds/accuracy is damaged in round 2"):
        command.write(path, form)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["run.h5", "text.h5"]


def test_another_form_is_answered_with_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--to xlsx: fedsim export writes csv, parquet, netcdf, mat"):
        command.write(tmp_path / "run.h5", "xlsx")
