"""The trackers that a job can name, where each writes, and what its process sees of the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

DROPPED = ("MLFLOW_", "WANDB_")  # settings of a user that could lead to a server


@dataclass(frozen=True)
class Place:
    """A tracker: the module and the class that write, the ending of the path beside RUN.h5, and variables of its process."""

    module: str
    kind: str
    ending: str
    environment: dict[str, str] = field(default_factory=dict)

    def path(self, out: Path) -> Path:
        return out.with_name(f"{out.name}.{self.ending}")


PLACES = {
    "csv": Place("csv_table", "CSVTable", "csv"),
    "tensorboard": Place("tensorboard_events", "TensorboardEvents", "tensorboard"),
    "mlflow": Place("mlflow_store", "MlflowStore", "mlflow", {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}),
    "wandb-offline": Place("wandb_folder", "WandbFolder", "wandb", {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}),
}


def environment(name: str, out: Path) -> dict[str, str]:
    """The variables of the process of a tracker. Libraries keep their own settings and caches beside the run, not at home."""
    place = PLACES[name]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED)}
    folders = {f"WANDB_{part}_DIR": str(place.path(out).absolute() / "library") for part in ("CACHE", "CONFIG", "DATA")}
    return kept | {"DO_NOT_TRACK": "1"} | place.environment | (folders if name == "wandb-offline" else {})
