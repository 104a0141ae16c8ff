"""`fedsim bench start`: what it reads of processes, beside the system's own word; and one turn on a small job."""

from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from small_job import small_job

from fedsim.bench.files import start
from fedsim.config.job import load


def test_a_command_alone_is_measured_by_its_own_words() -> None:
    """Half a second of work, and 64 MB that nobody else has."""
    words = "import sys, time; held = b'1' * (64 << 20)\nwhile time.process_time() < 0.5: pass\n"
    spent = start.alone([sys.executable, "-c", words + "sys.stdout.write(open('/proc/self/smaps_rollup').read())"])
    assert spent.cpu > 0.45
    assert spent.seconds > 0.45
    assert all(spent.memory[part] > 64 for part in start.PARTS)


def test_processes_below_this_one_are_found() -> None:
    child = os.fork()
    if not child:
        os.read(os.pipe()[0], 1)
    try:
        assert child in start._below(os.getpid())
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.full
@pytest.mark.processes
def test_every_measure_is_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "REPEATS", 1)
    path = tmp_path / "job.toml"
    path.write_text(small_job(60))
    written = StringIO()
    assert start.main([load(path)], Console(file=written, width=200)) == 0
    rows = [line.split("│") for line in written.getvalue().splitlines() if line.startswith("│")]
    assert len(rows) == 3 + len(start.PARTS)
    for _, _, torch, ours, ratio, *_ in rows:
        assert float(ours) > 0
        assert float(ratio) == pytest.approx(float(ours) / float(torch), rel=0.1)
