"""What SLURM's own programs are asked: to take a job, which jobs there are, how one ended. Each is called once for all runs.

Only options that SLURM has had for ten years are used, since a site may have an old one: `squeue --format`, not `--json`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import BadInput
from fedsim.slurm.arrays import Limits

PATIENCE = 120.0  # seconds that an answer of SLURM may take
RETRIES = 300.0  # of sbatch, which tries again for two minutes where the site has as many jobs as it allows (MaxJobCount)
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_UMASK", "SLURM_DEBUG_FLAGS")  # what of SLURM_… is no mark of a job around this process
MARKS = ("SLURM_", "SLURMD_", "OMPI_COMM_", "PMIX_", "PMI_", "PRTE_LAUNCHED")
VARIABLES = {  # of sbatch's environment, which would win over the text: those whose option the text has are left out
    "account": "ACCOUNT", "array": "ARRAY_INX", "cpus-per-task": "CPUS_PER_TASK", "gres": "GRES", "job-name": "JOB_NAME",
    "mem": "MEM_PER_NODE", "open-mode": "OPEN_MODE", "output": "OUTPUT", "partition": "PARTITION", "qos": "QOS", "requeue": "REQUEUE",
    "no-requeue": "NO_REQUEUE", "signal": "SIGNAL", "time": "TIMELIMIT",
}  # fmt: skip
NEVER = ("SBATCH_WAIT", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE")
FORMAT = "%F|%K|%T|%N|%L|%r|%o"  # job or array, task, state, nodes, time left, reason, script
DETAILS = ("JobId", "ArrayJobId", "ArrayTaskId", "JobState", "Reason", "ExitCode", "NodeList", "Restarts")


class Refused(Exception):
    """SLURM did not do what it was asked; the message says why."""


class Silent(Refused):
    """SLURM gave no answer: whether it did what it was asked is not known."""


@dataclass(frozen=True)
class Queued:
    """A job or a task of an array that SLURM knows. left: time until its limit, as SLURM writes it."""

    job: str
    state: str
    nodes: str
    left: str
    reason: str
    script: str


@dataclass(frozen=True)
class End:
    """How a job ended, as SLURM says."""

    state: str  # TIMEOUT, FAILED, CANCELLED by 1000 …
    code: int = 0
    signal: int = 0
    nodes: str = ""
    reason: str = ""  # JobLaunchFailure, TimeLimit, NodeDown …


def limits() -> Limits | None:
    """What this site allows of job arrays; None where there is no SLURM to ask."""
    try:
        shown = _call("scontrol", "show", "config")
    except (Refused, FileNotFoundError):
        return None
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    tasks = re.search(r"^SchedulerParameters\s*=.*\bmax_array_tasks=(\d+)", shown, re.MULTILINE)
    return Limits(int(size[1]) if size else Limits().size, int(tasks[1]) if tasks and int(tasks[1]) else None)


def refuse_without_sbatch() -> None:
    """BadInput where this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise BadInput(
            "there is no sbatch on this machine: call `fedsim submit` on a login node of a cluster with SLURM. --dry-run prints what would"
            " be submitted; `fedsim sweep`, or `fedsim run` under mpirun, does the same runs on this machine"
        )


def sbatch(path: Path, here: Path) -> str:
    """The number of the job that the batch text at `path` becomes. Raises Refused."""
    environment = {name: value for name, value in _plain().items() if name not in NEVER}
    for option in re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(errors="replace"), re.MULTILINE):
        environment.pop(f"SBATCH_{VARIABLES.get(option, '')}", None)
    said = _call("sbatch", "--parsable", str(path), environment=environment, here=here, patience=RETRIES)
    number = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""
    if not number.isdigit():
        raise Silent(f"sbatch took {path}, and its answer is no number of a job: {said.strip()[:200]!r}")
    return number


def queued(user: str) -> dict[str, Queued]:
    """The jobs of a user that SLURM knows, also those that ended some minutes ago, by "12" or "12_3". Raises Refused."""
    shown = _call("squeue", "--noheader", "--array", "--states=all", f"--user={user}", f"--format={FORMAT}")
    found = {}
    for line in shown.splitlines():
        number, task, state, nodes, left, reason, script = (line.split("|", 6) + [""] * 7)[:7]
        job = f"{number}_{task}" if task.isdigit() else number
        found[job] = Queued(job, state, nodes, left, reason, script.strip())
    return found


def ends(jobs: Sequence[str]) -> dict[str, End]:
    """How jobs ended, by "12" or "12_3", as far as SLURM still knows: from its memory, which lasts minutes, and from its accounts."""
    found: dict[str, End] = {}
    for number in dict.fromkeys(job.partition("_")[0] for job in jobs):
        try:
            found |= _remembered(_call("scontrol", "--oneliner", "show", "job", number))
        except (Refused, FileNotFoundError):
            continue
    if missing := [job for job in jobs if job not in found]:
        found |= _accounted(missing)
    return found


def _remembered(shown: str) -> dict[str, End]:
    found = {}
    for line in shown.splitlines():
        fields = {name: value for name in DETAILS if (value := _field(line, name))}
        task = fields.get("ArrayTaskId", "")
        job = f"{fields.get('ArrayJobId', '')}_{task}" if task.isdigit() else fields.get("JobId", "")
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        found[job] = End(fields.get("JobState", ""), _number(code), _number(number), fields.get("NodeList", ""), fields.get("Reason", ""))
    return found


def _accounted(jobs: Sequence[str]) -> dict[str, End]:
    """From sacct, where the site keeps accounts."""
    numbers = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    try:
        shown = _call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={numbers}", "--format=JobID,State,ExitCode,NodeList")
    except (Refused, FileNotFoundError):
        return {}
    rows = [line.split("|") for line in shown.splitlines() if line.count("|") == 3]
    ended = {job: End(state, _number(code.partition(":")[0]), _number(code.partition(":")[2]), nodes) for job, state, code, nodes in rows}
    return {job: ended[job] for job in jobs if job in ended}


def _field(line: str, name: str) -> str:
    match = re.search(rf"(?:^|\s){name}=(\S*)", line)
    return match[1] if match else ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < 10 else 0


def _plain() -> dict[str, str]:
    """The environment without the marks of a job or a launcher around this process, which a new job would inherit."""
    return {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(MARKS)}


def _call(*command: str, environment: dict[str, str] | None = None, here: Path | None = None, patience: float = PATIENCE) -> str:
    """What a program of SLURM says. Raises Refused, with its own words, and FileNotFoundError where there is none."""
    try:
        ended = subprocess.run(
            command,
            env=(environment or _plain()) | {"SLURM_TIME_FORMAT": "standard"},
            cwd=here,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Silent(f"{command[0]} gave no answer for {patience:.0f} seconds") from None
    if ended.returncode:
        raise Refused(ended.stderr.strip() or f"{command[0]} ended with exit code {ended.returncode}")
    return ended.stdout
