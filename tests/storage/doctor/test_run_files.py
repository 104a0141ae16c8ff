"""The doctor on run files with real damage: what it says, what it mends, and that it makes nothing worse."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hand_made_run import ACCURACY, KINDS, MODEL, hand_made_run
from rich.console import Console

from fedsim.errors import BadInput
from fedsim.storage import checkpoint, run_lock
from fedsim.storage.checkpoint import BEGINNING, folder_of
from fedsim.storage.doctor.command import doctor
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

Damage = Callable[[Path], Any]


def seen_by(path: Path, mend: bool = False) -> tuple[int, str]:
    """The exit code of the doctor, and what it says."""
    said = io.StringIO()
    return doctor(path, mend, Console(file=said, width=200)), said.getvalue()


def mended(path: Path) -> str:
    """What the doctor says who mends all; a second time it finds nothing, and changes nothing."""
    before = content(path.parent)
    assert seen_by(path)[0] == 1
    assert content(path.parent) == before  # to look changes nothing
    code, said = seen_by(path, mend=True)
    assert code == 0, said
    after = content(path.parent)
    code, again = seen_by(path, mend=True)
    assert code == 0
    assert f"{path.name} is sound" in again
    assert content(path.parent) == after
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def begun(path: Path, rows: int = 4, finished: bool = True) -> Path:
    """A run of four rounds with checkpoints of its last two, as a run leaves it."""
    folder = folder_of(path)
    hand_made_run(path, 0, finished=False)
    checkpoint.keep_beginning(folder, path)
    path.unlink()
    hand_made_run(path, rows, finished)
    for r in range(max(rows - 2, 0), rows):
        checkpoint.save(folder, r, {"w": torch.full((3,), float(r))}, {"plan": "{}", "job_sha256": "x"}, {r: {"w/a": torch.ones(2)}})
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begun(tmp_path / "run.h5")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The same run, stopped after round 2."""
    return begun(tmp_path / "run.h5", 3, finished=False)


def edited(path: Path, act: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "r+") as file:
        act(file)


def set_value(where: str, place: Any, value: float) -> Callable[[h5py.File], None]:
    return lambda file: file[where].__setitem__(place, value)


def test_a_sound_run_is_sound_and_is_not_touched(run: Path) -> None:
    before = content(run.parent)
    for mend in (False, True):
        code, said = seen_by(run, mend)
        assert code == 0
        assert said.startswith("run.h5 is sound\nchecked: ")
        for what in ("4 rows of", "each row by its checksum", "masks", "final weights", "2 checkpoints", "round 3", "no lock"):
            assert what in said
    assert content(run.parent) == before


def test_a_flipped_bit_is_turned_back(run: Path) -> None:
    def flip(file: h5py.File) -> None:
        values = file["rounds/accuracy"][()]
        values.view(np.uint8)[8 * 2 + 3] ^= 4
        file["rounds/accuracy"][...] = values

    edited(run, flip)
    assert "nothing in the run file is lost" in seen_by(run)[1]
    assert "rounds/accuracy is damaged in round 2" in mended(run)
    np.testing.assert_array_equal(RunReader(run).column("accuracy"), ACCURACY)
    assert "mended" not in RunReader(run).attributes


def test_a_value_that_is_lost_counts_as_not_measured_and_the_file_says_so(run: Path) -> None:
    edited(run, set_value("rounds/accuracy", 2, 0.123))
    assert "this cannot be brought back: rounds/accuracy in round 2" in seen_by(run)[1]
    mended(run)
    np.testing.assert_array_equal(RunReader(run).column("accuracy"), [*ACCURACY[:2], np.nan, ACCURACY[3]])
    assert RunReader(run).attributes["mended"] == "rounds/accuracy in round 2"
    assert torch.equal(RunReader(run).model()["w/fc.weight"], MODEL["w/fc.weight"])


def test_kinds_of_devices_come_back_and_are_left_out_where_they_are_lost(run: Path) -> None:
    edited(run, set_value("rounds/accuracy", 2, 0.123))
    mended(run)
    assert RunReader(run).kinds().tolist() == KINDS
    edited(run, set_value("devices/kind", 0, 2))
    assert "devices/kind is damaged" in seen_by(run)[1]
    mended(run)
    assert RunReader(run).kinds().tolist() == KINDS  # of the file as it was before its first row


def test_the_file_as_it_was_stays(run: Path) -> None:
    edited(run, set_value("rounds/accuracy", 2, 0.123))
    before, mode = run.read_bytes(), 0o640
    run.chmod(mode)
    assert "as it was it is run.h5.before-mending" in mended(run)
    assert run.with_name("run.h5.before-mending").read_bytes() == before
    assert run.stat().st_mode & 0o777 == mode
    edited(run, set_value("rounds/bytes_up", 1, 7.0))
    assert "run.h5.before-mending-2" in mended(run)


@pytest.mark.parametrize("counter", [4, *(pytest.param(counter, marks=pytest.mark.full) for counter in (10**12, -7, 1))])
def test_a_counter_that_is_not_the_last_sound_row_is_set_to_it(run: Path, counter: int) -> None:
    edited(run, lambda file: file.attrs.modify("rounds", counter))
    mended(run)
    assert RunReader(run).rounds == 3
    np.testing.assert_array_equal(RunReader(run).column("accuracy"), ACCURACY)


def test_a_counter_beyond_a_row_that_was_not_written_whole(stopped: Path) -> None:
    """As after a power failure on a disk that lost the row and kept the counter."""

    def act(file: h5py.File) -> None:
        for group in ("rounds", "layers", "timing", "speed", "clients"):
            for name in file[group]:
                if name not in ("round", "client", "layer"):
                    file[group][name].resize(4, axis=0)
        file["round"].resize((4,))
        file["checksums/rows"].resize(4, axis=0)
        file.attrs.modify("rounds", 3)

    edited(stopped, act)
    mended(stopped)
    assert RunReader(stopped).rounds == 2
    with RunWriter.resume(stopped, 2) as record:
        record.row(3, {"accuracy": 0.75})
    assert RunReader(stopped).column("accuracy")[3] == 0.75


@pytest.mark.parametrize("share", [0.6, *(pytest.param(share, marks=pytest.mark.full) for share in (0.3, 0.9, 0.99))])
def test_a_file_that_was_cut_short(run: Path, share: float) -> None:
    whole = run.read_bytes()
    run.write_bytes(whole[: int(len(whole) * share)])
    said = mended(run)
    assert "HDF5 cannot open it" in said
    found = RunReader(run)
    assert found.rounds == 3
    assert found.attributes["seed"] == 3
    accuracy = found.column("accuracy")
    assert all(value == right or np.isnan(value) for value, right in zip(accuracy, ACCURACY, strict=True))
    assert not found.attributes["finished"]  # its weights are made from the checkpoint
    assert "the final weights: the next `fedsim run` makes them from the checkpoint" in said


def test_a_superblock_is_written_anew(run: Path) -> None:
    whole = run.read_bytes()
    run.write_bytes(whole[:8] + bytes(88) + whole[96:])
    assert "nothing in the run file is lost" in seen_by(run)[1]
    mended(run)
    assert torch.equal(RunReader(run).model()["w/fc.weight"], MODEL["w/fc.weight"])


def test_a_run_that_counts_as_finished_and_has_no_weights(run: Path) -> None:
    edited(run, lambda file: file.__delitem__("model"))
    mended(run)
    assert not RunReader(run).attributes["finished"]
    shutil.rmtree(folder_of(run))
    code, said = seen_by(run, mend=True)
    assert code == 1
    assert "no whole checkpoint is in run.h5.checkpoint: its 3 rounds can be read, but it cannot be continued" in said


def test_damaged_weights_without_a_checkpoint_are_left_as_they_are(run: Path) -> None:
    shutil.rmtree(folder_of(run))
    edited(run, set_value("model/w/conv1.weight", (0, 0), 9.0))
    before = content(run.parent)
    code, said = seen_by(run, mend=True)
    assert code == 1
    assert "it cannot be mended: there is no checkpoint of the last round" in said
    assert content(run.parent) == before


def test_masks_that_are_lost_are_not_those_before(run: Path) -> None:
    edited(run, set_value("masks/2", 0, 255))
    assert "the masks from round 2 on" in mended(run)
    assert [bool(RunReader(run).masks(r)) for r in range(4)] == [True, True, False, False]


def test_attributes_come_from_the_beginning_or_from_their_checksums(run: Path) -> None:
    job = RunReader(run).attributes["job"]
    edited(run, lambda file: file.attrs.__setitem__("job", "gone"))
    mended(run)
    assert RunReader(run).attributes["job"] == job
    (folder_of(run) / BEGINNING).unlink()
    edited(run, lambda file: file.attrs.__setitem__("job", job.replace("tiny", "tinx", 1)))
    edited(run, lambda file: file.attrs.__setitem__("seed", 99))
    mended(run)
    assert (RunReader(run).attributes["job"], RunReader(run).attributes["seed"]) == (job, 3)


def test_a_run_file_that_is_gone_is_made_anew_for_its_checkpoint(stopped: Path) -> None:
    stopped.unlink()
    said = mended(stopped)
    assert "the run file is gone" in said
    assert "all that was measured in rounds 0 to 2" in said
    found = RunReader(stopped)
    assert found.rounds == 2
    assert np.isnan(found.column("accuracy")).all()
    with RunWriter.resume(stopped, 2) as record:
        record.row(3, {"accuracy": 0.75})
    assert RunReader(stopped).column("accuracy")[3] == 0.75


def test_an_older_copy_of_the_run_file_that_no_checkpoint_fits(stopped: Path) -> None:
    stopped.unlink()
    hand_made_run(stopped, 1, finished=False)
    assert "run file ends with round 0, before the newest checkpoint (round 2)" in mended(stopped)
    assert RunReader(stopped).rounds == 2
    np.testing.assert_array_equal(RunReader(stopped).column("accuracy"), [ACCURACY[0], np.nan, np.nan])


def test_an_older_copy_of_the_run_file_that_the_checkpoint_before_fits(stopped: Path) -> None:
    stopped.unlink()
    hand_made_run(stopped, 2, finished=False)
    before = stopped.read_bytes()
    assert "the checkpoint of round 2 was put aside" in mended(stopped)
    assert stopped.read_bytes() == before
    found = checkpoint.latest(folder_of(stopped))
    assert found is not None
    assert found.round == 1


def test_what_is_no_run_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("thesis")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["temperature"] = np.arange(5)
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "loop.h5").symlink_to(tmp_path / "loop.h5")
    hand_made_run(tmp_path / "newer.h5")
    edited(tmp_path / "newer.h5", lambda file: file.attrs.__setitem__("format_version", 99))
    for name in ("text.h5", "other.h5", "pipe.h5", "loop.h5", "absent.h5", "newer.h5", "."):
        with pytest.raises(BadInput):
            seen_by(tmp_path / name, mend=True)


def test_leftovers_are_told_and_removed(run: Path) -> None:
    left = [run.with_name("run.h5.new"), folder_of(run) / "000004.state.safetensors.new"]
    for path in left:
        path.write_bytes(b"half")
    run_lock.lock_of(run).write_text(json.dumps({"host": os.uname().nodename, "process": 2**31 - 2}))
    before = run.read_bytes()
    code, said = seen_by(run)
    assert code == 0  # nothing reads them
    assert said.count("nothing reads it") == 2
    assert "which has ended" in said
    assert seen_by(run, mend=True)[0] == 0
    assert not [path for path in (*left, run_lock.lock_of(run)) if path.exists()]
    assert run.read_bytes() == before


def test_a_run_that_is_being_written_is_not_mended(run: Path) -> None:
    edited(run, set_value("rounds/accuracy", 2, 0.123))
    before = content(run.parent)
    with run_lock.holding(run, "now", lambda seconds: None):
        code, said = seen_by(run, mend=True)
    assert code == 1
    assert "not mended: " in said
    assert "is being written" in said
    assert content(run.parent) == before


def test_texts_of_a_file_do_not_steer_the_terminal(run: Path) -> None:
    edited(run, lambda file: file["rounds"].__setitem__("\x1b[2J[red]", np.zeros(4)))
    code, said = seen_by(run)
    assert code == 1
    assert "\x1b" not in said
    mended(run)


def test_where_nothing_can_be_written_the_doctor_says_so(stopped: Path) -> None:
    """Here by a folder in the way; in a folder of which this user may only read it is the same."""
    stopped.write_bytes(b"\0" * 64 + stopped.read_bytes()[64:])
    (aside := stopped.with_name("run.h5.mended")).mkdir()
    before = content(stopped.parent)
    code, said = seen_by(stopped, mend=True)
    assert (code, f"not mended: {aside} cannot be written: Is a directory" in said) == (1, True), said
    assert content(stopped.parent) == before


def test_the_command_that_mends_can_be_copied_where_a_name_has_spaces(tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    run = begun(tmp_path / "my runs" / "run.h5")
    run_lock.lock_of(run).write_text(json.dumps({"host": os.uname().nodename, "process": 2**31 - 2}))
    assert f"`fedsim doctor --mend '{run}'` mends it" in seen_by(run)[1].replace("\n", "")
