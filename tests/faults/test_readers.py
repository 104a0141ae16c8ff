"""A run file that one process writes and another reads again and again: no read fails, and no row changes."""

from __future__ import annotations

import io
import time

import fedsim_analysis
import numpy as np
from processes import Lab
from rich.console import Console

from fedsim.cli import results
from fedsim.reporting.summary import show
from fedsim.storage.reader import RunReader


def test_a_run_file_is_read_while_another_process_writes_it(lab: Lab) -> None:
    running, seen, before = lab.start("--set", "rounds=40"), list[int](), np.empty(0)
    running.until(0)
    while running.process.poll() is None:
        text = io.StringIO()
        show(running.run, Console(file=text, width=120))
        assert "left out" not in text.getvalue()
        results.compared([running.run])
        assert fedsim_analysis.open(running.run)["rounds"].density.notnull().all()
        reader = RunReader(running.run, time.sleep)
        seen.append(reader.rounds)
        masks, density = reader.masks(seen[-1]), reader.column("density")
        assert masks.keys() == {"mask/fc1.weight"}
        assert len(density) > seen[-1]
        np.testing.assert_array_equal(density[: len(before)], before)
        before = density
    assert running.ended().code == 0
    assert seen == sorted(seen)
    assert len(set(seen)) >= 5
