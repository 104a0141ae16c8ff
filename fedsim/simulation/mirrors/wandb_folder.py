"""The rounds as an offline run of Weights & Biases; `wandb sync FOLDER/wandb/offline-run-*` sends it where it is wanted.

A run that goes on makes a further offline folder with the same id, and `wandb sync` joins them. Rounds that a folder has already are not
written again.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedsim.simulation.mirrors.rows import Described, Row
from fedsim.simulation.mirrors.tracker import keep_state, known_state

wandb: Any = import_module("wandb")  # its types would be checked for minutes
QUIET = ("silent", "disable_git", "disable_job_creation", "x_disable_stats", "x_disable_meta")  # what is not about the run is not kept


class WandbFolder:
    """An offline run. Its service writes to the disk by itself, some moments later."""

    def __init__(self, target: Path, run: Described, done: int, source: Path) -> None:
        self.target, self.described = target, run
        target.mkdir(exist_ok=True)
        known = known_state(target, run, done)
        self.last, self.id = known.get("last", -1), known.get("id", uuid4().hex[:8])
        about = {name: f"{text} ({unit})" for name, (unit, text) in run.columns.items()}
        self._run = wandb.init(
            mode="offline",
            dir=str(target),
            project="fedsim",
            name=run.name,
            id=self.id,
            resume="allow",
            config=run.job | {"fedsim": run.facts | {"job_sha256": run.job_sha256, "columns": about}},
            settings=wandb.Settings(**dict.fromkeys(QUIET, True), console="off", save_code=False),
        )

    def write(self, r: int, row: Row) -> None:
        self._run.log(row, step=r, commit=True)
        self.last = r

    def flush(self) -> None:
        keep_state(self.target, self.described, self.last, id=self.id)

    def close(self, run: Described) -> None:
        if run.weights_sha256:
            self._run.summary["weights_sha256"] = run.weights_sha256
        self._run.finish()
