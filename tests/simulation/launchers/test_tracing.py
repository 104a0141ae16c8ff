"""`fedsim run --trace`: what every rank did when, in a form that Perfetto reads; the run itself stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launchers import launcher
from processes import environment
from small_job import small_job

import fedsim
from fedsim.core import trace
from fedsim.errors import BadInput
from fedsim.simulation.launchers import tracing

ROUNDS = 2


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.toml"
    path.write_text(small_job(ROUNDS, evaluate={"every": 1}))
    return path


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return (
        inner["pid"] == outer["pid"] and outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.2
    )  # microseconds, rounded to tenths


def test_one_process_writes_its_rounds_and_what_it_does_beside_them(job: Path) -> None:
    traced = fedsim.run(job, out="traced.h5", progress=False, trace="trace.json")
    plain = fedsim.run(job, out="plain.h5", progress=False)
    assert traced.attributes["weights_sha256"] == plain.attributes["weights_sha256"]
    found = spans(Path("trace.json"))
    for name in ("method", "evaluate", "row", "record", "checkpoint"):
        assert [event["args"]["r"] for event in found if event["name"] == name] == list(range(ROUNDS + 1))
    rounds = [event for event in found if event["name"] == "method"]
    trained = [event for event in found if event["name"] == "Train"]
    assert {event["args"]["r"] for event in trained} == set(range(1, ROUNDS + 1))
    assert all(inside(event, rounds[event["args"]["r"]]) for event in trained)
    assert {event["tid"] for event in found if event["name"] in ("record", "checkpoint")} == {1}
    assert min(event["ts"] for event in found) == 0
    assert trace.span("after the run") is trace.NOTHING


@pytest.mark.processes
def test_rank_0_writes_what_all_ranks_did(job: Path) -> None:
    command = [*launcher("openmpi").command(3), sys.executable, "-m", "fedsim", "run", str(job), "--out", "run.h5", "--trace", "trace.json"]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    found = spans(Path("trace.json"))
    assert {event["pid"] for event in found if event["name"] == "Train"} == {1, 2}
    assert {event["pid"] for event in found if event["name"] == "wait for an order"} == {1, 2}
    assert {event["pid"] for event in found if event["name"] in ("method", "collect replies", "record")} == {0}
    asked = [event for event in found if event["name"] == "method"]
    for event in found:
        if event["name"] == "Train":  # one clock for all ranks of a machine
            assert any(each["ts"] - 1000 <= event["ts"] and event["ts"] + event["dur"] <= each["ts"] + each["dur"] + 1000 for each in asked)
    copied = {event["args"]["r"]: event["ts"] for event in found if event["name"] == "copy for the record"}
    sent = [(event["ts"], event["ts"] + event["dur"]) for event in found if event["name"] == "send"]
    for event in found:  # a row is written when the others are at work, not while they wait for an order; the last when all is done
        if event["name"] == "record" and event["args"]["r"] < max(copied):
            assert any(copied[event["args"]["r"]] < begin and end <= event["ts"] for begin, end in sent)
    names = {
        event["pid"]: event["args"]["name"]
        for event in json.loads(Path("trace.json").read_text())["traceEvents"]
        if event["ph"] == "M" and event["name"] == "process_name"
    }
    assert [names[rank].partition(" on ")[0] for rank in range(3)] == ["rank 0", "rank 1", "rank 2"]
    assert names[0].endswith("the server")


def test_a_run_that_is_stopped_or_fails_writes_what_it_did(job: Path) -> None:
    fedsim.run(job, out="run.h5", progress=False, trace="trace.json", callback=lambda finished: finished.stop())
    assert [event["args"]["r"] for event in spans(Path("trace.json")) if event["name"] == "method"] == [0]

    def fails(finished: Any) -> None:
        raise LookupError(finished.round)

    with pytest.raises(LookupError, match="1"):
        fedsim.run(job, out="run.h5", progress=False, trace="trace.json", callback=fails)
    assert [event["args"]["r"] for event in spans(Path("trace.json")) if event["name"] == "method"] == [1]
    assert trace.span("after the run") is trace.NOTHING


def test_places_where_no_trace_can_be_are_refused_and_left_alone(job: Path) -> None:
    Path("notes.json").write_text('{"mine": 1}')
    Path("folder").mkdir()
    wrong = {
        "run.h5": "this is the run file; give the trace a name of its own, such as run.json",
        "folder": "this is a folder; give a file, such as folder/trace.json",
        "absent/trace.json": "there is no folder absent",
        "notes.json": "this file is no trace, and is not replaced",
    }
    for name, message in wrong.items():
        with pytest.raises(BadInput, match=f"--trace {name}: {message}"):
            fedsim.run(job, out="run.h5", progress=False, trace=name)
    assert Path("notes.json").read_text() == '{"mine": 1}'
    assert not Path("run.h5").exists()
    assert trace.span("after the run") is trace.NOTHING


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(job: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(BadInput, match=r"--trace locked/trace.json: no permission to write there"):
        fedsim.run(job, out="run.h5", progress=False, trace="locked/trace.json")


def test_a_disk_that_takes_no_trace_does_not_harm_the_run(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(self: Path, *_: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    run = fedsim.run(job, out="run.h5", progress=False, trace="trace.json")
    assert run.attributes["finished"]
    assert capsys.readouterr().err == "the trace trace.json is not written: No space left on device\n"


def test_a_long_run_says_how_many_spans_it_leaves_out(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST", 5)
    fedsim.run(job, out="run.h5", progress=False, trace="trace.json")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert len(spans(Path("trace.json"))) == 5
    (label,) = (event["args"]["labels"] for event in events if event["name"] == "process_labels")
    assert label.endswith(" later spans are left out")
    assert int(label.split()[0]) > 5
    assert tracing.BEGINNING in Path("trace.json").read_text()


@pytest.mark.processes
def test_ranks_that_are_stopped_together_are_all_in_the_trace(job: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "fedsim",
        "run",
        str(job),
        "--out",
        "run.h5",
        "--trace",
        "trace.json",
        "--set",
        "execution.time_limit=1e-3",
    ]
    words += ["--set", "rounds=500"]
    ended = subprocess.run([*launcher("openmpi").command(3), *words], env=environment(), capture_output=True, timeout=300, check=False)
    assert ended.returncode == 3, ended.stderr
    assert {event["pid"] for event in spans(Path("trace.json"))} == {0, 1, 2}


def test_times_are_those_of_the_machine() -> None:
    """Two machines have other clocks for their processes, and nearly the same time of day."""
    noted = trace.Trace(lambda: 0.0, [trace.Span("row", 2.0, 0.5, "MainThread", {})])
    (event,) = (event for event in tracing._events(noted, 100.0, 1) if event["ph"] == "X")
    assert (event["ts"], event["dur"], event["pid"]) == (102e6, 0.5e6, 1)
