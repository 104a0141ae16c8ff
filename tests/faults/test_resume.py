"""Going on, or refusing to: checkpoints that are damaged, newer, missing or of another future, and run files that are not ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import h5py
import pytest
from processes import Console, Ended, Lab, assert_same, hash_of, of_users, rows, snapshot, users

from fedsim.config.job import load
from fedsim.errors import BadInput
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.resume import find_start
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.reader import RunReader


@pytest.fixture
def refuses(console: Console, lab: Lab) -> Callable[..., str]:
    """Exit code 2, one message, and the folder as it was."""

    def call(*arguments: str) -> str:
        before = snapshot(lab.folder)
        ended = console(*arguments)
        assert ended.code == 2, ended.err
        assert ended.err.count("\n") == 1
        assert snapshot(lab.folder) == before
        return ended.err

    return call


@pytest.fixture
def half(lab: Lab, killed: Path) -> Path:
    """A run that was killed within its rounds 4 to 8, and its checkpoints."""
    shutil.copy(killed, lab.folder)
    shutil.copytree(folder_of(killed), lab.folder / "run.h5.checkpoint")
    return lab.folder / "run.h5"


def newest(run: Path) -> Path:
    """The newest manifest."""
    return max(folder_of(run).glob("*.json"))


def goes_on(ended: Ended, after: int) -> None:
    assert ended.code == 0, ended.err
    assert f"going on after round {after}\n" in ended.out


# Checkpoints


def test_a_damaged_manifest_gives_way_to_the_one_before(console: Console, half: Path, reference: Path) -> None:
    manifest = newest(half)
    manifest.write_bytes(manifest.read_bytes()[:-40])
    goes_on(console(), int(manifest.stem) - 1)
    assert_same(half, reference)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["state", "kept"])
def test_damaged_tensors_give_way_to_the_ones_before(console: Console, half: Path, reference: Path, what: str) -> None:
    manifest = newest(half)
    flip(manifest.with_name(f"{manifest.stem}.{what}.safetensors"))
    goes_on(console(), int(manifest.stem) - 1)
    assert_same(half, reference)


def test_kept_states_of_earlier_rounds_are_taken_from_their_copy(lab: Lab, half: Path, reference: Path) -> None:
    copies, r = list(folder_of(half).glob("*.kept.copy.safetensors")), int(newest(half).stem)
    assert copies
    for copy in copies:
        flip(copy.with_name(copy.name.replace(".copy", "")))
    goes_on(lab.run(), r)
    assert_same(half, reference)


def test_a_start_is_found_whichever_file_is_damaged(lab: Lab, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    monkeypatch.syspath_prepend(lab.folder)
    parts, r = build_experiment(load(lab.folder / "tiny.toml")), int(newest(half).stem)
    its_own = {f"{r:06d}.json", f"{r:06d}.state.safetensors", f"{r:06d}.kept.safetensors"}
    for path in sorted(path for path in folder_of(half).iterdir() if path.suffix != ".new"):  # which the kill left half written
        whole = path.read_bytes()
        flip(path)
        start = find_start(parts, half, "must")
        assert start.round == (r - 1 if path.name in its_own else r), path
        assert start.checkpoint is not None
        assert len(start.checkpoint.passed) == r - start.round
        path.write_bytes(whole)


@pytest.mark.parametrize("plan", ['{"fleet": "serial", "later": 1}', "[", "{}"], ids=["of a later version", "broken", "without fields"])
def test_a_checkpoint_of_another_plan_gives_way_or_is_read(console: Console, half: Path, reference: Path, plan: str) -> None:
    manifest = json.loads(newest(half).read_text())["manifest"]
    manifest["extra"]["plan"] = plan
    seal = sha256(json.dumps(manifest).encode()).hexdigest()
    newest(half).write_text(json.dumps({"sha256": seal, "manifest": manifest}))
    ended = console()
    goes_on(ended, int(manifest["round"]) - (plan != "{}"))
    assert ("note: a newer checkpoint cannot be used" in ended.out) == (plan != "{}")
    assert_same(half, reference)


def test_checkpoints_that_are_all_damaged_are_reported(refuses: Callable[..., str], half: Path) -> None:
    for manifest in folder_of(half).glob("*.json"):
        manifest.write_text("{}")
    message = refuses()
    assert "no checkpoint in run.h5.checkpoint is whole" in message
    assert "--out" in message


def test_a_checkpoint_of_a_newer_format_is_refused(refuses: Callable[..., str], half: Path) -> None:
    manifest = json.loads(newest(half).read_text())["manifest"] | {"format_version": 99, "fedsim_version": "9.9"}
    seal = sha256(json.dumps(manifest).encode()).hexdigest()
    newest(half).write_text(json.dumps({"sha256": seal, "manifest": manifest}))
    message = refuses()
    assert "was written by fedsim 9.9 in format 99" in message
    assert "upgrade fedsim" in message


def test_checkpoints_without_their_run_file_are_of_no_run(
    console: Console, refuses: Callable[..., str], half: Path, reference: Path
) -> None:
    half.unlink()
    assert "there is no run file run.h5" in refuses("--resume", "must")
    ended = console()
    assert ended.code == 0, ended.err
    assert "going on" not in ended.out
    assert_same(half, reference)


def test_rounds_without_their_checkpoints_are_not_thrown_away(refuses: Callable[..., str], half: Path) -> None:
    shutil.rmtree(folder_of(half))
    message = refuses()
    assert f"run.h5 holds {rows(half)} rounds, but the checkpoints to go on from are gone from run.h5.checkpoint" in message
    assert "--out" in message


def test_checkpoints_beyond_the_run_file_are_reported(refuses: Callable[..., str], half: Path) -> None:
    with h5py.File(half, "r+", locking=False) as file:
        file.attrs.modify("rounds", 1)
    assert "run.h5 ends with round 1, before its checkpoint of round" in refuses()


@pytest.mark.parametrize("suffix", [".new", ".lock"])
def test_a_folder_in_the_place_of_a_file_beside_the_run_is_refused(refuses: Callable[..., str], half: Path, suffix: str) -> None:
    half.with_name(half.name + suffix).mkdir()
    assert f"run.h5{suffix} is a folder, and " in refuses()


def test_a_finished_run_needs_no_checkpoints(console: Console, lab: Lab, reference: Path) -> None:
    shutil.copy(reference, lab.folder)
    ended = console("--resume", "must")
    assert ended.code == 0, ended.err
    assert "run.h5 is finished already" in ended.out
    assert_same(lab.folder / "run.h5", reference)


# Run files


def test_a_run_of_another_job_is_not_touched(refuses: Callable[..., str], half: Path) -> None:
    for resume in ("auto", "must", "never"):
        message = refuses("--set", "seed=1", "--resume", resume)
        assert f"run.h5 already holds another job (own:Lasting, seed 0, {rows(half)} of 8 rounds; there " in message
        assert "Choose another --out" in message


def test_resume_never_refuses_a_run_and_says_how_to_go_on(refuses: Callable[..., str], half: Path) -> None:
    assert "run.h5 already holds this job; leave out --resume never to go on with it" in refuses("--resume", "never")


def test_a_run_file_that_is_cut_is_reported(refuses: Callable[..., str], half: Path) -> None:
    half.write_bytes(half.read_bytes()[:1000])
    assert "run.h5 cannot be read" in refuses()


def test_a_run_file_that_is_a_folder_is_reported(refuses: Callable[..., str], lab: Lab) -> None:
    (lab.folder / "run.h5").mkdir()
    assert "run.h5" in refuses()


def test_what_a_kill_left_aside_is_swept_away(console: Console, half: Path, reference: Path) -> None:
    asides = [half.with_name("run.h5.new"), folder_of(half) / "000007.state.safetensors.new"]
    for aside in asides:
        aside.write_bytes(b"half a file")
    assert console().code == 0
    assert not any(aside.exists() for aside in asides)
    assert_same(half, reference)


def test_data_that_changed_under_a_run_are_refused(console: Console, refuses: Callable[..., str], lab: Lab) -> None:
    path = users(lab.folder / "users.h5", (7, 20, 13))
    settings = [*of_users(path, cohort=2), "--set", "rounds=2"]
    assert console(*settings, "--set", "execution.time_limit=1e-9").code == 3
    users(path, (8, 19, 13))
    assert "run.h5 was made on another partition of the data than this job gives here" in refuses(*settings)
    users(path, (7, 20, 13))
    assert console(*settings).code == 0
    assert hash_of(lab.folder / "run.h5")


# Bad input on ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "data.path=nowhere.h5"], "nowhere.h5"),
        pytest.param(["--out", "tiny.toml/run.h5"], "tiny.toml/run.h5 cannot be written", marks=pytest.mark.full),
    ],
    ids=["every rank finds it", "rank 0 finds it"],
)
def test_one_rank_speaks_and_nothing_is_left_behind(lab: Lab, arguments: list[str], said: str) -> None:
    before = snapshot(lab.folder)
    ended = lab.run(*arguments, ranks=3)
    assert ended.code == 2
    assert ended.err.count(said) == 1
    assert "Traceback" not in ended.err
    assert snapshot(lab.folder) == before


@pytest.mark.full
def test_a_damaged_column_is_reported_and_the_run_goes_on(console: Console, half: Path, reference: Path) -> None:
    """Of the columns that the progress shows too; the damage stays known."""
    with h5py.File(half, "r+") as file:
        file["rounds/bytes_up"][1] = 7.0
    manifest = newest(half)
    ended = console()
    goes_on(ended, int(manifest.stem))
    assert "note: rounds/bytes_up is damaged in round 1: its checksum is another" in ended.out
    assert "left out: rounds/bytes_up is damaged in round 1" in ended.out
    with pytest.raises(BadInput, match=r"rounds/bytes_up is damaged in round 1"):
        RunReader(half).column("bytes_up")
    assert hash_of(half) == hash_of(reference)


def test_more_rounds_are_another_run_and_the_message_says_the_way(lab: Lab, console: Console, reference: Path) -> None:
    assert console().code == 0
    said = "(own:Lasting, seed 0, 8 of 8 rounds; there rounds = 8, here 9). Choose another --out, and --extend run.h5 takes its rounds over"
    assert said in console("--set", "rounds=9").err
    assert "--extend" not in console("--set", "rounds=9", "--set", "seed=1").err
    assert_same(lab.folder / "run.h5", reference)
