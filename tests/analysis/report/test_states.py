"""Which runs have ended, which go on, and which have failed: by their files, their locks and the list of their sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fedsim_analysis
import pytest
from fedsim_analysis.report import summary
from fedsim_analysis.report.states import missing, states
from reported_runs import write

HOLD = "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


@pytest.mark.processes
def test_a_run_that_a_process_writes_is_running(tmp_path: Path) -> None:
    run = write(tmp_path / "a.h5", done=1, finished=False)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a.h5.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert [str(state) for state in states(fedsim_analysis.open([run]))] == ["a (running, round 1 of 3)"]
        assert holder.stdin
        holder.stdin.close()
    (tmp_path / "a.h5.lock").unlink()  # as each run does, unless it is killed
    assert [str(state) for state in states(fedsim_analysis.open([run]))] == ["a (stopped, round 1 of 3)"]


def test_what_a_sweep_says_of_runs_that_failed(tmp_path: Path) -> None:
    write(tmp_path / "done.h5")
    write(tmp_path / "late.h5", seed=1, done=1, finished=False)
    entries = {
        "late.h5": {"rounds": 3, "state": "failed", "message": "client 2, round 2:\n<b>boom</b>"},
        "lost.h5": {"rounds": 3, "state": "failed", "message": "x" * 200},
        "done.h5": {"rounds": 3, "state": "failed", "message": "of an earlier try"},
        "next.h5": {"rounds": 3, "state": "waiting"},
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": entries}))
    tree = fedsim_analysis.open(tmp_path)
    assert [str(state) for state in states(tree)] == [
        "done (finished, round 3)",
        "late (failed, round 1 of 3: client 2, round 2: <b>boom</b>)",
    ]
    assert missing(tree) == [f"lost.h5 (failed: {'x' * 159}…)"]
    assert summary.warning(tree).startswith("2 of 3 runs have not ended: late (failed, round 1 of 3: client 2")
