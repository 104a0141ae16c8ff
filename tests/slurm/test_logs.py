"""The last line of a job's output that says something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsim.slurm import logs

ABORT = """
round 3/60  accuracy 22.5%
[rank 1, client 3, round 4, Train.step 2] ValueError: the loss is nan
--------------------------------------------------------------------------
prterun has exited due to process rank 1 with PID 0 on node one calling
"abort". This may have caused other processes in the application to be
--------------------------------------------------------------------------

slurmstepd-one: error: *** JOB 5 ON one CANCELLED AT 2026-11-28T20:59:29 ***
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        ("\n  \n----\n", ""),
        ("one\ntwo\n\n", "two"),
        ("a \x1b[31mred\x1b[0m line\u202e\n", r"a \x1b[31mred\x1b[0m line\u202e"),
        ("slurmstepd: error: Detected 1 oom_kill event\n", "slurmstepd: error: Detected 1 oom_kill event"),
        ("-----\n\0fedsim batch: stopped\n", "fedsim batch: stopped"),  # Open MPI ends its messages with a NUL
        (ABORT, "[rank 1, client 3, round 4, Train.step 2] ValueError: the loss is nan"),
        ("x" * 1_000_000, "x" * 300),
    ],
)
def test_the_last_line_that_says_something(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.out").write_text(text)
    assert logs.last_line(tmp_path / "job.out") == said


def test_what_is_no_file_says_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00 broken")
    assert [logs.last_line(tmp_path / name) for name in ("none", "pipe", ".")] == ["", "", ""]
    assert logs.last_line(tmp_path / "bytes") == "�� broken"
