"""The rounds as a run in a store of MLflow's files, which `mlflow ui --backend-store-uri FOLDER` shows.

MLflow keeps such stores in maintenance: it opens them where MLFLOW_ALLOW_FILE_STORE is true. Its other stores are data bases, and need
sqlalchemy and a disk with locks that work, or a server.
"""

from __future__ import annotations

import re
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.simulation.mirrors.rows import Described, Row

mlflow: Any = import_module("mlflow")  # its types would be checked for minutes
entities: Any = import_module("mlflow.entities")

TAG = "fedsim.job_sha256"
LONGEST = 6000  # signs of a parameter
MOST = 100  # parameters of one call
FOREIGN = re.compile(r"[^\w.\- /]")  # signs that no name may have


class MlflowStore:
    """A run of the store, found again by its job where the run goes on. Metrics that it has already are not written again."""

    def __init__(self, target: Path, run: Described, done: int, source: Path) -> None:
        self.client = mlflow.MlflowClient(tracking_uri=target.absolute().as_uri())
        self._experiment = self._experiment_of(run.name)
        found = self._found(run) if done >= 0 else None
        self.id = found or self._begun(run)
        self.client.update_run(self.id, status="RUNNING")
        self._held = {name: self._last_of(name) for name in self.client.get_run(self.id).data.metrics}
        self.last = min(done, *self._held.values()) if self._held else -1

    def write(self, r: int, row: Row) -> None:
        now = int(1000 * time.time())
        named = {FOREIGN.sub("_", name): value for name, value in row.items()}
        fresh = [entities.Metric(name, value, now, r) for name, value in named.items() if r > self._held.get(name, -1)]
        self.client.log_batch(self.id, metrics=fresh)
        self._held |= {metric.key: r for metric in fresh}
        self.last = r

    def flush(self) -> None:
        """Each call writes to the disk."""

    def close(self, run: Described) -> None:
        if run.weights_sha256:
            self.client.set_tag(self.id, "fedsim.weights_sha256", run.weights_sha256)
        self.client.set_terminated(self.id, "FINISHED" if run.weights_sha256 else "KILLED")

    def _experiment_of(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self.client.create_experiment(name))

    def _found(self, run: Described) -> str | None:
        found = self.client.search_runs([self._experiment], f"tags.`{TAG}` = '{run.job_sha256}'", max_results=1)
        return found[0].info.run_id if found else None

    def _begun(self, run: Described) -> str:
        """A new run with its job as parameters; its note has the unit of each metric."""
        note = "\n".join(f"- `{name}` ({unit}): {about}" for name, (unit, about) in run.columns.items())
        tags = {TAG: run.job_sha256, "mlflow.note.content": note} | {f"fedsim.{name}": value for name, value in run.facts.items()}
        made: str = self.client.create_run(self._experiment, tags=tags, run_name=run.name).info.run_id
        fields = [entities.Param(FOREIGN.sub("_", name), str(value)[:LONGEST]) for name, value in run.fields.items()]
        for begin in range(0, len(fields), MOST):
            self.client.log_batch(made, params=fields[begin : begin + MOST])
        return made

    def _last_of(self, name: str) -> int:
        return max(metric.step for metric in self.client.get_metric_history(self.id, name))
