"""Runs that were given to SLURM, as `fedsim watch` sees them from files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedsim_analysis.watch.many_runs import frame
from fedsim_analysis.watch.runs import DONE, RUNNING, STOPPED, WAITING, Watched
from watched_runs import held, listed, run_file


def submitted(folder: Path, **jobs: object) -> None:
    (folder / "slurm").mkdir(exist_ok=True)
    runs = {f"{name}.h5": {"index": i, "rounds": 20, "job": job, "submission": 0} for i, (name, job) in enumerate(jobs.items())}
    (folder / "slurm" / "submitted.json").write_text(json.dumps({"runs": runs, "submissions": []}))


def requeued(folder: Path, name: str, **entry: Any) -> None:
    (folder / f"{name}.h5.restarts.json").write_text(json.dumps({"restarts": [entry]}))


def looked(folder: Path) -> Watched:
    watched = Watched(folder)
    for _ in range(2):
        watched.look()
    return watched


def test_runs_that_have_not_begun_wait_with_their_job(tmp_path: Path) -> None:
    submitted(tmp_path, a="12_0", b="12_1", c="12_2", d="13")
    run_file(tmp_path / "a.h5", 20, finished=True)
    run_file(tmp_path / "d.h5", 3)
    with held(tmp_path / "b.h5"):
        watched = looked(tmp_path)
        assert [run.state.name for run in watched.runs] == [DONE, RUNNING, WAITING, STOPPED]
        assert [run.rounds for run in watched.runs] == [(20, 20), (0, 20), (0, 20), (3, 20)]
    assert watched.runs[2].state.why == "SLURM job 12_2 has not begun"
    assert watched.runs[3].state.why.endswith("SLURM job 13 was to do it: `fedsim submit --status` asks SLURM")
    assert (watched.ended(), watched.code()) == (False, 3)
    shown = [line.plain.split() for line in frame(watched, 120, 20, plain=True)]
    assert ["c", "waiting", "0/20", "12_2"] in [line[:4] for line in shown]


def test_a_requeued_run_waits_until_it_has_done_more(tmp_path: Path) -> None:
    submitted(tmp_path, a="12", b="12", c="12")
    for name in "abc":
        run_file(tmp_path / f"{name}.h5", 3)
    requeued(tmp_path, "a", job="12", round=3)
    requeued(tmp_path, "b", job="12", round=2)
    requeued(tmp_path, "c", job="11", round=3)
    watched = looked(tmp_path)
    assert [run.state.name for run in watched.runs] == [WAITING, STOPPED, STOPPED]
    assert watched.runs[0].state.why == "SLURM job 12 was requeued after round 3"


def test_a_sweep_that_goes_on_says_more_than_a_submission(tmp_path: Path) -> None:
    submitted(tmp_path, a="12", b="12")
    listed(tmp_path, {"a.h5": {"state": "failed", "message": "the loss is nan"}, "b.h5": {"state": "failed"}})
    assert [run.state.name for run in looked(tmp_path).runs] == [WAITING, WAITING]


@pytest.mark.parametrize("text", ["", "[]", '{"runs": {"a.h5": 3, "../b.h5": {}, "c.h5": {"job": "\\u001b[31m", "rounds": "many"}}}'])
def test_a_ledger_of_anything_is_borne(tmp_path: Path, text: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "submitted.json").write_text(text)
    run_file(tmp_path / "d.h5", 1, planned=1, finished=True)
    (tmp_path / "d.h5.restarts.json").write_text(text)
    watched = looked(tmp_path)
    assert watched.runs[-1].state.name == DONE
    assert all("\x1b" not in run.state.why for run in watched.runs)
