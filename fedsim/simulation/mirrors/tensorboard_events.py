"""The rounds as TensorBoard's event files: `tensorboard --logdir FOLDER`. TensorBoard keeps scalars as float32."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.simulation.mirrors.rows import Described, Row
from fedsim.simulation.mirrors.tracker import keep_state, known_state

events: Any = import_module("tensorboard.compat.proto.event_pb2")  # it has no types
summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
hyperparameters: Any = import_module("tensorboard.plugins.hparams.summary_v2")
scalars: Any = import_module("tensorboard.plugins.scalar.metadata")
texts: Any = import_module("tensorboard.plugins.text.metadata")
tensors: Any = import_module("tensorboard.util.tensor_util")
files: Any = import_module("tensorboard.summary.writer.event_file_writer")


class TensorboardEvents:
    """A file of its own for each start of the run; it says from which round on what earlier files hold is void."""

    def __init__(self, target: Path, run: Described, done: int, source: Path) -> None:
        self.target, self.run = target, run
        target.mkdir(exist_ok=True)
        self.last = min(done, known_state(target, run, done).get("last", -1))
        self._writer = files.EventFileWriter(str(target))
        begun = events.SessionLog(status=events.SessionLog.START)
        self._writer.add_event(events.Event(wall_time=time.time(), step=self.last + 1, session_log=begun))
        if self.last < 0:
            self._add(hyperparameters.hparams_pb(run.fields, trial_id=run.name), 0)

    def write(self, r: int, row: Row) -> None:
        values = summaries.Summary()
        for name, value in row.items():
            unit, about = self.run.columns.get(name, ("", ""))
            text = f"{about} ({unit})" if unit not in ("", "1") else about
            values.value.add(tag=name, simple_value=value, metadata=scalars.create_summary_metadata(name, text))
        self._add(values, r)
        self.last = r

    def flush(self) -> None:
        self._writer.flush()
        keep_state(self.target, self.run, self.last)

    def close(self, run: Described) -> None:
        if run.weights_sha256:
            about = texts.create_summary_metadata("weights_sha256", "SHA-256 of the final model")
            value = summaries.Summary.Value(tag="weights_sha256", metadata=about)
            value.tensor.CopyFrom(tensors.make_tensor_proto(run.weights_sha256))
            self._add(summaries.Summary(value=[value]), self.last)
        self._writer.close()

    def _add(self, values: Any, step: int) -> None:
        self._writer.add_event(events.Event(wall_time=time.time(), step=step, summary=values))
