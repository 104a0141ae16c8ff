"""What rank 0 tells while a run goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from math import isnan

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column as Fixed

from fedsim.core.compiled import cache_folder, foreign
from fedsim.fleet.plan import Plan
from fedsim.simulation.experiment import Experiment
from fedsim.simulation.resume import RunStart
from fedsim.simulation.round_record import RoundRow
from fedsim.storage.reader import RunReader

LINES = 10  # plain lines of a run that is not evaluated
UNKEPT = "note: no folder for compiled code can be written, so every start compiles it again; NUMBA_CACHE_DIR can name a folder"
MOST = 50  # plain lines of evaluated rounds


def output(terminal: bool | None = None, quiet: bool = False) -> Console:
    """Where progress is printed. A notebook gets plain lines: it shows neither a bar nor the colours of a terminal.

    terminal: whether there is a terminal; None: as Python says of its output.
    """
    notebook = Console().is_jupyter  # whose kernel asks for colours as if it were a terminal
    return Console(quiet=quiet, emoji=False, force_jupyter=False, force_terminal=False if notebook else terminal)


class Progress:
    """Bar, accuracy, density, bytes, seconds per round, time left."""

    def __init__(self, parts: Experiment, ranks: int, start: RunStart, console: Console) -> None:
        self.parts, self.ranks, self.start = parts, ranks, start
        self.mpi = ""  # " of " and the MPI library of the ranks
        self.console = console
        self.rounds = parts.job.rounds
        self.began, self.first = time.monotonic(), start.round + 1
        self.bytes = 0.0
        self.accuracy, self.tried = float("nan"), 0  # the last known, and of which round
        self.said = start.round  # the last round with a plain line
        self._bar: Bar | None = None

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, plan: Plan) -> None:
        job, ranks = self.parts.job, f"{self.ranks} ranks{self.mpi}" if self.ranks > 1 else "one process"
        setting = self.parts.setting
        self.say(f"{job.name}: {job.method.name} on {job.data.called}, {setting.clients:,} clients, cohort {setting.cohort}")
        packs = f"{min(plan.packs, setting.cohort)} packs of clients"
        self.say(f"{', '.join([ranks, f'{plan.fleet} fleet', packs, *plan.ways, plan.device])}; writing {self.start.out}")
        for note in self.parts.notes:
            self.say(f"note: {note}")
        for folder in foreign():
            self.say(f"note: {folder} is not used for compiled code: it belongs to another user, or others may write to it")
        if not cache_folder():
            self.say(UNKEPT)
        if self.first > 0:
            self._go_on()
        self.began = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(12), MofNCompleteColumn(table_column=Fixed(no_wrap=True, min_width=7)), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self.console)
            self._bar.add_task("", total=self.rounds, completed=max(self.first - 1, 0))
            self._bar.start()

    def _go_on(self) -> None:
        """What the rounds before came to."""
        for reason in self.start.checkpoint.passed if self.start.checkpoint else ():
            self.say(f"note: a newer checkpoint cannot be used ({reason})")
        self.say(f"going on after round {self.start.round}")
        reader = RunReader(self.start.out).held()
        for line in reader.damaged:
            self.say(f"note: {line}")
        known = {name: reader.column(name) for name in ("bytes_up", "bytes_down", "accuracy") if name in reader.names()}
        self.bytes = sum(float(known[name].sum()) for name in ("bytes_up", "bytes_down") if name in known)
        if len(tried := np.flatnonzero(~np.isnan(known.get("accuracy", np.empty(0))))):
            self.accuracy, self.tried = float(known["accuracy"][tried[-1]]), int(tried[-1])

    def advance(self, r: int, row: RoundRow) -> None:
        """Tells of round `r`."""
        self.bytes += row.values["bytes_up"] + row.values["bytes_down"]
        if "accuracy" in row.values:
            self.accuracy, self.tried = row.values["accuracy"], r
        text = self._text(r, row)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=r, description=text)
        elif self._is_due(r, "accuracy" in row.values):
            self.said = r
            self.say(f"round {r:>{len(str(self.rounds))}}/{self.rounds}  {text}")

    def _is_due(self, r: int, evaluated: bool) -> bool:
        """Whether round `r` gets a plain line: a few rounds do, and as many evaluated ones as one still reads."""
        return r == self.rounds or r % max(1, self.rounds // LINES) == 0 or (evaluated and r - self.said >= self.rounds / MOST)

    def _text(self, r: int, row: RoundRow) -> str:
        spent = time.monotonic() - self.began
        each = spent / (r - self.first + 1)
        left = timedelta(seconds=round(each * (self.rounds - r)))
        accuracy = "" if isnan(self.accuracy) else f"accuracy {self.accuracy:.1%}  "
        if accuracy and self.tried != r:
            accuracy = f"accuracy {self.accuracy:.1%} (round {self.tried})  "
        return f"{accuracy}density {row.values['density']:.3f}  {self.bytes / 1e6:,.1f} MB  {each:.2f} s/round  {left} left"

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def show(self) -> None:
        """The summary of the run file."""
        from fedsim.reporting.summary import show  # when there is something to show

        if self.start.finished:
            self.say(f"{self.start.out} is finished already; this is what it holds")
        show(self.start.out, self.console)
