"""The fault campaign sees what is lost, makes moments of the writing again, and runs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from campaign import recording
from campaign.lab import Lost, same, sound
from campaign.outcomes import Outcome, Skipped, sums_of, table
from campaign.recording import Change, Disk
from processes import environment, rows

from fedsim.storage.checkpoint import folder_of

HERE = Path(__file__).parent


@pytest.fixture
def half(killed: Path, tmp_path: Path) -> Path:
    """A run that was killed half-way, and its checkpoints."""
    shutil.copy(killed, tmp_path)
    shutil.copytree(folder_of(killed), folder_of(tmp_path / killed.name))
    return tmp_path / killed.name


def test_a_run_that_was_killed_is_sound(half: Path, reference: Path) -> None:
    assert sound(half, reference, rows(half)) in (0, 1)
    same(reference, reference)


def test_a_row_that_is_gone_is_seen(half: Path, reference: Path) -> None:
    with pytest.raises(Lost, match="row 9 was complete, and the file ends with row"):
        sound(half, reference, 9)


def test_a_value_that_is_wrong_is_seen(half: Path, reference: Path) -> None:
    with h5py.File(half, "r+") as file:
        file["rounds/bytes_up"][1] += 1
    with pytest.raises(Lost, match="rounds/bytes_up"):
        sound(half, reference)


def test_checkpoints_that_are_behind_are_seen(half: Path, reference: Path) -> None:
    for manifest in folder_of(half).glob("*.json"):
        manifest.unlink()
    with pytest.raises(Lost, match="the newest checkpoint is of round none"):
        sound(half, reference)


def test_a_run_that_is_not_done_is_seen(half: Path, reference: Path) -> None:
    with pytest.raises(Lost, match="it is not the run that was never disturbed"):
        same(half, reference)


def test_what_is_lost_or_hangs_is_counted_and_named() -> None:
    tried = [
        Outcome("kill", "a", same=True, rounds=1, seconds=2.0),
        Outcome("kill", "b", same=True, seconds=12.5, hung=True),
        Outcome("flip", "c", refused=True),
        Outcome("flip", "d", lost="other weights"),
    ]
    assert [outcome.good for outcome in tried] == [True, False, True, False]
    assert sums_of(tried) == {"tried": 4, "same": 2, "refused": 1, "lost": 2, "rounds": 1, "seconds": 12.5, "hung": 1}
    shown = table(tried, [Skipped("clock", "no faketime")]).splitlines()
    assert [line.split()[0] for line in shown[1:4]] == ["kill", "flip", "all"]
    assert shown[4:] == ["not tried: clock: no faketime", "LOST: kill: b: it had not ended after 10 s", "LOST: flip: d: other weights"]


WRITES = """
import os, shutil
with open("a.new", "wb") as file:
    file.write(b"first")
    file.flush()
    os.fsync(file.fileno())
os.rename("a.new", "a")
with open("a", "r+b") as file:
    file.seek(3)
    file.write(b"more")
os.truncate("a", 6)
shutil.copyfile("a", "a.new")
"""


@pytest.mark.full
@pytest.mark.processes
def test_every_moment_of_the_writing_is_made_again(tmp_path: Path) -> None:
    if recording.missing():
        pytest.skip(recording.missing())
    script, log = tmp_path / "writes.py", tmp_path / "log"
    script.write_text(WRITES.replace('"a', f'"{tmp_path}/a'))
    subprocess.run([*recording.tracer(log, tmp_path / "a", 0), sys.executable, script], check=True)
    found, disk, seen = recording.changes(log, tmp_path), Disk(), list[dict[str, bytes]]()
    for change in found:
        disk.apply(change)
        seen.append({name: bytes(content) for name, content in disk.files.items()})
    assert [change.call for change in found] == ["create", "write", "sync", "rename", "write", "size", "create", "write"]
    assert seen[3:] == [
        {"a": b"first"},
        {"a": b"firmore"},
        {"a": b"firmor"},
        {"a": b"firmor", "a.new": b""},
        dict.fromkeys(("a", "a.new"), b"firmor"),
    ]


def test_what_was_not_synced_may_be_lost(tmp_path: Path) -> None:
    disk = Disk()
    for change in (Change("create", "a"), Change("write", "a", 0, b"safe"), Change("sync", "a"), Change("write", "a", 4, b"gone")):
        disk.apply(change)
    found = set()
    for seed in range(20):
        disk.put(tmp_path, random.Random(seed))
        found.add((tmp_path / "a").read_bytes())
    assert found == {b"safe\0\0\0\0", b"safegone"}


@pytest.mark.full
@pytest.mark.processes
def test_a_campaign_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "campaign", "--kinds", "truncated", "--count", "1", "--json", str(tmp_path / "found.json")]
    path = {"PYTHONPATH": f"{HERE}:{HERE.parent / 'fixtures'}:{environment()['PYTHONPATH']}"}
    ended = subprocess.run(command, env=environment() | path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "truncated, checkpoint      1          1" in ended.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["all"]["tried"], found["all"]["same"], found["all"]["lost"]) == (1, 1, 0)
    assert [outcome["kind"] for outcome in found["outcomes"]] == ["truncated, checkpoint"]
