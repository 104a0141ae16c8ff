"""`fedsim bench watching` measures rounds with a view beside them and without."""

from __future__ import annotations

import io
import os
import tomllib

import pytest
from rich.console import Console
from small_job import small_job

from fedsim.bench.files import watching
from fedsim.config import job


@pytest.mark.full
@pytest.mark.processes
def test_every_turn_is_measured_and_the_view_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "TURNS", 2)
    monkeypatch.setattr(watching, "SECONDS", 0.5)
    cores = os.sched_getaffinity(0)
    console = Console(file=io.StringIO(), width=150)
    assert watching.main([job.check({**tomllib.loads(small_job(2)), "name": "small"})], console) == 0
    row = console.file.getvalue().splitlines()[-2].split("│")  # type: ignore[attr-defined]
    assert row[1].strip() == "small"
    assert all(float(row[column]) > 0 for column in (2, 3, 4))
    assert 0 <= float(row[6].strip().rstrip("%")) < 100
    assert os.sched_getaffinity(0) == cores
