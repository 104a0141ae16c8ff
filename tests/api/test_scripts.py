"""Sweeps from a script, with and without `if __name__ == "__main__":`, runs in a notebook, and the examples of the documentation."""

from __future__ import annotations

import doctest
import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import fedsim
from fedsim import api

SWEEP = """
import fedsim

print("begun")
runs = fedsim.sweep("small.toml", set={"sweep.seed": [0, 1]}, out="swept", processes=1)
print([run.path.name for run in runs], [run.rounds for run in runs])
"""
OWN = """
from dataclasses import dataclass

import fedsim
from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Mine(FedAvg):
    share: float = 0.5


if __name__ == "__main__":
    (run,) = fedsim.sweep("small.toml", set={"method.name": "__main__:Mine", "sweep.seed": [0]}, out="swept", processes=1)
    print(run.attributes["method"])
"""


@pytest.mark.full
@pytest.mark.processes
def test_a_script_sweeps_without_a_guard_and_is_not_run_again_by_its_processes(folder: Any) -> None:
    ended = folder.script(SWEEP)
    assert (ended.code, ended.err) == (0, "")
    first, *lines, last = ended.out.splitlines()
    assert (first, last) == ("begun", "['small-seed0.h5', 'small-seed1.h5'] [3, 3]")
    assert [line.split()[:2] for line in lines[1:]] == [["small-seed0", "accuracy"], ["small-seed1", "accuracy"]]
    alone = fedsim.run("small.toml", set={"seed": 1, "name": "small-seed1"}, progress=False)
    swept = fedsim.open_run("swept/small-seed1.h5")
    assert swept.attributes["weights_sha256"] == alone.attributes["weights_sha256"] != ""


@pytest.mark.full
@pytest.mark.processes
def test_a_method_of_the_script_itself_needs_the_guard(folder: Any) -> None:
    ended = folder.script(OWN)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "__main__:Mine"


@pytest.mark.full
@pytest.mark.processes
def test_a_sweep_with_a_failed_run_says_which_and_leaves_signals_as_they_were(folder: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def mine(*_: object) -> None: ...

    signal.signal(signal.SIGINT, mine)
    settings = {"model.norm": "none", "rounds": 30, "sweep.train.lr": [0.1, 1e30]}
    with pytest.raises(RuntimeError, match=r"^1 of 2 runs failed:\nsmall-lr1e\+30: ") as error:
        fedsim.sweep("small.toml", set=settings, out="swept", processes=1, progress=False)
    assert "client" in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is mine


NOTEBOOK = (
    'import fedsim\nrun = fedsim.run("small.toml", set={"rounds": 120, "evaluate.every": 1, "data.train_images": 40}, out="long.h5")',
    'print(run.rounds, run.attributes["weights_sha256"])',
    'runs = fedsim.sweep("small.toml", set={"sweep.seed": [0, 1]}, out="swept", processes=1)\nprint(len(runs))',
    'rows = fedsim.estimate("small.toml")\nprint(len(rows))',
    "from dataclasses import dataclass\nfrom fedsim.methods.fedavg import FedAvg\n"
    "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    share: float = 0.5\n"
    'try:\n    fedsim.run("small.toml", set={"method.name": "__main__:Mine"}, out="mine.h5")\n'
    "except fedsim.BadInput as error:\n    print(error)",
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, small: str) -> list[str]:
    """What a notebook prints, cell by cell, when Jupyter executes it. Nothing but text comes, and nothing on the error stream."""
    where = tmp_path_factory.mktemp("notebook")
    (where / "small.toml").write_text(small)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(where)}}).execute()
    outputs = [cell["outputs"] for cell in notebook.cells]
    assert {output.get("name") for each in outputs for output in each} == {"stdout"}
    return ["".join(output["text"] for output in each) for each in outputs]


@pytest.mark.full
@pytest.mark.processes
def test_a_notebook_shows_progress_in_few_plain_lines(printed: list[str]) -> None:
    lines = printed[0].splitlines()
    assert 10 < len(lines) <= 65
    assert lines[-1].startswith("round 120/120  accuracy ")
    assert printed[1].startswith("120 ")
    assert printed[2].splitlines()[-1] == "2"
    assert printed[3].splitlines()[-1] == "4"
    assert not {"\r", "\x1b"} & set("".join(printed))


@pytest.mark.full
@pytest.mark.processes
def test_a_method_in_a_cell_is_answered_with_what_to_do(printed: list[str]) -> None:
    assert printed[4].startswith("small.toml: __main__:Mine stands in no file")
    assert "write it to a file, for example mine.py, and name it mine:Mine" in printed[4]


FUNCTIONS = ("estimate", "export_module", "load_job", "open_run", "run", "sweep")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.processes
def test_the_example_of_each_function_runs(name: str, folder: Any) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(api, name), name, globs=dict(vars(api)))
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert said == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(fedsim, name)
    text = inspect.getdoc(function) or ""
    assert [heading in text for heading in ("Arguments:\n", "Returns:\n", "Raises:\n")] == [True] * 3
    described = {word.strip() for line in text.splitlines() if ":" in line for word in line.partition(":")[0].split(",")}
    assert set(inspect.signature(function).parameters) <= described


def test_the_example_of_the_package_runs() -> None:
    assert doctest.testmod(fedsim).failed == 0


def test_every_public_name_is_there_and_in_the_overview() -> None:
    assert sorted(fedsim.__all__) == sorted(set(fedsim.__all__))
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
        assert re.search(rf"\b{name}\b", fedsim.__doc__ or "")
    with pytest.raises(AttributeError, match="module 'fedsim' has no attribute 'runn'; it has "):
        _ = fedsim.runn


@pytest.mark.processes
def test_a_script_in_another_folder_finds_modules_beside_it_and_where_one_stands(tmp_path: Path) -> None:
    lines = (
        "from dataclasses import dataclass",
        "from fedsim.methods.fedavg import FedAvg",
        "@dataclass(frozen=True)",
        "class Mine(FedAvg): ...",
    )
    method = "\n".join(lines)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here.py").write_text(method)
    (tmp_path / "elsewhere" / "beside.py").write_text(method)
    names = "for name in ('here:Mine', 'beside:Mine'):\n    print(fedsim.load_job({'method': {'name': name}}).method.name)\n"
    (tmp_path / "elsewhere" / "script.py").write_text(f"import fedsim\n\n{names}")
    command = [sys.executable, "elsewhere/script.py"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.stdout.split() == ["here:Mine", "beside:Mine"], ended.stderr
