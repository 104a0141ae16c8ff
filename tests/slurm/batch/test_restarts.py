"""The file of requeues: what was written is read again, and whatever else it holds does no harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedsim.slurm.batch import restarts
from fedsim.slurm.batch.restarts import Restart

GOOD = {"job": "12_3", "at": "2026-01-31T12:00:00+00:00", "round": 5, "why": "stopped by SIGUSR1"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run.h5"


def test_what_was_written_is_read_again(out: Path) -> None:
    entries = [Restart("12_3", "2026-01-31T12:00:00+00:00", r, "stopped by SIGUSR1") for r in (-1, 5)]
    restarts.write(out, entries)
    assert restarts.read(out) == entries
    assert [path.name for path in out.parent.iterdir()] == ["run.h5.restarts.json"]
    restarts.remove(out)
    assert restarts.read(out) == []


def test_the_newest_entries_are_kept(out: Path) -> None:
    restarts.write(out, [Restart("1", GOOD["at"], r, "") for r in range(restarts.KEPT + 5)])
    assert [entry.round for entry in restarts.read(out)] == list(range(5, restarts.KEPT + 5))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b'{"restarts": {"job": 1}}',
        b"[" * 100_000,
        b'{"restarts": ' + b"9" * 5000 + b"}",
        json.dumps({"restarts": [GOOD]}).encode() + b" " * restarts.LARGEST,
    ],
    ids=["empty", "no text", "list", "number", "table", "deep", "long number", "large"],
)
def test_a_damaged_file_counts_as_none(out: Path, text: bytes) -> None:
    restarts.file_of(out).write_bytes(text)
    assert restarts.read(out) == []


@pytest.mark.parametrize(
    "wrong",
    [{"round": True}, {"round": -2}, {"round": "5"}, {"job": ["12"]}, {"at": "yesterday"}, {"why": None}, {"more": 1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_entry_is_left_out(out: Path, wrong: dict[str, object]) -> None:
    restarts.file_of(out).write_text(json.dumps({"restarts": [GOOD | wrong, None, 3, GOOD]}))
    assert [entry.round for entry in restarts.read(out)] == [5]


def test_a_pipe_is_not_waited_for(out: Path) -> None:
    os.mkfifo(restarts.file_of(out))
    assert restarts.read(out) == []
