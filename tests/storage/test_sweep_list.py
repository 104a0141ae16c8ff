"""sweep.json: what a sweep says of its runs, for others to see; and that it harms nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedsim.storage.sweep_list import BEAT, LONGEST, SweepList


def states(folder: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in json.loads((folder / "sweep.json").read_text())["runs"].items()}


def entry(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())["runs"][name]


def test_all_runs_stand_in_it_before_any_begins_and_then_how_each_fares(tmp_path: Path) -> None:
    runs = SweepList(tmp_path / "new" / "runs", {"a.h5": 60, "b.h5": 30}, 0.0)
    folder = tmp_path / "new" / "runs"
    assert states(folder) == {"a.h5": "waiting", "b.h5": "waiting"}
    assert entry(folder, "b.h5")["rounds"] == 30
    assert entry(folder, "b.h5")["process"] == os.getpid()
    runs.note({"a.h5": ("running", "")}, 1.0)
    assert states(folder) == {"a.h5": "running", "b.h5": "waiting"}
    runs.note({"a.h5": ("failed", "x" * 1000), "b.h5": ("done", "")}, 2.0)
    assert states(folder) == {"a.h5": "failed", "b.h5": "done"}
    assert entry(folder, "a.h5")["message"] == "x" * LONGEST
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_without_news_it_gives_a_sign_of_life_now_and_then(tmp_path: Path) -> None:
    runs = SweepList(tmp_path, {"a.h5": 60}, 0.0)
    path = tmp_path / "sweep.json"
    os.utime(path, (0, 0))
    content = path.read_bytes()
    runs.note({"a.h5": ("waiting", "")}, BEAT - 1)
    assert path.stat().st_mtime == 0
    runs.note({"a.h5": ("waiting", "")}, BEAT)
    assert path.stat().st_mtime > 0
    os.utime(path, (0, 0))
    runs.note({}, BEAT + 1)
    assert (path.stat().st_mtime, path.read_bytes()) == (0, content)


def test_runs_of_other_sweeps_stay_where_they_left_a_file_or_live(tmp_path: Path) -> None:
    SweepList(tmp_path, {"mine.h5": 1, "left.h5": 1, "never.h5": 1}, 0.0)
    (tmp_path / "left.h5").touch()
    found = json.loads((tmp_path / "sweep.json").read_text())
    for name in ("left.h5", "never.h5"):
        found["runs"][name] |= {"began": "0", "state": "failed"}  # of a process that has ended
    found["runs"]["bad.h5"] = 3
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    SweepList(tmp_path, {"next.h5": 1}, 0.0)
    assert states(tmp_path) == {"mine.h5": "waiting", "left.h5": "failed", "next.h5": "waiting"}
    SweepList(tmp_path, {"left.h5": 1}, 0.0)
    assert states(tmp_path)["left.h5"] == "waiting"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": []}', "[" * 5000])
def test_a_file_that_is_no_list_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    SweepList(tmp_path, {"a.h5": 1}, 0.0)
    assert states(tmp_path) == {"a.h5": "waiting"}


def test_what_cannot_be_written_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.json").mkdir()
    runs = SweepList(tmp_path, {"a.h5": 1}, 0.0)
    runs.note({"a.h5": ("done", "")}, 100.0)
    assert (tmp_path / "sweep.json").is_dir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "runs").mkdir()
    runs = SweepList(tmp_path / "runs", {"a.h5": 1}, 0.0)
    runs.note({"a.h5": ("done", "")}, 100.0)
    assert list((tmp_path / "runs").iterdir()) == []
