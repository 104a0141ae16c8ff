"""Every method of the table by programs of fixed shapes: the answer of the reference, in one process."""

from __future__ import annotations

import pytest
from cases import TABLE, run, table
from run_files import assert_close


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if place % 2 else ()) for place, name in enumerate(TABLE)])
def test_programs_are_serial(name, alone, folder, tmp_path) -> None:
    execution = table(name, "serial", folder)["execution"] | {"fleet": "cuda_graph", "packs": 2}
    out = tmp_path / "run.h5"
    assert run(name, "serial", folder, out, change={"execution": execution}) == 0
    assert_close(out, alone[name, "serial"])
