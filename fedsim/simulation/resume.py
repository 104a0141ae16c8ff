"""Where a run begins: afresh, where its last checkpoint stands, or nowhere because it has ended."""

from __future__ import annotations

import json
import socket
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.config import own_code
from fedsim.config.job_file import flat
from fedsim.core.serialization import dump
from fedsim.errors import BadInput, NoRoom
from fedsim.federated import verbs
from fedsim.fleet.plan import Plan
from fedsim.fleet.received_masks import ReceivedMasks
from fedsim.simulation.devices.rules import table
from fedsim.simulation.experiment import Experiment
from fedsim.simulation.planning import roofline
from fedsim.storage import checkpoint
from fedsim.storage.checkpoint import Checkpoint, folder_of
from fedsim.storage.known_classes import KnownClasses
from fedsim.storage.layout import COUNTS_UP_TO, FORMAT, RENAMED
from fedsim.storage.places.scratch import Scratch
from fedsim.storage.reader import RunReader
from fedsim.storage.run_lock import Lease
from fedsim.storage.writer import RunWriter


@dataclass
class RunStart:
    """The run file, and the checkpoint to continue from or the method's first state."""

    out: Path
    checkpoint: Checkpoint | None = None
    finished: bool = False
    lease: Lease | None = None
    scratch: Scratch | None = None  # where the run is written, if not at `out`
    first_state: Any = None  # the method's state before round 0; None where the run continues or is finished

    def take_state(self) -> Any:
        """The method's first state, handed over: it is not referred to here any more, so that its memory can be freed."""
        state, self.first_state = self.first_state, None
        return state

    @property
    def folder(self) -> Path:
        return folder_of(self.path)

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.scratch.path if self.scratch else self.out

    @property
    def round(self) -> int:
        """The last round that is done; -1: none."""
        return -1 if self.checkpoint is None else self.checkpoint.round

    @property
    def plan(self) -> Plan | None:
        """The plan that the run began with."""
        return None if self.checkpoint is None else Plan.of(self.checkpoint.extra["plan"])

    def check(self) -> None:
        """CannotWrite where another run writes the file by now."""
        if self.lease:
            self.lease.check()

    def record(self, parts: Experiment, plan: Plan, hosts: list[str]) -> RunWriter:
        """The run file, open for the next row."""
        if self.checkpoint is not None:
            return RunWriter.resume(self.path, self.round, where(parts, plan, hosts))
        counts = parts.population.counts()
        layers = [layer.name for layer in parts.model_profile.layers]
        attributes = describe(parts, plan, hosts)
        clients, called = parts.setting.clients, parts.population.names
        kinds = parts.devices.mix.kind_of(parts.job.seed, np.arange(clients)) if parts.devices and clients <= COUNTS_UP_TO else None
        made = RunWriter.create(self.path, attributes=attributes, layers=layers, clients=clients, counts=counts, called=called, kinds=kinds)
        try:
            checkpoint.keep_beginning(self.folder, self.path)
        except (BadInput, NoRoom):
            made.discard()
            raise
        return made


def find_start(parts: Experiment, out: Path, resume: str) -> RunStart:
    """Looks at what stands at `out`. BadInput: a run that `resume` does not allow, of another job, on another partition, or that the
    method refuses."""
    if out.is_dir():
        raise BadInput(f"--out {out} is a folder; it must be the file to write, for example {out / f'{parts.job.name}.h5'}")
    folder, aside = folder_of(out), out.with_name(out.name + ".new")
    if aside.is_dir():
        raise BadInput(f"{aside} is a folder, and {out} needs a file of this name; remove it, or choose another --out")
    if not out.exists():
        if resume == "must":
            raise BadInput(f"--resume must: there is no run file {out}")
        checkpoint.check_writable(folder)
        checkpoint.clear(folder)
        return _start_afresh(parts, out)
    aside.unlink(missing_ok=True)  # a copy that a kill left behind
    known = RunReader(out).attributes
    _same_job(parts, out, known, resume)
    if known["finished"]:
        return RunStart(out, finished=True)
    checkpoint.check_writable(folder)
    found = checkpoint.latest(folder, parts.site.device, _check, own_code.modules(parts.job))
    if found is not None and found.extra["job_sha256"] != parts.identity:
        raise BadInput(f"the checkpoints in {folder} are not of the run in {out}; choose another --out, or remove both to start afresh")
    if found is None:
        _abandon(out, known["rounds"], folder)
        return _start_afresh(parts, out)
    return RunStart(out, found)


def _check(found: Checkpoint) -> None:
    """ValueError where a checkpoint is whole, and not what this fedsim goes on from."""
    extra = found.extra
    if not isinstance(extra, dict) or not {"plan", "job_sha256"} <= extra.keys():
        raise ValueError("it does not say its plan and its job")
    Plan.of(extra["plan"])
    if not (isinstance(found.state, tuple) and len(found.state) in (2, 3) and isinstance(found.state[1], ReceivedMasks)):
        raise ValueError("it does not hold the state of a method and the masks of its clients")


def _start_afresh(parts: Experiment, out: Path) -> RunStart:
    """The method's first state is made before anything is measured or written: it may refuse the job."""
    state, own = verbs.init(parts.method, parts.setting, parts.population.public()), own_code.modules(parts.job)
    if own:
        try:
            KnownClasses(own).check(dump(state)[0])
        except ValueError as error:
            raise BadInput(f"a checkpoint of this run could not be read: {error}") from error
    return RunStart(out, first_state=state)


def _abandon(out: Path, rounds: int, folder: Path) -> None:
    """Removes a run file that was killed before its first checkpoint; BadInput where rounds would be lost with it."""
    if rounds > 0:
        raise BadInput(
            f"{out} holds {rounds} rounds, but the checkpoints to go on from are gone from {folder};"
            f" put them back, choose another --out, or remove {out} to start afresh"
        )
    out.unlink()


def _same_job(parts: Experiment, out: Path, known: dict[str, Any], resume: str) -> None:
    check_format(out, known)
    if known.get("job_sha256") != parts.identity:
        method, seed, planned = (known.get(name, "?") for name in ("method", "seed", "rounds_planned"))
        found = differences(RunReader(out).job, parts.resolved)
        about = f"{method}, seed {seed}, {max(known['rounds'], 0)} of {planned} rounds; {found}"
        only_rounds = found == f"there rounds = {planned}, here {parts.job.rounds}"
        why = f", and --extend {out} takes its rounds over where no schedule or method follows their number" if only_rounds else ""
        raise BadInput(f"{out} already holds another job ({about}). Choose another --out{why}")
    if resume == "never":
        raise BadInput(f"{out} already holds this job; leave out --resume never to go on with it, or choose another --out")
    same_run(parts, out, known)


def same_run(parts: Experiment, out: Path, known: Mapping[str, Any]) -> None:
    """BadInput where a run file, whose attributes are `known`, was made by other code, devices, images or another partition."""
    if known.get("own_code_sha256", "") != own_code.digest(parts.job):
        own = " or ".join(own_code.names(parts.job)) or "its method, model or data set"
        raise BadInput(f"{out} was made by other code of {own}; choose another --out, or remove it to start afresh")
    if parts.devices and known.get("devices") != table(parts.devices.mix):
        raise BadInput(f"{out} was made with other figures of devices than {parts.job.devices.name} has now; choose another --out")
    if known.get("partition_sha256") != parts.population.sha256:
        raise BadInput(f"{out} was made on another partition of the data than this job gives here; is it the same data set?")
    if known.get("data_sha256", parts.population.data_sha256) != parts.population.data_sha256:
        raise BadInput(f"{out} was made on other images or labels than this job finds here; put these back, or choose another --out")


def check_format(out: Path, known: Mapping[str, Any]) -> None:
    """BadInput where the run file, whose attributes are `known`, has an older format than the one written here."""
    if known["format_version"] < RENAMED:
        raise BadInput(
            f"{out} was written by fedsim {known.get('fedsim_version')} in format {known['format_version']}: this fedsim reads it, but"
            f" cannot continue it (it writes format {FORMAT}); choose another --out"
        )


def differences(theirs: dict[str, Any], mine: str) -> str:
    """In which fields two resolved jobs differ."""
    one, other = flat(theirs), flat(tomllib.loads(mine))
    fields = [key for key in sorted(one | other) if one.get(key) != other.get(key) and not key.startswith(("execution.", "record."))]
    return ", ".join(f"there {key} = {one.get(key)!r}, here {other.get(key)!r}" for key in fields[:3]) + (" …" if len(fields) > 3 else "")


def describe(parts: Experiment, plan: Plan, hosts: list[str]) -> dict[str, Any]:
    """The attributes of a new run file."""
    return {
        "fedsim_version": version("fedsim"),
        "git_commit": _commit(),
        "job": parts.resolved,
        "job_sha256": parts.identity,
        "plan": plan.text(),
        "own_code_sha256": own_code.digest(parts.job),
        "seed": parts.job.seed,
        "method": parts.job.method.name,
        **where(parts, plan, hosts),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "partition": json.dumps(parts.population.record, sort_keys=True),
        "partition_sha256": parts.population.sha256,
        "data_sha256": parts.population.data_sha256,
        "rounds_planned": parts.job.rounds,
        **({"devices": table(parts.devices.mix)} if parts.devices else {}),
    }


def where(parts: Experiment, plan: Plan, hosts: list[str]) -> dict[str, Any]:
    """The attributes that a resumed run brings up to date; the peaks are those of one rank, per second."""
    peaks = roofline.peaks(parts.site.device, plan.dtype)
    facts = {"ranks": len(hosts), "hosts": ",".join(sorted(set(hosts))), "torch_version": str(torch.__version__)}
    return facts | {"peak_flops": peaks.flops, "peak_bytes": peaks.bytes}


def host() -> str:
    return socket.gethostname()


def _commit() -> str:
    """The commit of fedsim's own checkout; empty when it was installed from a package."""
    where = Path(__file__).resolve().parents[1]
    if not (where.parent / ".git").exists():
        return ""
    found = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()
