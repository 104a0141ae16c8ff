"""A stranger's own method: what it returns wrongly is one message that names the method, its file, the verb and what is right."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strange_methods
import torch
from processes import HANG, MPIRUN, environment
from small_job import SMALL, small_job
from strange_methods import WRONG

import fedsim
from fedsim import BadInput, ClientFault, MethodFault
from fedsim.core import shared_generators

READS = r"FileNotFoundError: \[Errno 2\] No such file or directory: 'missing.npy'"
ENDS = "SystemExit: no licence"
SAID = {
    "init": {
        "reads": READS,
        "ends": ENDS,
        "None": "it returned None; it must return the state before round 0",
        "numpy": "cannot be stored in a checkpoint: w is a numpy.ndarray; what is stored or sent is made of None, bool",
        "lambda": "f is a builtins.builtin_function_or_method",
    },
    "round": {
        "reads": READS,
        "ends": ENDS,
        "None": r"it returned None; it must return \(state, record\)",
        "state alone": r"it returned a AveragedState; it must return \(state, record\)",
        "three": r"it returned a tuple of 3 \(AveragedState, dict, int\)",
        "no record": r"a tuple of 2 \(AveragedState, NoneType\)",
        "list record": r"a tuple of 2 \(AveragedState, list\)",
        "text": "it records 'note' as a str; a record is one number",
        "array": r"it records 'many' as a ndarray \(3,\); a record is one number",
        "missing": "it records 'gone' as None",
        "number for a name": "it records 3, which cannot name a column",
        "slash": "it records 'a/b', which cannot name a column of the run file; a name is a text without '/'",
        "engine's": "it records 'bytes_up', which the engine itself measures",
        "set state": "cannot be stored in a checkpoint: .*memory is a builtins.set",
    },
    "deploy": {
        "reads": READS,
        "ends": ENDS,
        "None": r"it returned None; it must return \(shared, own, net\)",
        "shared alone": "it returned a dict; it must return",
        "None for own": "own is None; it must be a dict of tensors",
        "numpy": "shared 'w/conv1.weight' is a numpy.ndarray; it must be a torch.Tensor",
        "no price": "shared 'extra/a': a key begins with one of w/, opt/",
        "shape": r"shared 'w/fc2.bias' is \(3,\) torch.float32; the network has it as \(4,\) torch.float32",
        "rows": r"own 'n/own' is \(77,\); it must have a row for each of the 0 clients",
        "module": r"a tuple of 3 \(dict, dict, Linear\)",
        "mask of floats": "mask 'fc2.weight' is torch.float32; a mask is bool",
    },
    "run": {
        "no client": "the cohort is empty; it must have at least one client",
        "unknown client": "a cohort has client 99, and the clients are 0 to 3",
        "negative client": "a cohort has client -1",
        "twice": "client 1 stands in the cohort twice; the clients of a cohort must be distinct",
        "numpy": "shared 'w/conv1.weight' is a numpy.ndarray",
        "double": r"shared 'w/conv1.weight' is .* torch.float64; the network has it as .* torch.float32",
        "shape": r"shared 'w/fc2.bias' is \(3,\)",
        "no price": "shared 'extra/a': a key begins with",
        "None": "shared is None; it must be a dict of tensors",
    },
}
WORK = {
    "init_kept None": "what it returned is None; it must be a dict of tensors",
    "init_state list": "what it returned is a list; it must be a dict of tensors",
    "begin_feed None": "what it returned is None; it must be a dict of tensors",
    "step None": r"it returned None; it must return \(state, loss\)",
    "step state": r"it returned a dict; it must return \(state, loss\)",
    "step float": r"it returned a tuple of 2 \(dict, float\); it must return",
    "step losses": r"its loss is \(2,\) torch.float32; it must be the batch's mean loss",
    "finish None": r"it returned None; it must return a fedsim.Report\(total, each, keep\)",
    "finish dict": "it returned a dict; it must return a fedsim.Report",
    "finish no price": "total 'extra/a': a key begins with one of w/",
    "finish number": "each 'n/a' is a builtins.int; it must be a torch.Tensor",
    "finish keep": "keep is None; it must be a dict of tensors",
}
OF_SOME = {
    "finish totals of some": (MethodFault, "some clients report total .* and others do not; all clients must report the same keys"),
    "finish keys of some": (MethodFault, "some clients report total 'n/odd' and others do not; all clients must report the same keys"),
    "finish shapes of some": (MethodFault, r"total 'n/a' is \(1,\) and \(2,\) for two clients"),
    "finish rows of some": (MethodFault, r"client 1 reports each 'n/a' as \(2,\) .*client 0 reports each 'n/a' as \(1,\)"),
}
STEP = {
    "step draws": "by the generator of NumPy.* fedsim.rng draws by a key",
    "step ends": ENDS,
    "step drops": "fc2.*the keys of the state",
    "finish single": "total 'w/.*' is torch.float32; a total is float64",
}


def ran(tmp_path: Path, verb: str = "", how: str = "", **execution: Any) -> fedsim.RunReader:
    method = {"name": "strange_methods:Strange", "verb": verb, "how": how}
    job = SMALL | {"rounds": 1, "execution": SMALL["execution"] | execution, "method": method}
    return fedsim.run(job, out=tmp_path / "run.h5", progress=False)


@pytest.mark.parametrize(("verb", "how"), [(verb, how) for verb, kinds in WRONG.items() for how in kinds])
def test_a_method_that_returns_the_wrong_thing(tmp_path: Path, verb: str, how: str) -> None:
    with pytest.raises(MethodFault) as error:
        ran(tmp_path, verb, how)
    first = str(error.value).splitlines()[0]
    called = r"round \(r = 1\)" if verb in ("round", "run") else verb
    assert re.match(rf"method strange_methods:Strange \(\S*strange_methods\.py\), {called}: ", first)
    assert re.search(SAID[verb][how], first)


@pytest.mark.parametrize("fleet", ["serial", "packed"])
@pytest.mark.parametrize("how", [*WORK, *STEP])
def test_a_work_that_returns_the_wrong_thing(tmp_path: Path, how: str, fleet: str) -> None:
    with pytest.raises(ClientFault, match=r"^\[rank 0, clients? [\d, ]+, round 1, Odd\.") as error:
        ran(tmp_path, "work", how, fleet=fleet, packs=1)
    if how in WORK:
        assert re.search(rf"TypeError: {how.split()[0]} of Odd \(\S*strange_methods\.py\): {WORK[how]}", str(error.value))
    else:
        assert re.search(STEP[how], str(error.value))


@pytest.mark.parametrize("how", OF_SOME)
def test_reports_that_differ_from_client_to_client(tmp_path: Path, how: str) -> None:
    kind, said = OF_SOME[how]
    with pytest.raises(kind, match=said):
        ran(tmp_path, "work", how)


def test_draws_of_a_method_depend_on_the_seed_and_the_round_alone(tmp_path: Path) -> None:
    job, before = SMALL | {"rounds": 3, "method": {"name": "strange_methods:Drawing"}}, shared_generators.states()
    whole = fedsim.run(job, out=tmp_path / "whole.h5", progress=False)
    assert shared_generators.states() == before  # for the script that called it
    torch.rand(7)
    fedsim.run(job, out=tmp_path / "two.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    again = fedsim.run(job, out=tmp_path / "two.h5", progress=False)
    for name in ("torch", "numpy", "python", "loss"):
        np.testing.assert_array_equal(whole.column(name), again.column(name))
        assert len(set(whole.column(name)[1:])) == 3
    other = fedsim.run(job | {"seed": 5}, out=tmp_path / "other.h5", progress=False)
    assert not set(other.column("torch")) & set(whole.column("torch"))


def test_a_state_of_plain_dicts_is_stopped_and_resumed(tmp_path: Path) -> None:
    job = SMALL | {"rounds": 3, "method": {"name": "strange_methods:PlainState"}}
    whole = fedsim.run(job, out=tmp_path / "whole.h5", progress=False)
    fedsim.run(job, out=tmp_path / "two.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    again = fedsim.run(job, out=tmp_path / "two.h5", progress=False)
    assert again.attributes["weights_sha256"] == whole.attributes["weights_sha256"]
    assert [whole.column(name)[0] for name in "abcd"] == [0.5, 3, 1, 7]
    assert whole.column("a").tolist() == again.column("a").tolist() == [0.5, 0, 1, 2]


def test_a_method_that_refuses_in_round_1_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^job: this method wants more clients$"):
        ran(tmp_path, "refuses")


def test_an_error_of_the_run_file_is_not_the_methods(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fedsim.run(SMALL | {"rounds": 1, "method": {"name": "strange_methods:Storing"}}, out=tmp_path / "run.h5", progress=False)


def on_ranks(folder: Path, verb: str, how: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(strange_methods.__file__, folder)
    (folder / "s.toml").write_text(small_job(1, method={"name": "strange_methods:Strange", "verb": verb, "how": how}))
    command = [str(MPIRUN), "-n", "3", sys.executable, "-m", "fedsim", "run", "s.toml", "--out", "run.h5"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), timeout=HANG, check=False)


@pytest.mark.processes
def test_a_work_that_draws_on_another_rank_is_refused(tmp_path: Path) -> None:
    ended = on_ranks(tmp_path, "work", "step draws")
    assert ended.returncode == 1
    assert re.match(
        r"\[rank [12], client \d+, round 1, Odd\.step\] ValueError: it draws random numbers by the generator of NumPy", ended.stderr
    )


@pytest.mark.parametrize(
    ("verb", "how", "code", "said"),
    [
        pytest.param(
            "init", "None", 1, "method strange_methods:Strange (strange_methods.py), init: it returned None", marks=pytest.mark.full
        ),
        pytest.param(
            "run",
            "unknown client",
            1,
            "method strange_methods:Strange (strange_methods.py), round (r = 1): ValueError: a cohort has client 99",
            marks=pytest.mark.full,
        ),
        ("work", "finish keys of some", 1, "round (r = 1): ValueError: total 'n/odd' is () and nothing for two clients"),
        pytest.param(
            "work",
            "finish totals of some",
            1,
            "round (r = 1): ValueError: total 'buf/norm1.running_mean' is (4,) and nothing for two clients",
            marks=pytest.mark.full,
        ),
        pytest.param("refuses", "", 2, "s.toml: this method wants more clients", marks=pytest.mark.full),
    ],
)
@pytest.mark.processes
def test_on_ranks_the_message_comes_first_and_once_and_every_rank_ends(tmp_path: Path, verb: str, how: str, code: int, said: str) -> None:
    ended = on_ranks(tmp_path, verb, how)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr.splitlines()[0]
    assert ended.stderr.count(said) == 1
    assert ended.stderr.count("Traceback") == (verb in ("run", "work"))
    assert (tmp_path / "run.h5").exists() == (verb != "init")
