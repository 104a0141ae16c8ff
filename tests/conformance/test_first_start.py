"""A run on a machine that has compiled nothing yet gives the bits of all later runs."""

from __future__ import annotations

import pytest
from cases import RUNS
from elsewhere import run_lines
from run_files import assert_same

SPARSE = [pair for pair in RUNS if pair[1] == "sparse"]


@pytest.mark.full
@pytest.mark.processes
def test_the_first_start_changes_no_bit(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    cold, warm = (run_lines(folder, name, SPARSE) for name in ("first", "second"))
    for name, way in SPARSE:
        assert_same(cold / f"{name}-{way}.h5", warm / f"{name}-{way}.h5")
