"""`fedsim bench clock` on a small job: it times the same rounds with and without devices."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from small_job import small_job

from fedsim.bench import clock
from fedsim.config.job import load


def test_both_kinds_of_rounds_are_timed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "ROUNDS", 2)
    path = tmp_path / "job.toml"
    path.write_text(small_job(2, devices={"name": "four_kinds"}))
    written = StringIO()
    assert clock.main([load(path)], Console(file=written, width=120)) == 0
    shown = written.getvalue()
    assert "rank 0 alone" in shown
    assert "a round on one rank" in shown
