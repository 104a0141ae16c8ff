"""The runs that are watched: how each fares, judged from its file, its lock and the list of its sweep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time

import numpy as np

from fedsim_analysis.watch.lock import Holder, Pulse, holder_of
from fedsim_analysis.watch.planned import Planned, planned
from fedsim_analysis.watch.printed import ago, duration
from fedsim_analysis.watch.seen import RunFile

RUNNING, WAITING, DONE, FAILED, STOPPED = "running", "waiting", "done", "failed", "stopped"
UNREADABLE, UNREAD = "unreadable", "not read yet"
STATES = (RUNNING, WAITING, DONE, FAILED, STOPPED, UNREADABLE, UNREAD)
ENDED = (DONE, FAILED, STOPPED, UNREADABLE)
AGAIN = "the same `fedsim run` goes on from its checkpoint"
SILENT, ROUNDS = 1800.0, 20.0  # seconds, and rounds, without news, after which a process that cannot be asked counts as ended
TWICE = 2  # looks that a run must seem stopped, so that one that ends or begins just now is not mistaken


@dataclass(frozen=True)
class State:
    """How a run fares, and why that is believed."""

    name: str
    why: str = ""

    @property
    def ended(self) -> bool:
        return self.name in ENDED


class Run:
    """One watched run."""

    def __init__(self, path: Path, phases: bool, waits: bool) -> None:
        """waits: whether it may begin, or go on, at any time."""
        self.file, self.waits = RunFile(path, phases), waits
        self.state = State(UNREAD)
        self.holder: Holder | None = None
        self._pulse = Pulse()
        self.plan: Planned | None = None
        self.new = 0  # looks that found news
        self._heard = 0.0  # when news came, by the clock of this process; 0: not while it was watched
        self._looks = 0
        self._stops = 0  # of them, those in which it seems stopped

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds that are done, and those planned; 0 where that is not known."""
        seen = self.file.seen
        if seen:
            return max(seen.rounds, 0), seen.planned
        return 0, self.plan.rounds if self.plan else 0

    def look(self, plan: Planned | None) -> None:
        """Reads what is new, and judges."""
        if self.state.name == DONE and not self.file.look() and self.file.exists:
            return
        self.plan, self.holder = plan, self._pulse.judged(holder_of(self.path))  # the lock first: a run lets go of it after its last write
        news = self.file.look()
        state = self._judged()
        if state.name == STOPPED:  # a system that keeps what it read from a network may show an old file
            news = self.file.look(anew=True) or news
            state = self._judged()
            self._stops += 1
            if self._looks and self._stops < TWICE and not self.state.ended:
                state = self.state
        else:
            self._stops = 0
        if news:
            self._heard = monotonic() if self.new else 0.0
        self.new += news or state != self.state
        self.state = state
        self._looks += 1

    def since(self) -> float:
        """Seconds since the file was last written to, by the clock of this process where it saw that."""
        return monotonic() - self._heard if self._heard else max(time() - self.file.changed, 0.0)

    def left(self) -> float:
        """Seconds until it ends; not-a-number where that is not known."""
        seen = self.file.seen
        if self.state.name != RUNNING or not seen or seen.rounds < 0:
            return float("nan")
        pace = seen.pace()
        return max(pace.left(seen.rounds, seen.planned) - min(self.since(), pace.plain), 0.0)

    def _judged(self) -> State:
        writes = self.holder.writes if self.holder else False
        if self.file.seen and not self.file.exists and not writes:
            return State(STOPPED, "its file is gone")
        if self.file.seen and self.file.seen.finished and not self.file.trouble:
            return State(DONE)
        if self.file.damaged and not writes:
            return State(UNREADABLE, self.file.trouble.removeprefix(f"{self.path} "))
        if writes:
            since = f" since {self.holder.since}" if self.holder and self.holder.since else ""
            return State(RUNNING, f"{self.holder} writes it{since}")
        if self.file.trouble and not self.file.damaged:
            return State(UNREAD, "it may be half-written, and is read again")
        if self.holder and writes is None and (heard := self._unasked(self.holder)):
            return heard
        if self.plan and self.plan.lives and self.plan.state in (WAITING, RUNNING):
            return State(self.plan.state, "" if self.plan.state == RUNNING else _why_waiting(self.plan))
        if self.plan and self.plan.requeued is not None and self.file.seen and self.plan.requeued == self.file.seen.rounds:
            return State(WAITING, f"SLURM job {self.plan.job} was requeued after round {self.plan.requeued}")
        if self.plan and self.plan.state == FAILED:
            return State(FAILED, self.plan.message or "its sweep says so")
        if self.waits:
            return State(WAITING, "no process writes it yet")
        return State(STOPPED, self._why_stopped())

    def _unasked(self, holder: Holder) -> State | None:
        """Of a run whose process cannot be asked: running, as long as news comes."""
        quiet = self.since() if self.file.exists else max(time() - holder.noted, 0.0)
        pace = self.file.seen.pace().plain if self.file.seen else float("nan")
        patience = max(SILENT, ROUNDS * pace) if np.isfinite(pace) else SILENT
        if quiet <= patience:
            return State(RUNNING, f"{holder} began to write it, and cannot be asked from here; last news {ago(quiet)}")
        return None

    def _why_stopped(self) -> str:
        why = self._why_no_process()
        return f"{why}; SLURM job {self.plan.job} was to do it: `fedsim submit --status` asks SLURM" if self.plan and self.plan.job else why

    def _why_no_process(self) -> str:
        if not self.file.exists:
            return "it never began, and its sweep has ended; the same `fedsim sweep` does it" if self.plan else "it never began"
        if self.holder is None:
            return f"no process writes it; {AGAIN}"
        if self.holder.writes is None:
            return f"no news for {duration(self.since())}, and {self.holder} cannot be asked from here; if it has ended, {AGAIN}"
        return f"{self.holder} has ended and did not say why: it was probably killed; {AGAIN}"


class Watched:
    """The run at a path, or the runs of a folder."""

    def __init__(self, path: Path, wait: bool = False, expected: int = 0) -> None:
        """wait: whether runs are waited for that have not begun, or have stopped. expected: runs that a folder will have at least."""
        self.path, self.wait, self.expected = path, wait, expected
        self.folder = path.is_dir()
        self.runs: list[Run] = [] if self.folder else [Run(path, phases=True, waits=wait)]

    @property
    def missing(self) -> int:
        """Runs that are expected, and of which there is no trace yet."""
        return max(self.expected - len(self.runs), 0)

    def look(self) -> None:
        """Looks at every run."""
        for _ in self.looking():
            pass

    def looking(self) -> Iterator[Run]:
        """Looks at one run after the other, and gives each; new ones of the folder too."""
        plans = self.find()
        for run in self.runs:
            run.look(plans.get(run.path.name))
            yield run

    def find(self) -> dict[str, Planned]:
        """Finds the runs that there are, and what their sweeps say of them, by the names of their files."""
        self.folder = self.folder or self.path.is_dir()
        plans = planned(self.path if self.folder else self.path.parent, time())
        if self.folder:
            self._find(plans)
        return plans

    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return not self.missing and all(run.state.ended for run in self.runs) and (bool(self.runs) or not self.wait)

    def code(self) -> int:
        """The exit code: 0 all are done, 1 some failed, 2 some cannot be read, 3 some stopped or go on."""
        names = {run.state.name for run in self.runs}
        for name, code in ((FAILED, 1), (UNREADABLE, 2)):
            if name in names:
                return code
        return 0 if names <= {DONE} and not self.missing else 3

    def count(self) -> dict[str, int]:
        """How many runs fare how."""
        names = [run.state.name for run in self.runs]
        return {name: count for name in STATES if (count := names.count(name) + (self.missing if name == WAITING else 0))}

    def new(self) -> int:
        """A number that rises with every news."""
        return sum(run.new for run in self.runs) + len(self.runs)

    def _find(self, plans: dict[str, Planned]) -> None:
        if not self.path.is_dir():
            self.runs = []
            return
        names = {path.name for path in self.path.glob("*.h5")} | plans.keys()
        known = {run.path.name for run in self.runs}
        added = [Run(self.path / name, phases=False, waits=self.wait) for name in names - known]
        self.runs = sorted([run for run in self.runs if run.path.name in names] + added, key=lambda run: _natural(run.path.name))


def _why_waiting(plan: Planned) -> str:
    return f"SLURM job {plan.job} has not begun" if plan.job else "its sweep has not come to it yet"


def _natural(name: str) -> list[tuple[int, str]]:
    """By which seed2 comes before seed10."""
    parts = re.split(r"(\d{1,9})", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]
