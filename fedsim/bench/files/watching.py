"""`fedsim bench watching`: one run, during which `fedsim watch` takes turns with nothing: a stopped process (SIGSTOP) takes no time.

The run and the view share one core, where the system lets them, which is the worst that a view can do to a run.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

import torch
from rich.console import Console
from rich.table import Table

from fedsim.bench.files.recording import recorded_rounds
from fedsim.config.job import Job, load
from fedsim.simulation import malloc
from fedsim.simulation.experiment import Experiment, build_experiment

DEFAULT = ("jobs/bench/medium.toml",)
TURNS, SECONDS = 5, 20.0  # turns of each kind, and how long a turn is: several looks
BEGUN = 5.0  # seconds that the view is given to begin
VIEW = (
    "import sys; from pathlib import Path; from fedsim_analysis.watch.command import watch; sys.exit(watch(Path(sys.argv[1]), wait=True))"
)


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per job."""
    torch.set_num_threads(1)
    malloc.hold()
    title = f"fedsim watch beside a run, on one core: {TURNS} turns of {SECONDS:.0f} s with it, and as many without"
    table = Table(title=title, title_justify="left")
    for name in ("job", "round, s", "watched, s", "watched / not", "lowest and highest turn", "of a core"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for job in jobs or [load(Path(name)) for name in DEFAULT]:
        alone, watched, part = measured(build_experiment(job), console)
        ratios = [median(one) / median(other) for one, other in zip(watched, alone, strict=True)]
        seconds = [median(chain(*turns)) for turns in (alone, watched)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(job.name, *(f"{each:.4f}" for each in seconds), f"{median(ratios):.3f}", spread, f"{part:.2%}")
    console.print(table)
    return 0


def measured(parts: Experiment, console: Console) -> tuple[list[list[float]], list[list[float]], float]:
    """Seconds of the rounds of each turn without the view and with it, and the part of a core that the view took in its turns."""
    alone, watched, used, spent = list[list[float]](), list[list[float]](), 0.0, 0.0
    with TemporaryDirectory() as folder, _on_one_core():
        out = Path(folder) / "run.h5"
        with closing(recorded_rounds(parts, out, console)) as taken, _view(out) as view:
            rounds = map(sum, taken)
            _turn(rounds, BEGUN)
            for _ in range(TURNS):
                os.kill(view.pid, signal.SIGSTOP)
                alone.append(_turn(rounds, SECONDS))
                os.kill(view.pid, signal.SIGCONT)
                before, began = _seconds_of(view.pid), time.perf_counter()
                watched.append(_turn(rounds, SECONDS))
                used, spent = used + _seconds_of(view.pid) - before, spent + time.perf_counter() - began
    return alone, watched, used / spent


def _turn(rounds: Iterator[float], seconds: float) -> list[float]:
    """Seconds of each round of a turn that is at least so long."""
    until, taken = time.perf_counter() + seconds, list[float]()
    while time.perf_counter() < until:
        taken.append(next(rounds))
    return taken


@contextmanager
def _on_one_core() -> Iterator[None]:
    """This process and those that it starts share a core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _view(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`fedsim watch` in a terminal of its own, which somebody reads."""
    ours, theirs = pty.openpty()
    environ = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    view = subprocess.Popen([sys.executable, "-c", VIEW, str(out)], stdin=theirs, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    reader = Thread(target=_read, args=(ours,), daemon=True)
    reader.start()
    try:
        yield view
    finally:
        view.kill()
        view.wait()
        reader.join()
        os.close(ours)


def _read(terminal: int) -> None:
    with suppress(OSError):  # its other end was closed
        while os.read(terminal, 65536):
            pass


def _seconds_of(process: int) -> float:
    """Seconds of a core that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
