"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
FOREIGN = ("SLURM", "SBATCH", "OMPI_", "PMIX_", "PRTE_")  # variables of an allocation or a launcher around the tests
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where distributions put daemons
NODES = ("one", "two")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    code: int
    nodes: str
    out: str
    restarts: int


@dataclass(frozen=True)
class Cluster:
    """Two nodes of two CPUs each; `folder` holds its configuration, logs and the output of its jobs."""

    folder: Path
    environment: dict[str, str]
    slurmds: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # by node

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a SLURM command writes to its standard output."""
        ended = subprocess.run(command, env=self.environment | variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout

    def submit(self, script: Path, *options: str, cwd: Path, **variables: str) -> str:
        """The number of the job that `script` becomes, submitted from `cwd` with `variables` in the environment."""
        return self.call("sbatch", "--parsable", f"--output={self._out('%j')}", *options, str(script), cwd=cwd, **variables).strip()

    def fields_of(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, NodeList …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", job)))

    def wait(self, job: str, seconds: float = 120) -> Ended:
        """How the job ended, once it has."""
        until(lambda: self.fields_of(job)["JobState"] in OVER, seconds, self.logs)
        fields = self.fields_of(job)
        return Ended(
            fields["JobState"], int(fields["ExitCode"].split(":")[0]), fields["NodeList"], self.out_of(job), int(fields["Restarts"])
        )

    def out_of(self, job: str) -> str:
        """What the job has written so far."""
        path = self._out(job)
        return path.read_text() if path.exists() else ""

    def lose(self, node: str) -> None:
        """The node dies: its slurmd and all processes of jobs on it are killed, and SLURM learns it at once."""
        daemon = self.slurmds.pop(node)
        daemon.kill()
        daemon.wait()
        for process in _of_jobs_on(node, self.folder):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def start(self, node: str) -> None:
        """Starts the slurmd of a node."""
        self.slurmds[node] = _start(self, "slurmd", "-D", "-N", node)

    def mend(self, node: str) -> None:
        """A node that was lost is back."""
        self.start(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def logs(self) -> str:
        """The ends of what daemons and jobs have written."""
        files = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def _out(self, job: str) -> Path:
        return self.folder / f"slurm-{job}.out"


def missing() -> list[str]:
    """The programs of SLURM that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def until(true: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    """Waits for `true`, and fails with what `otherwise` says."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


@contextmanager
def started(folder: Path, **more: object) -> Iterator[Cluster]:
    """The cluster, up and idle; every daemon and every job of it is gone afterwards. more: settings of slurm.conf."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    cluster = Cluster(folder, environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH})
    _configure(folder, more)
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(cluster, "munged", "--foreground", "--force", *_munge_files(folder)))
        until((folder / "munge.socket").exists, 60, cluster.logs)
        daemons.enter_context(_daemon(cluster, "slurmctld", "-D"))
        daemons.callback(lambda: [_stop(process) for process in cluster.slurmds.values()])
        for node in NODES:
            cluster.start(node)
        until(lambda: _idle(cluster), 60, cluster.logs)
        daemons.callback(_clear, cluster)
        yield cluster


def _idle(cluster: Cluster) -> bool:
    shown = subprocess.run(["scontrol", "show", "nodes"], env=cluster.environment, capture_output=True, text=True, check=False)
    return re.findall(r"State=(\S+)", shown.stdout) == ["IDLE"] * len(NODES)


def _clear(cluster: Cluster) -> None:
    """Ends what a failed test left running, while there are daemons that can."""
    cluster.call("scancel", f"--user={getpass.getuser()}")
    until(lambda: not cluster.call("squeue", "--noheader"), 60, cluster.logs)


@contextmanager
def _daemon(cluster: Cluster, name: str, *arguments: str) -> Iterator[None]:
    process = _start(cluster, name, *arguments)
    try:
        yield
    finally:
        _stop(process)


def _start(cluster: Cluster, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [shutil.which(name, path=PATH) or name, *arguments]
    with (cluster.folder / f"{name}.err.log").open("a") as errors:
        return subprocess.Popen(command, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _of_jobs_on(node: str, folder: Path) -> set[int]:
    """The processes of jobs on one node of the cluster in `folder`: each slurmstepd of that node, and all below it.

    A slurmstepd does not say its node, but the process that it started for a task does.
    """
    parents, found = dict(_parents()), set[int]()
    for process, parent in parents.items():
        with suppress(OSError):
            begun_with = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            steps = Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd"
            if steps and {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={folder}/slurm.conf".encode()} <= set(begun_with):
                found.add(parent)
    while below := {process for process, parent in parents.items() if parent in found} - found:
        found |= below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of this machine, and its parent."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _munge_files(folder: Path) -> list[str]:
    """Options that keep munged, its key too, inside `folder`."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder / f'munge.{name}'}" for option, name in names.items()]


def _configure(folder: Path, more: Mapping[str, object]) -> None:
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    port, *ports = _free_ports(1 + len(NODES))
    here = "NodeHostname=localhost NodeAddr=127.0.0.1 CPUs=2"
    nodes = [f"NodeName={node} {here} Port={port}" for node, port in zip(NODES, ports, strict=True)]
    user = getpass.getuser()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",  # seconds, the least; a requeued job waits for more
        "ProctrackType": "proctrack/linuxproc",  # neither cgroups nor a service manager: it runs in a container
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # each node says two CPUs, whatever the machine has
        "ReturnToService": 2,
        "JobRequeue": 1,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerParameters": "sched_interval=2,bf_interval=2",  # seconds
        "KillWait": 20,
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool.%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.%n.log",
    }
    lines = [f"{name}={value}" for name, value in (settings | dict(more)).items()]
    partitions = ("all Default=YES", "grace GraceTime=60", "urgent PriorityTier=10 PreemptMode=OFF")  # a job in the last preempts others
    parts = [f"PartitionName={partition} Nodes=ALL State=UP" for partition in partitions]
    (folder / "slurm.conf").write_text("\n".join([*lines, *nodes, *parts, ""]))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
