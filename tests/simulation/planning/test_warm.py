"""After `fedsim warm` no run compiles anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from rich.console import Console

from fedsim.errors import BadInput
from fedsim.simulation.planning import warm

ROOT = Path(__file__).parents[3]
JOBS = ("quickstart", "quickstart_dense", "fedtiny_smoke", "fedmef_smoke", "dwfnp_smoke", "adp_smoke")


@pytest.mark.outside
@pytest.mark.processes
def test_what_was_compiled_ahead_is_all_that_runs_need(tmp_path: Path) -> None:
    at = environment() | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def done(*command: str, env: dict[str, str] = at) -> str:
        ended = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    first = done("-m", "fedsim", "warm")
    (folder,) = (tmp_path / "cache" / "fedsim" / "kernels").iterdir()
    made = sorted(folder.iterdir())
    assert first.split()[:6] == [str(len(made)), "kernels", "compiled,", "0", "were", "there"]
    assert str(folder) in first
    assert done("-m", "fedsim", "warm").startswith(f"0 kernels compiled, {len(made)} were there already")
    for name in JOBS:
        done("-m", "fedsim", "run", str(ROOT / "jobs" / f"{name}.toml"), "--out", f"{name}.h5")
    done(str(ROOT / "tests" / "kernels" / "every_kernel.py"))
    assert sorted(folder.iterdir()) == made


def test_where_nothing_can_be_kept_warm_says_so(monkeypatch) -> None:
    monkeypatch.setattr(warm, "cache_folder", lambda: None)
    with pytest.raises(BadInput, match="compiled kernels cannot be kept: no folder for them can be written; NUMBA_CACHE_DIR names one"):
        warm.warm(Console())
