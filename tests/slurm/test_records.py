"""What is known of submissions: kept through kills and refusals, and never believed blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsim.errors import BadInput
from fedsim.slurm import records
from fedsim.slurm.records import Entry, Ledger, Submitted


def submitted(text: str = "/w/runs/slurm/array-0.sbatch", **more: object) -> Submitted:
    fields = {"name": "s", "when": "2026-01-02T03:04:05+00:00", "user": "u", "here": "/w", "options": {"nodes": 2}, "tasks": "0-2"}
    return Submitted(text=text, **(fields | more))  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Of an array that was submitted as job 12: the runs a, b and c, from line 1001 on."""
    (tmp_path / "slurm").mkdir()
    made = records.read(tmp_path)
    made.add([f"x{i}" for i in range(1001)])
    made.add(["a", "b", "c", "a"][:3])
    made.begin(submitted(offset=1001), {name: (1001 + i, 60) for i, name in enumerate("abc")})
    made.numbered("12")
    return made


def test_what_is_written_is_read(ledger: Ledger) -> None:
    found = records.read(ledger.folder)
    assert found == ledger
    assert [found.job(name) for name in ("a", "c", "x0")] == ["12_0", "12_2", ""]
    assert found.submissions[0].log(1003) == "s-12_2.out"
    assert submitted(tasks=None, job="13").log(0) == "s-13.out"
    assert found.indices(["new", "b", "newer", "new"]) == {"new": 1004, "b": 1002, "newer": 1005}


def test_lines_of_runs_never_change(ledger: Ledger) -> None:
    before = (ledger.slurm / "runs.txt").read_text()
    ledger.add(["b", "zwölf", "a"])
    assert (ledger.slurm / "runs.txt").read_text() == f"{before}zwölf\n"
    assert records.read(ledger.folder).indices(["zwölf"]) == {"zwölf": 1004}


def test_a_refused_submission_is_forgotten_and_the_one_before_stands(ledger: Ledger) -> None:
    ledger.add(["d"])
    before = ledger.begin(submitted("/w/runs/slurm/array-1.sbatch"), {"b": (1002, 60), "d": (1004, 60)})
    assert records.read(ledger.folder).job("b") == ""  # a kill now leaves a submission without a number
    ledger.withdraw(before)
    found = records.read(ledger.folder)
    assert (found.job("b"), found.runs.keys()) == ("12_1", {"a", "b", "c"})


def test_of_two_jobs_with_one_text_the_newer_is_the_lost_one(ledger: Ledger) -> None:
    text = "/w/runs/slurm/d.sbatch"
    ledger.add(["d"])
    ledger.begin(submitted(text, tasks=None), {"d": (1004, 60)})
    ledger.numbered("13")
    ledger.begin(submitted(text, tasks=None), {"d": (1004, 60)})
    records.find_lost(ledger, {"13": text, "12_0": "/w/runs/slurm/array-0.sbatch"})
    assert ledger.job("d") == ""
    records.find_lost(ledger, {"14": text, "13": text, "15": "/elsewhere/d.sbatch"})
    assert ledger.job("d") == "14"


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"runs": {}}',
        '{"runs": [], "submissions": []}',
        '{"runs": {"a.h5": {"index": 1004, "rounds": 60, "submission": 0}}, "submissions": []}',
        '{"runs": {"a.h5": {"index": 0, "rounds": "x", "submission": 0}}, "submissions": []}',
        '{"runs": {}, "submissions": [{"name": 3}]}',
    ],
)
def test_a_damaged_ledger_is_one_message(ledger: Ledger, damage: str) -> None:
    (ledger.slurm / "submitted.json").write_text(damage)
    with pytest.raises(BadInput) as error:
        records.read(ledger.folder)
    assert str(error.value).startswith(f"{ledger.slurm / 'submitted.json'} is damaged")


def test_a_ledger_of_wrong_kinds_is_one_message(ledger: Ledger) -> None:
    table = json.loads((ledger.slurm / "submitted.json").read_text())
    for field, value in (("job", 12), ("offset", "0"), ("options", []), ("strange", 1)):
        broken = {**table, "submissions": [table["submissions"][0] | {field: value}]}
        (ledger.slurm / "submitted.json").write_text(json.dumps(broken))
        with pytest.raises(BadInput, match="is damaged"):
            records.read(ledger.folder)


def test_nothing_is_known_of_a_folder_without_submissions(tmp_path: Path) -> None:
    assert records.read(tmp_path / "nowhere") == Ledger(tmp_path / "nowhere")
    assert Entry(0, 60, 0) != Entry(1, 60, 0)
