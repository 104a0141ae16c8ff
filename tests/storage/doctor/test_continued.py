"""A run that was mended goes on, and ends with the weights of a run to which nothing happened."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_job import small_job

import fedsim
from fedsim.storage.checkpoint import folder_of
from fedsim.storage.doctor.command import doctor


def stopped_after(job: Path, out: Path, last: int) -> None:
    fedsim.run(str(job), out=out, callback=lambda finished: finished.stop() if finished.round == last else None)


def test_a_mended_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file lost, its newest checkpoint damaged, and at the end its final weights."""
    monkeypatch.chdir(tmp_path)
    job, out = tmp_path / "job.toml", tmp_path / "run.h5"
    job.write_text(small_job(4, evaluate={"every": 1}))
    whole = fedsim.run(str(job), out=tmp_path / "whole.h5")
    stopped_after(job, out, 2)
    newest = max(folder_of(out).glob("*.state.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-4])
    out.unlink()
    said = io.StringIO()
    assert doctor(out, True, Console(file=said, width=200)) == 0, said.getvalue()
    assert "the checkpoint of round 2 was put aside" in said.getvalue()
    again = fedsim.run(str(job), out=out)
    assert again.attributes["weights_sha256"] == whole.attributes["weights_sha256"]
    assert again.attributes["mended"] == "all that was measured in rounds 0 to 1"
    np.testing.assert_array_equal(again.column("accuracy"), [np.nan, np.nan, *whole.column("accuracy")[2:]])
    content = out.read_bytes()
    out.write_bytes(content[: int(0.99 * len(content))])
    assert doctor(out, True, Console(quiet=True)) == 0
    assert fedsim.run(str(job), out=out).attributes["weights_sha256"] == whole.attributes["weights_sha256"]
