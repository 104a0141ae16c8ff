"""How far a run is: the same by the quick look as by all checks, and a reason where a file cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest
from fedsim_analysis import run_file as checked_file
from fedsim_analysis.how_far import HowFar, how_far
from watched_runs import begun, run_file

from fedsim.storage.reader import RunReader


def test_a_run_that_goes_on_and_one_that_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begun(tmp_path / "new.h5"):
        assert how_far(tmp_path / "new.h5") == HowFar(-1, False)
    run_file(tmp_path / "part.h5", 7)
    run_file(tmp_path / "zwölf.h5", 12, planned=12, finished=True)
    monkeypatch.setattr(checked_file, "read", None)  # the quick look is enough for these
    assert how_far(tmp_path / "part.h5") == HowFar(7, False)
    assert how_far(tmp_path / "zwölf.h5") == HowFar(12, True)
    assert how_far(tmp_path / "none.h5") == HowFar()


def test_a_run_of_a_former_writer_is_read_with_all_checks(tmp_path: Path) -> None:
    run_file(tmp_path / "run.h5", 3, planned=3, finished=True)
    with h5py.File(tmp_path / "run.h5", "a") as file:
        del file.attrs["crc32"]
        file.attrs["finished"] = True  # a bool
        file.attrs["format_version"] = 2
    assert RunReader(tmp_path / "run.h5").attributes["finished"]
    assert how_far(tmp_path / "run.h5") == HowFar(3, True)


@pytest.mark.parametrize(("name", "value"), [("rounds", "many"), ("rounds", [1, 2]), ("rounds", -5), ("finished", 7), ("finished", "no")])
def test_attributes_of_anything_are_a_reason(tmp_path: Path, name: str, value: object) -> None:
    path = run_file(tmp_path / "run.h5", 3)
    with h5py.File(path, "a") as file:
        file.attrs[name] = value
    assert how_far(path).trouble.startswith(f"{path} ")


def test_what_is_no_run_file_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "empty.h5").touch()
    (tmp_path / "folder.h5").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    run_file(tmp_path / "cut.h5", 3)
    os.truncate(tmp_path / "cut.h5", 2000)
    for path in tmp_path.iterdir():
        found = how_far(path)
        assert (found.round, found.finished) == (-1, False)
        assert found.trouble.startswith(f"{path} ")
