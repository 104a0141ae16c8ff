"""The batch text as a whole, and what bash and a path of any signs make of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fedsim.slurm import script
from fedsim.slurm.arrays import Array
from fedsim.slurm.options import options_of
from fedsim.slurm.script import Name, Place

PLACE = Place(Path("/project/pruning"), Path("/project/pruning/runs"), ("/project/venv/bin/fedsim",))
ONE = """#!/bin/bash
# fedsim submit wrote this: the run quickstart.
# What becomes of it: fedsim submit --status /project/pruning/runs
#SBATCH --job-name=quickstart
#SBATCH --chdir=/project/pruning
#SBATCH --output=/project/pruning/runs/slurm/log/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --nodes=1
#SBATCH --ntasks=3
#SBATCH --cpus-per-task=1

trap 'export FEDSIM_WARNED=1' USR1 TERM     # a signal may come at once
cd /project/pruning || exit 2
export OMP_NUM_THREADS=1
export MKL_NUM_THREADS=1
export OPENBLAS_NUM_THREADS=1
job=/project/pruning/runs/slurm/jobs/quickstart.toml
out=/project/pruning/runs/quickstart.h5
keep=$(env --block-signal=USR1,TERM true 2>/dev/null && echo env --block-signal=USR1,TERM)  # until fedsim can hear them
trap '' USR1 TERM
exec $keep /project/venv/bin/fedsim batch "$job" --out "$out" --ranks 3
"""
MANY = """#!/bin/bash
# fedsim submit wrote this: runs of /project/pruning/runs/slurm/runs.txt, lines 1001 to 1008.
# What becomes of it: fedsim submit --status /project/pruning/runs
#SBATCH --job-name=sweep
#SBATCH --chdir=/project/pruning
#SBATCH --output=/project/pruning/runs/slurm/log/%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=2
#SBATCH --ntasks=9
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:2
#SBATCH --mem=64G
#SBATCH --time=1-12
#SBATCH --partition=gpu
#SBATCH --account=p1
#SBATCH --qos=long
#SBATCH --array=0-3,7%2
#SBATCH --exclusive
#SBATCH --constraint="a100|h100"
#SBATCH -w n1

trap 'export FEDSIM_WARNED=1' USR1 TERM     # a signal may come at once
cd /project/pruning || exit 2
export OMP_NUM_THREADS=4
export MKL_NUM_THREADS=4
export OPENBLAS_NUM_THREADS=4
command -v module >/dev/null || . /etc/profile  # where a site defines it
module load gcc openmpi/5 || exit 2
folder=/project/pruning/runs
line=$((SLURM_ARRAY_TASK_ID + 1001))  # from 0
run=$(sed -n "$((line + 1))p" "$folder/slurm/runs.txt")
[ -n "$run" ] || { echo "$folder/slurm/runs.txt has no line $line" >&2; exit 2; }
job=$folder/slurm/jobs/$run.toml
out=$folder/$run.h5
keep=$(env --block-signal=USR1,TERM true 2>/dev/null && echo env --block-signal=USR1,TERM)  # until fedsim can hear them
trap '' USR1 TERM
exec $keep /project/venv/bin/fedsim batch "$job" --out "$out" --ranks 9 --launcher mpirun --restarts 0
"""
STRANGE = ['it\'s $HOME `id` "x" 100% \\ #y', "-n", "zwölf Läufe"]


def test_the_text_of_one_run() -> None:
    assert script.text(Name("quickstart", "quickstart"), PLACE, options_of()) == ONE


def test_the_text_of_an_array_with_all_options() -> None:
    options = options_of(
        {"nodes": 2, "gpus": 4, "ranks_per_gpu": 2, "threads": 4, "memory": "64G", "time": "1-12", "partition": "gpu", "account": "p1"},
        {"qos": "long", "restarts": 0, "launcher": "mpirun", "modules": "gcc openmpi/5", "warning": 120},
        {"sbatch": "--exclusive --constraint='a100|h100' -w n1"},
    )
    assert script.text(Name("sweep"), PLACE, options, Array(1001, (0, 1, 2, 3, 7), 2)) == MANY


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("tasks", [True, False])
def test_bash_calls_fedsim_with_names_of_any_signs(tmp_path: Path, name: str, tasks: bool) -> None:
    """The last line of the text, carried out by bash with a program that prints what it was given."""
    here = tmp_path / name
    (here / "slurm").mkdir(parents=True)
    (here / "slurm" / "runs.txt").write_text(f"other\nthird\n{name}\n")
    program = tmp_path / f"{name} program"
    program.write_text('#!/bin/bash\npwd\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    array = Array(1, (0, 1)) if tasks else None
    text = script.text(Name("job" if tasks else name, "" if tasks else name), Place(here, here, (str(program),)), options_of(), array)
    (tmp_path / "text").write_text(text)
    ended = subprocess.run(
        ["bash", "text"], cwd=tmp_path, env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=False
    )
    given = [str(here), "batch", f"{here}/slurm/jobs/{name}.toml", "--out", f"{here}/{name}.h5", "--ranks", "3"]
    assert (ended.stdout.splitlines(), ended.stderr, ended.returncode) == (given, "", 0)


def test_a_task_without_a_line_ends_with_2(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "runs.txt").write_text("a\n")
    (tmp_path / "text").write_text(script.text(Name("x"), Place(tmp_path, tmp_path, ("true",)), options_of(), Array(0, (0, 1))))
    ended = subprocess.run(
        ["bash", "text"], cwd=tmp_path, env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (2, f"{tmp_path}/slurm/runs.txt has no line 1\n")


def test_signals_are_kept_as_by_the_shipped_scripts() -> None:
    """Which `test_first_signals.py` tests."""
    shipped = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))
    assert len(shipped) == 4
    for file in shipped:
        assert f"\n{script.BEGIN}\n" in file.read_text()
        assert f"\n{script.KEEP}\nexec $keep " in file.read_text()
