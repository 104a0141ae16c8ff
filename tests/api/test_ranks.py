"""`mpirun python script.py`: the same weights as everywhere, and every rank returns or ends, whatever goes wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fedsim

RANKS = 3
RANK = """
import os
import sys
from pathlib import Path

import fedsim

rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
"""
STOPPING = f"""
import json
{RANK}
seen, weights = [], []


def watch(finished):
    seen.append(finished.round)
    weights.append(float(sum(value.detach().double().sum() for value in finished.model().parameters())))
    if finished.round == 1:
        finished.stop()


def state(run):
    return [run.rounds, bool(run.attributes["finished"]), run.attributes["weights_sha256"]]


stopped = state(fedsim.run("small.toml", out="two.h5", callback=watch, progress=False))
continued = state(fedsim.run("small.toml", out="two.h5", callback=watch, progress=False))
Path(f"rank{{rank}}.json").write_text(json.dumps([stopped, continued, seen, weights]))
"""


def outcomes(folder: Path, ranks: int) -> list[Any]:
    """What each rank of STOPPING wrote."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.processes
def test_command_script_and_ranks_give_the_same_weights_also_after_a_stop(folder: Any) -> None:
    """A stop by the callback ends the run on all ranks as usual, and the same script continues it."""
    assert folder.command(sys.executable, "-m", "fedsim", "run", "small.toml", "--out", "command.h5").code == 0
    expected = fedsim.open_run("command.h5").attributes["weights_sha256"]
    assert expected != ""
    alone = folder.script(STOPPING)
    assert (alone.code, alone.err) == (0, "")
    (here,) = outcomes(folder.path, 1)
    (folder.path / "two.h5").unlink()
    together = folder.script(STOPPING, RANKS)
    assert (together.code, together.err) == (0, "")
    there = outcomes(folder.path, RANKS)
    assert [each[:2] for each in there] == [[[1, False, ""], [3, True, expected]]] * RANKS
    assert there[0] == here
    assert [each[2] for each in there] == [[0, 1, 2, 3], [], []]  # only rank 0 has a callback


FAILING = """
def watch(finished):
    if finished.round == 2:
        raise {error}

try:
    fedsim.run("small.toml", callback=watch, progress=False)
except fedsim.BadInput as error:
    Path(f"rank{{rank}}.txt").write_text(str(error))
"""


@pytest.mark.full
@pytest.mark.processes
def test_an_exception_of_the_callback_ends_all_ranks_and_is_shown(folder: Any) -> None:
    ended = folder.script(RANK + FAILING.format(error='ZeroDivisionError("mine")'), RANKS)
    assert ended.code == 1
    assert "ZeroDivisionError: mine" in ended.err
    assert "script.py" in ended.err
    assert fedsim.open_run("runs/small.h5").rounds >= 1


@pytest.mark.full
@pytest.mark.processes
def test_bad_input_in_the_callback_is_raised_on_all_ranks(folder: Any) -> None:
    ended = folder.script(RANK + FAILING.format(error='fedsim.BadInput("mine")'), RANKS)
    assert ended.code == 0, ended.err
    assert {(folder.path / f"rank{rank}.txt").read_text() for rank in range(RANKS)} == {"small.toml: mine"}


BAD = """
try:
    fedsim.run("small.toml", set={"train.lr": "fast"} if rank == 2 or len(sys.argv) > 1 else None)
except fedsim.BadInput as error:
    Path(f"rank{rank}.txt").write_text(str(error))
try:
    fedsim.sweep("small.toml")
except fedsim.BadInput as error:
    Path(f"sweep{rank}.txt").write_text(str(error))
fedsim.run("small.toml", set={"data.image_size": 1})
"""


@pytest.mark.full
@pytest.mark.processes
def test_a_job_that_is_wrong_on_one_rank_is_refused_on_all(folder: Any) -> None:
    """So is a sweep, which starts processes itself; and BadInput that nobody catches ends all ranks."""
    ended = folder.script(RANK + BAD, RANKS)
    said = {(folder.path / f"rank{rank}.txt").read_text() for rank in range(RANKS)}
    assert len(said) == 1
    assert said.pop().startswith('small.toml: [train] lr = "fast": should be a number')
    (sweep,) = {(folder.path / f"sweep{rank}.txt").read_text() for rank in range(RANKS)}
    assert "fedsim sweep starts its own processes on one machine: call it without mpirun" in sweep
    assert ended.code == 1
    assert "fedsim.errors.BadInput: small.toml: " in ended.err
    assert not (folder.path / "runs").exists()


@pytest.mark.full
@pytest.mark.processes
def test_a_fault_in_a_clients_work_ends_all_ranks_and_names_it(folder: Any) -> None:
    settings = {"method.name": folder.faulty()}
    ended = folder.script(RANK + f'fedsim.run("small.toml", set={settings}, progress=False)', RANKS)
    assert ended.code == 1
    assert re.search(r"^\[rank [12], client \d, round 2, Boom\.step 1\] ValueError: this is not what I wanted$", ended.err, re.M)
    assert "keeps the rounds before" in ended.err


BETWEEN = """
fedsim.run("small.toml", progress=False)
if rank == 1:
    raise LookupError("only here")
fedsim.run("small.toml", out="second.h5", progress=False)
"""


@pytest.mark.full
@pytest.mark.processes
def test_an_exception_on_another_rank_between_two_runs_ends_all_ranks(folder: Any) -> None:
    ended = folder.script(RANK + BETWEEN, RANKS)
    assert ended.code == 1
    assert "LookupError: only here" in ended.err
    assert not (folder.path / "second.h5").exists()
