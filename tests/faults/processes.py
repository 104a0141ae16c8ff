"""Real processes to be killed, signalled and waited for; and what two run files of one job must have in common."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedsim.errors import BadInput
from fedsim.storage.checkpoint import folder_of, latest
from fedsim.storage.reader import RunReader

HERE = Path(__file__).parent
MPIRUN = Path(sys.executable).with_name("mpirun")
HANG = 150.0  # seconds, beyond which a process counts as hung
LOOK = 0.01  # seconds between two looks at a run file: each takes a millisecond from the run
SAID = ("out.txt", "err.txt")
HOW = ("seconds", "rank_bytes", "rank0_bytes", "rank0_messages")  # how a run was done, not what it found
UNLIKE = tuple(f"rounds/{name}" for name in HOW)
MEASURED = {"rounds": RunReader.column, "clients": RunReader.clients, "layers": RunReader.layers}

TINY = """
name = "tiny"
rounds = 8
[data]
name = "file"
path = "images.h5"
[partition]
name = "iid"
clients = 10
[cohort]
size = 8
[model]
width = 4
[train]
batch = 16
lr = 0.05
[evaluate]
every = 4
[execution]
plan = "reference"
device = "cpu"
[method]
name = "own:Lasting"
"""


def environment() -> dict[str, str]:
    """Ours, without a launcher's marks; Open MPI may run as root and put more ranks than cores."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_", "SLURM_"))}
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return plain | allowed | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Console = Callable[..., Ended]  # of the arguments of `fedsim run`


@dataclass
class Running:
    """A command in a session of its own, so that all its processes are found again, whoever their parent is."""

    folder: Path
    command: list[str]
    run: Path
    hold: int | None = None  # a round that never ends
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        environ = environment() | ({} if self.hold is None else {"HOLD_ROUND": str(self.hold)})
        with (self.folder / "out.txt").open("wb") as out, (self.folder / "err.txt").open("wb") as err:
            self.process = subprocess.Popen(self.command, cwd=self.folder, env=environ, stdout=out, stderr=err, start_new_session=True)

    def until(self, r: int) -> None:
        """Waits for row `r`."""
        give_up = time.monotonic() + HANG
        while rows(self.run) < r:
            assert self.process.poll() is None, f"ended before row {r}: {self._said('out.txt')}{self._said('err.txt')}"
            assert time.monotonic() < give_up, f"no row {r} in {HANG} s"
            time.sleep(LOOK)

    def members(self) -> list[int]:
        """All living processes of the session."""
        return [pid for pid, session, state in _processes() if session == self.process.pid and state != "Z"]

    def ranks(self) -> list[int]:
        """The processes that mpirun has started so far."""
        return [pid for pid in self.members() if b"OMPI_COMM_WORLD_RANK=" in _read(pid, "environ")]

    def rank(self, number: int) -> int:
        """The process of a rank; the one that watches for it began later."""
        mark = b"OMPI_COMM_WORLD_RANK=%d" % number
        return min(pid for pid in self.members() if mark in _read(pid, "environ").split(b"\0"))

    def kill(self) -> None:
        """Ends all processes at once, as a power failure would."""
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.ended()

    def ended(self, within: float = HANG) -> Ended:
        """Waits until the command and all its processes have ended."""
        give_up = time.monotonic() + within
        code = self.process.wait(within)
        while self.members():
            assert time.monotonic() < give_up, f"{self.command} ended and left processes behind"
            time.sleep(0.01)
        return Ended(code, self._said("out.txt"), self._said("err.txt"))

    def _said(self, name: str) -> str:
        return (self.folder / name).read_text()


def _read(pid: int, name: str) -> bytes:
    """A file of /proc about a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def signals(pid: int, kind: str, name: signal.Signals) -> bool:
    """Whether a process catches ("SigCgt") or blocks ("SigBlk") a signal."""
    masks = dict(line.split(":\t") for line in _read(pid, "status").decode().splitlines() if ":\t" in line)
    return bool(int(masks.get(kind, "0"), 16) >> (name - 1) & 1)


def wait_for(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < give_up, f"nothing came in {HANG} s"
        time.sleep(LOOK)


def await_writer() -> None:
    """Waits until the rounds so far are written down: a run writes beside its training."""
    for thread in threading.enumerate():
        if thread.name == "beside":
            thread.join(HANG)


def _processes() -> Iterator[tuple[int, int, str]]:
    """(process, its session, its state) of all there are."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended since
        yield int(entry.name), int(session), state


@dataclass
class Lab:
    """A folder with a job and the methods of its user."""

    folder: Path
    started: list[Running] = field(default_factory=list)

    def start(
        self, *arguments: str, ranks: int = 0, run: str = "run.h5", hold: int | None = None, through: tuple[str, ...] = ()
    ) -> Running:
        """`fedsim run tiny.toml --out RUN …` on that many ranks; 0: without mpirun. It goes on in round `hold` until it is stopped.

        through: words before the command of a rank.
        """
        if ranks and not MPIRUN.exists():
            pytest.skip("needs the extra [mpi]")
        launcher = [str(MPIRUN), "-n", str(ranks)] if ranks else []
        command = [*launcher, *through, sys.executable, "-m", "fedsim", "run", "tiny.toml", "--out", run, *arguments]
        self.started.append(Running(self.folder, command, self.folder / run, hold))
        return self.started[-1]

    def run(self, *arguments: str, ranks: int = 0, run: str = "run.h5", within: float = HANG) -> Ended:
        return self.start(*arguments, ranks=ranks, run=run).ended(within)

    def close(self) -> None:
        """Ends what a failed test left running."""
        for running in self.started:
            running.kill()


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real images (n, 8, 8) and their labels (n,)."""
    found = load_digits()
    return (found.images * 15.9).astype(np.uint8), found.target


def images(path: Path) -> None:
    """The images of the tiny job, as a user's own file."""
    x, y = digits()
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["x_test"], file["y_test"] = x[:1440], y[:1440], x[1440:], y[1440:]


def users(path: Path, sizes: tuple[int, ...]) -> Path:
    """Real digits of users with so many images each, and a test set."""
    (x, y), n = digits(), sum(sizes)
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["client"] = x[:n], y[:n], np.repeat(np.arange(len(sizes)), sizes)
        file["x_test"], file["y_test"] = x[n : n + 60], y[n : n + 60]
    return path


def of_users(path: Path, cohort: int) -> list[str]:
    """The tiny job on a user's own images."""
    fields = {"data.path": path, "partition.name": "natural", "partition.clients": 0, "partition.min_images": 1}
    return [word for key, value in (fields | {"cohort.size": cohort}).items() for word in ("--set", f"{key}={value}")]


@contextmanager
def signals_kept() -> Iterator[None]:
    """Gives this process its signal handlers back: a run has its own."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    handlers = [signal.getsignal(name) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, handlers, strict=True):
            signal.signal(name, handler)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of the folder but what a command says and Python compiles."""
    files = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts and path.name not in SAID]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


def rows(run: Path) -> int:
    """The last row; -2 where there is no run file yet."""
    try:
        return RunReader(run).rounds
    except BadInput:
        return -2


def hash_of(run: Path) -> str:
    """SHA-256 of the final weights; empty before the end."""
    with h5py.File(run, "r", locking=False) as file:
        return bytes(file.attrs["weights_sha256"]).decode().strip()


def measured(run: Path) -> dict[str, np.ndarray]:
    """All columns that say what a run found."""
    reader = RunReader(run, time.sleep)
    columns = {f"{group}/{name}": read(reader, name) for group, read in MEASURED.items() for name in reader.names(group)}
    return {name: column for name, column in columns.items() if name not in UNLIKE}


def assert_same(run: Path, reference: Path) -> None:
    """One run and one never stopped: the same weights, and the same rows."""
    assert RunReader(run).attributes["finished"]
    assert hash_of(run) == hash_of(reference) != ""
    found, expected = measured(run), measured(reference)
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


def assert_readable(run: Path, at_least: int) -> None:
    """Rows up to `at_least` and more are there, with numbers in them, and a checkpoint that is one row behind at most."""
    reader = RunReader(run)
    found, kept = reader.rounds, latest(folder_of(run), own=["own"])
    assert found >= at_least
    assert np.isfinite(reader.column("density")).sum() == found + 1
    assert np.isfinite(reader.column("train_loss"))[1:].all()
    assert kept is not None
    assert kept.round in (found - 1, found)
