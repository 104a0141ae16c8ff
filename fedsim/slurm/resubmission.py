"""`fedsim submit --status FOLDER --resubmit`: runs that failed, stopped or were lost are submitted again, and no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import job_file
from fedsim.errors import BadInput
from fedsim.slurm import queue, records
from fedsim.slurm.options import options_of
from fedsim.slurm.status import Status
from fedsim.slurm.submission import Part, PartlyRefused, Sending, Submission, Wanted, working_folder


def resubmit(status: Status, given: Mapping[str, Any], defaults: Mapping[str, Any], dry_run: bool = False) -> Submission:
    """Submits the runs that `status.again` names, each with the options of its last submission; what is `given` now wins over these.

    defaults: of the site, for runs that were never submitted. The jobs are those that were submitted first, whatever became of their
    files. Raises BadInput and PartlyRefused.
    """
    if status.silent:
        raise BadInput(f"SLURM does not answer ({status.silent}): which runs wait or run cannot be seen, so none is submitted again")
    if "array" in given:
        raise BadInput("--resubmit submits what failed, stopped or was lost; --array chooses among the runs of a new submission")
    if not dry_run:
        queue.refuse_without_sbatch()
    parts: list[Part] = []
    for (title, here, former), names in _groups(status).items():
        options = options_of(json.loads(former) if former else defaults, given)
        wanted = [Wanted(name, _rounds(status, name)) for name in names]
        try:
            made = Sending(status.ledger, options, title, {}, dry_run, Path(here)).send(wanted)
        except PartlyRefused as error:
            raise PartlyRefused(str(error), Submission(status.ledger.folder, (*parts, *error.submission.parts))) from None
        parts += made.parts
    return Submission(status.ledger.folder, tuple(parts))


def _groups(status: Status) -> dict[tuple[str, str, str], list[str]]:
    """The runs of each (title, folder of the call, options as JSON); options are empty for runs that were never submitted."""
    found: dict[tuple[str, str, str], list[str]] = {}
    ledger = status.ledger
    for name in status.again:
        key = (ledger.folder.absolute().name or "fedsim", str(working_folder()), "")
        if entry := ledger.runs.get(name):
            former = ledger.submissions[entry.submission]
            options = {option: value for option, value in former.options.items() if option != "array"}
            title = former.name if former.tasks is not None else ledger.folder.absolute().name or "fedsim"
            key = (title, former.here, json.dumps(options, sort_keys=True))
        found.setdefault(key, []).append(name)
    return found


def _rounds(status: Status, name: str) -> int:
    path = status.ledger.slurm / records.JOBS / f"{name}.toml"
    rounds = job_file.read_table(path).get("rounds")
    if type(rounds) is not int:
        raise BadInput(f"{path} is damaged: it has no rounds; submit its job again")
    return rounds
