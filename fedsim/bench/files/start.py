"""`fedsim bench start`: from the command to the first round under mpirun, CPU seconds of `fedsim estimate`, memory of a client rank.

Each is a ratio over what `python -c "import torch"` takes in the same turn, so that it can be repeated on another machine, or a busy one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job, load, resolved
from fedsim.errors import BadInput
from fedsim.simulation.launchers.parent import variables_of
from fedsim.storage.reader import RunReader

DEFAULT = "jobs/quickstart.toml"
RANKS, REPEATS = 3, 3
LOOK = 0.005  # seconds between two looks
PARTS = ("Rss", "Pss", "Private_Dirty")  # what /proc/PROCESS/smaps_rollup tells
OWN = PARTS[-1]
MARK = "OMPI_COMM_WORLD_RANK"
IMPORT = (sys.executable, "-c", "import torch, sys; sys.stdout.write(open('/proc/self/smaps_rollup').read())")
VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Spent:
    """What a command took: seconds, those of CPU, and memory in MB by part."""

    seconds: float
    cpu: float
    memory: dict[str, float]


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per measure. The first job is run and estimated; a second one, if any, is estimated in its place."""
    run, estimated = (jobs or [load(Path(DEFAULT))])[0], (jobs or [load(Path(DEFAULT))])[-1]
    with TemporaryDirectory() as folder:
        first_round(run, Path(folder))  # compiles kernels, if that is still to be done
        turns = [(alone(IMPORT), first_round(run, Path(folder)), estimate(estimated, Path(folder))) for _ in range(REPEATS)]
    table = Table(title=f'over `python -c "import torch"`, median of {REPEATS} turns', title_justify="left")
    for name in ("measure", "import torch", "fedsim", "ratio", "lowest", "highest"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    start = f"seconds to the first round of {run.name}, {RANKS} ranks"
    table.add_row(start, *_ratios([(torch.seconds, start.seconds) for torch, start, _ in turns]))
    table.add_row("CPU seconds until then, of all ranks", *_ratios([(torch.cpu, start.cpu) for torch, start, _ in turns]))
    table.add_row(f"CPU seconds of `fedsim estimate`, {estimated.name}", *_ratios([(torch.cpu, cpu) for torch, _, cpu in turns]))
    for part in PARTS:
        table.add_row(f"{part} of a client rank, MB", *_ratios([(torch.memory[part], start.memory[part]) for torch, start, _ in turns]))
    console.print(table)
    return 0


def _ratios(pairs: Sequence[tuple[float, float]]) -> list[str]:
    ratios = sorted(ours / torch for torch, ours in pairs)
    figures = (median(torch for torch, _ in pairs), median(ours for _, ours in pairs), median(ratios), ratios[0], ratios[-1])
    return [f"{figure:.2f}" for figure in figures]


def alone(words: Sequence[str]) -> Spent:
    """A command that ends by printing its own smaps_rollup."""
    began, before = time.perf_counter(), os.times()
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(time.perf_counter() - began, cpu, _memory(said))


def estimate(job: Job, folder: Path) -> float:
    """CPU seconds."""
    (folder / "estimated.toml").write_text(resolved(job), encoding="utf-8")
    return alone([sys.executable, "-c", ESTIMATE, str(folder / "estimated.toml")]).cpu


ESTIMATE = "import sys; from fedsim.cli.entry import main; sys.argv = ['fedsim', 'estimate', sys.argv[1]]; main()"


def first_round(job: Job, folder: Path) -> Spent:
    """A run under mpirun until its row of round 0 stands in the run file; the memory is that of a client rank while it trains.

    Not the most: the last process of several that share memory has it alone.
    """
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        raise BadInput("there is no mpirun here: pip install 'fedsim[mpi]'")
    out = folder / "run.h5"
    shutil.rmtree(folder / "run.h5.checkpoint", ignore_errors=True)
    out.unlink(missing_ok=True)
    (folder / "job.toml").write_text(resolved(job), encoding="utf-8")
    command = [mpirun, "-n", str(RANKS), sys.executable, "-m", "fedsim", "run", "job.toml", "--out", str(out)]
    began, seconds, cpu, looks = time.perf_counter(), 0.0, 0.0, list[dict[str, float]]()
    with subprocess.Popen(command, cwd=folder, env=os.environ | VARIABLES, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if not seconds and _rows(out) >= 0:
                seconds = time.perf_counter() - began
                cpu = sum(map(_cpu, _below(process.pid)))
            elif seconds:
                looks.append(_largest(process.pid))
                time.sleep(0.1)
            time.sleep(LOOK)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Spent(seconds, cpu, {part: median(look.get(part, 0.0) for look in looks) for part in PARTS})


def _rows(out: Path) -> int:
    try:
        return RunReader(out).rounds
    except BadInput:
        return -1  # not there yet, or in the middle of a write


def _below(process: int) -> list[int]:
    """All processes that a process started, and those that they did."""
    try:
        children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_below(child))]


def _cpu(process: int) -> float:
    """Seconds of CPU so far."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _largest(process: int) -> dict[str, float]:
    """Memory of the largest client rank now: of the processes of ranks, and those that they forked, rank 0 left out."""
    ranks = [each for each in _below(process) if MARK in variables_of(each)]
    server = next((each for each in ranks if variables_of(each)[MARK] == "0"), 0)  # the first: what it forked comes after it
    found = [dict.fromkeys(PARTS, 0.0)]
    for each in ranks:
        with suppress(OSError):  # it has ended
            found += [_memory(Path(f"/proc/{each}/smaps_rollup").read_text())] * (each != server)
    return max(found, key=lambda memory: memory.get(OWN, 0.0))


def _memory(text: str) -> dict[str, float]:
    """MB by part."""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {part: int(lines[part].split()[0]) / 1024 for part in PARTS if part in lines}
