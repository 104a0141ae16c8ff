"""What all shipped scripts have in common, as text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
EARLY = "trap 'export FEDSIM_WARNED=1' USR1 TERM     # a signal may come at once"
END = """keep=$(env --block-signal=USR1,TERM true 2>/dev/null && echo env --block-signal=USR1,TERM)  # until fedsim can hear them
trap '' USR1 TERM
exec $keep "$VENV/bin/fedsim" batch """


def test_there_are_four() -> None:
    assert [script.stem for script in SCRIPTS] == ["gpu", "nodes", "quickstart", "sweep"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_hears_signals_first_and_ends_in_fedsim_batch(script: Path) -> None:
    text = script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=True).stderr == ""
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert body[0] == EARLY
    assert END in text
    assert text.count("\n") - text[: text.index(END)].count("\n") == 3
    for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append", "--time="):
        assert f"#SBATCH {option}" in text
    job = re.search(r"^JOB=\$\{JOB:-(.+)\}$", text, re.MULTILINE)
    assert job
    assert (ROOT / job[1]).is_file()
    assert f"`{script.name}`" in (ROOT / "slurm" / "README.md").read_text()
