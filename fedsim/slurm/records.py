"""What is known of submissions into a folder of run files: its folder `slurm/`.

    runs.txt         the names of the runs, one a line; the line, from 0, is the index of a run. Lines are only added
    submitted.json   {"runs": {"NAME.h5": {"index": 0, "rounds": 60, "job": "12_0"}}, "submissions": [{"job": "12", …}]}
    jobs/NAME.toml   the resolved job of each run
    *.sbatch, log/   what was submitted, and what the jobs print

An entry is written before sbatch is called, and its number after that: where a process dies between the two, the job is found again by
the path of its text, which SLURM knows.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.errors import BadInput
from fedsim.storage import disk_room

NAMES, LEDGER, JOBS = "runs.txt", "submitted.json", "jobs"
LARGEST = 2**26  # bytes of a file that is read


@dataclass
class Submitted:
    """One job, or job array, that was given to sbatch. offset and tasks as in `arrays.Array`; tasks is None for a single run."""

    name: str  # of the SLURM job
    text: str  # the absolute path of the batch text
    when: str
    user: str
    here: str  # the folder of the call
    options: dict[str, Any]
    offset: int = 0
    tasks: str | None = None
    job: str = ""  # its number; empty until sbatch has said it

    def log(self, index: int) -> str:
        """The name of the file that holds the output of the run with this index."""
        return f"{self.name}-{self.job}.out" if self.tasks is None else f"{self.name}-{self.job}_{index - self.offset}.out"

    def number(self, index: int) -> str:
        """The job of the run with this index, as SLURM names it: "12", or "12_3"; empty while it is not known."""
        return self.job if self.tasks is None or not self.job else f"{self.job}_{index - self.offset}"


@dataclass
class Entry:
    """A run that was submitted: its line of runs.txt, its rounds, and its last submission (a position in the ledger)."""

    index: int
    rounds: int
    submission: int


@dataclass
class Ledger:
    """All that is known of the submissions into a folder."""

    folder: Path
    names: list[str] = field(default_factory=list)
    runs: dict[str, Entry] = field(default_factory=dict)  # by the names of runs
    submissions: list[Submitted] = field(default_factory=list)

    @property
    def slurm(self) -> Path:
        return self.folder / "slurm"

    def job(self, run: str) -> str:
        """The last job of a run, "12" or "12_3"; empty where none is known."""
        entry = self.runs.get(run)
        return self.submissions[entry.submission].number(entry.index) if entry else ""

    def indices(self, names: Sequence[str]) -> dict[str, int]:
        """The line of each run, as it is or would be after `add`."""
        known = {name: i for i, name in reversed(list(enumerate(self.names)))}
        new = [name for name in dict.fromkeys(names) if name not in known]
        known |= {name: len(self.names) + i for i, name in enumerate(new)}
        return {name: known[name] for name in names}

    def add(self, names: Sequence[str]) -> None:
        """Adds the runs to runs.txt that are not in it."""
        there = set(self.names)
        if new := [name for name in names if name not in there]:
            self.names += new
            disk_room.put(self.slurm / NAMES, b"".join(os.fsencode(f"{name}\n") for name in self.names))

    def begin(self, submitted: Submitted, runs: Mapping[str, tuple[int, int]]) -> dict[str, Entry | None]:
        """Notes that a submission is about to be made, with the (index, rounds) of its runs. Returns what was known of them before."""
        before = {name: self.runs.get(name) for name in runs}
        self.submissions.append(submitted)
        self.runs |= {name: Entry(index, rounds, len(self.submissions) - 1) for name, (index, rounds) in runs.items()}
        self._save()
        return before

    def numbered(self, job: str) -> None:
        """Notes the number of the last submission."""
        self.submissions[-1].job = job
        self._save()

    def withdraw(self, before: Mapping[str, Entry | None]) -> None:
        """Forgets the last submission, which SLURM refused. before: as `begin` returned it."""
        del self.submissions[-1]
        for name, entry in before.items():
            if entry is None:
                del self.runs[name]
            else:
                self.runs[name] = entry
        self._save()

    def _save(self) -> None:
        runs = {
            f"{name}.h5": {"index": entry.index, "rounds": entry.rounds, "job": self.job(name), "submission": entry.submission}
            for name, entry in self.runs.items()
        }
        table = {"runs": runs, "submissions": [vars(each) for each in self.submissions]}
        disk_room.put(self.slurm / LEDGER, f"{json.dumps(table)}\n".encode())


def read(folder: Path) -> Ledger:
    """What was submitted into a folder; an empty ledger where nothing was. BadInput where a file of it is damaged."""
    ledger = Ledger(folder)
    names, table = _content(ledger.slurm / NAMES), _content(ledger.slurm / LEDGER)
    ledger.names = os.fsdecode(names or b"").split("\n")[:-1]
    if table is None:
        return ledger
    try:
        found = json.loads(table)
        ledger.submissions = [_submitted(each) for each in found["submissions"]]
        ledger.runs = {name.removesuffix(".h5"): _entry(each, ledger) for name, each in found["runs"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{ledger.slurm / LEDGER} is damaged ({error}); move it away: the runs then count as not submitted") from None
    return ledger


def find_lost(ledger: Ledger, scripts: Mapping[str, str]) -> None:
    """Gives submissions without a number, whose process died beside sbatch, that of the job with their text. scripts: by jobs."""
    numbers = {each.job for each in ledger.submissions}
    lost = {each.text: each for each in ledger.submissions if not each.job}
    for job, script in scripts.items():
        number = job.partition("_")[0]
        if script in lost and number not in numbers and int(number) > int(lost[script].job or 0):
            lost[script].job = number


def put(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it, without waiting for the disk: of many files each would take a moment. NoRoom where it is full."""
    aside = path.with_name(f"{path.name}.new")
    with disk_room.as_no_room(path, len(content)):
        try:
            aside.write_bytes(content)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    aside.rename(path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second `fedsim submit` of this folder waiting, where its file system has locks. The folder must be there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _content(path: Path) -> bytes | None:
    """What a file holds; None where there is none. BadInput where it cannot be read or is too large."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} is damaged: it is larger than {LARGEST:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _submitted(table: Mapping[str, Any]) -> Submitted:
    made = Submitted(**table)
    texts = (made.name, made.text, made.when, made.user, made.here, made.job)
    if not all(isinstance(text, str) for text in texts) or type(made.offset) is not int or not isinstance(made.options, dict):
        raise ValueError("a submission has a value of a wrong kind")
    return made


def _entry(table: Mapping[str, Any], ledger: Ledger) -> Entry:
    entry = Entry(table["index"], table["rounds"], table["submission"])
    if any(type(value) is not int for value in vars(entry).values()):
        raise ValueError("a run has a value of a wrong kind")
    if not (0 <= entry.index < len(ledger.names) and 0 <= entry.submission < len(ledger.submissions)):
        raise ValueError("a run has a number that there is not")
    return entry
