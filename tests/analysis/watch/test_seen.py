"""A run file that grows is read bit by bit, and at every look as it is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fedsim_analysis.watch import seen as module
from fedsim_analysis.watch.seen import PATIENCE, RunFile, Seen
from watched_runs import add, begun, run_file

from fedsim.storage.writer import RunWriter


def looked(path: Path, phases: bool = True) -> Seen:
    file = RunFile(path, phases)
    assert file.look()
    assert file.seen is not None
    return file.seen


def assert_same(one: Seen, other: Seen) -> None:
    assert (one.rounds, one.finished, one.attributes, one.clients) == (other.rounds, other.finished, other.attributes, other.clients)
    for mine, its in ((one.columns, other.columns), (one.timing, other.timing)):
        assert mine.keys() == its.keys()
        for name, column in its.items():
            np.testing.assert_array_equal(mine[name], column, err_msg=name)


def test_what_it_finds(tmp_path: Path) -> None:
    found = looked(run_file(tmp_path / "run.h5", 7))
    assert (found.rounds, found.planned, found.finished, found.clients, found.ranks) == (7, 20, False, 5, 1)
    assert found.last("accuracy") == (0.05, 5)
    assert found.last("train_loss") == (0.25, 7)
    assert found.sent().tolist() == [3e6 * r for r in range(8)]
    assert found.seconds().tolist() == [3.5, 2.5, 2.5, 2.5, 2.5, 3.5, 2.5, 2.5]  # with what recording took
    pace = found.pace()
    assert (pace.plain, pace.evaluation, pace.every) == (2.5, 1, 5)
    assert pace.left(7, 20) == 13 * 2.5 + 3
    assert sorted(found.timing) == ["broadcast", "compute", "evaluate", "record", "reduce", "server"]


def test_recording_beside_the_next_round_takes_no_time_of_its_own(tmp_path: Path) -> None:
    assert looked(run_file(tmp_path / "run.h5", 2, ranks=3)).seconds().tolist() == [3, 2, 2]


def test_phases_of_one_of_many_runs_are_not_read(tmp_path: Path) -> None:
    found = looked(run_file(tmp_path / "run.h5", 2), phases=False)
    assert list(found.timing) == ["record"]
    assert found.seconds().tolist() == [3.5, 2.5, 2.5]


@pytest.mark.parametrize("many", [5000, 0], ids=["whole columns", "row by row"])
def test_while_it_grows_each_look_finds_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    monkeypatch.setattr(module, "MANY", many)
    file = RunFile(tmp_path / "run.h5", True)
    assert not file.look()
    assert not file.exists
    with begun(tmp_path / "run.h5") as record:
        assert file.look()
        assert file.seen.rounds == -1
        assert np.isnan(file.seen.last("accuracy")[0])
        assert file.seen.sent().shape == (0,)
        for r in range(12):
            add(record, r)
            if r in (0, 1, 4, 5, 11):
                assert file.look()
                assert_same(file.seen, looked(tmp_path / "run.h5"))
                assert not file.look()  # nothing has changed
    assert file.seen.rounds == 11


def test_a_run_that_goes_back_to_its_checkpoint_and_another_run_are_read_anew(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 9)
    file = RunFile(path, True)
    file.look()
    with RunWriter.resume(path, 3, {"hosts": "node2", "ranks": 4}):
        pass
    assert file.look()
    assert (file.seen.rounds, file.seen.ranks) == (3, 4)
    assert_same(file.seen, looked(path))
    path.unlink()
    file.look()
    assert not file.exists
    run_file(path, 4, started_at="2027-01-01T00:00:00+00:00", seed=8)
    file.look()
    assert_same(file.seen, looked(path))


def test_a_file_met_half_written_is_tried_again(tmp_path: Path) -> None:
    whole = run_file(tmp_path / "whole.h5", 4).read_bytes()
    path, file = tmp_path / "run.h5", RunFile(tmp_path / "run.h5", True)
    path.write_bytes(whole[: len(whole) // 2])
    assert not file.look()
    assert "cannot be read" in file.trouble or "damaged" in file.trouble
    assert not file.damaged
    path.write_bytes(whole)
    assert file.look()
    assert (file.trouble, file.seen.rounds) == ("", 4)


def test_what_stays_damaged_is_left_after_some_looks(tmp_path: Path) -> None:
    path, file = tmp_path / "run.h5", RunFile(tmp_path / "run.h5", True)
    path.write_bytes(b"no HDF5 at all")
    for _ in range(PATIENCE):
        assert not file.damaged
        file.look()
    assert file.damaged
    assert "no HDF5 file" in file.trouble
    run_file(tmp_path / "new.h5", 1).rename(path)
    assert file.look()
    assert not file.damaged


def test_a_damaged_column_is_left_out_and_named(tmp_path: Path) -> None:
    import h5py

    path = run_file(tmp_path / "run.h5", 6)
    with h5py.File(path, "r+") as disk:
        disk["rounds/density"][2] = 0.125
    file = RunFile(path, True)
    for _ in range(PATIENCE - 1):
        file.look()
        assert file.seen is None
    assert file.look()
    assert file.seen.damaged == ["rounds/density is damaged in round 2: its checksum is another; all other columns can be read"]
    assert "density" not in file.seen.columns
    assert file.seen.last("accuracy") == (0.05, 5)
    assert np.isnan(file.seen.last("density")[0])


def test_a_folder_that_may_not_be_entered_is_said(tmp_path: Path) -> None:
    file = RunFile(tmp_path / ("x" * 300), True)
    file.look()
    assert "cannot be reached: File name too long" in file.trouble
    assert os.sep in file.trouble
