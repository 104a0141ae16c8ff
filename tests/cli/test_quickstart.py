"""The quickstart as a user runs it, and what the README says one should see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import xarray

from fedsim.data.partition import PartitionSettings
from fedsim.data.population import populate
from fedsim.data.settings import DataSettings
from fedsim.simulation.exported.network import module_of
from fedsim.storage.reader import RunReader, read_model

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOLD = re.compile(r"^ *(fedtiny|fedavg) +1 +([\d.]+) % +([\d.]+) +([\d.]+) % +([\d.]+ \w?B) +([\d.]+ \w?B)", re.MULTILINE)  # the last table


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run file, and what was printed, of the recipe's own command in a folder of its own."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    # Without make's own variables, since these tests run under make too; -o: what is installed stays as it is.
    made = ["make", "--no-print-directory", "-o", f"{BIN.parent}/.run", "quickstart", f"VENV={BIN.parent}"]
    done = subprocess.run(made, cwd=folder, env=plain, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == f"{BIN}/mpirun -n 3 {BIN}/fedsim run jobs/quickstart.toml"
    return folder / "runs" / "quickstart.h5", done.stdout


@pytest.mark.processes
def test_it_ends_with_what_the_readme_says(quickstart) -> None:
    """Accuracy, density, FLOPs, bytes and memory of both."""
    printed, promised = (TOLD.findall(text) for text in (quickstart[1], (ROOT / "README.md").read_text()))
    assert [row[0] for row in printed] == [row[0] for row in promised] == ["fedavg", "fedtiny"]
    for mine, theirs in zip(printed, promised, strict=True):
        assert abs(float(mine[1]) - float(theirs[1])) <= 2.0, "another torch may move a few images; the README should be brought up to date"
    assert printed[0][2:] == promised[0][2:]  # what a dense run costs is known beforehand
    assert printed[1][2] == promised[1][2]


@pytest.mark.processes
def test_its_output_is_plain_lines(quickstart) -> None:
    assert "\x1b" not in quickstart[1]
    assert quickstart[1].count("3 ranks of Open MPI ") == 2


@pytest.mark.processes
def test_its_run_file_is_whole(quickstart) -> None:
    reader = RunReader(quickstart[0])
    assert (reader.attributes["finished"], reader.rounds, reader.attributes["ranks"]) == (True, 20, 3)
    assert len(reader.attributes["weights_sha256"]) == 64
    with xarray.open_dataset(quickstart[0], group="rounds", engine="h5netcdf") as rounds:
        assert rounds.accuracy.dims == ("round",)
        assert float(rounds.accuracy[20]) > 0.94
        assert float(rounds.density.max()) <= 0.1
        assert float(rounds.weights_swapped.sum()) > 1000
        assert [int(block) for block in rounds.adjusted_block.dropna("round")] == [3, 2, 1, 3, 2, 1, 3]  # in round 16 = stop none moves
    with xarray.open_dataset(quickstart[0], group="layers", engine="h5netcdf") as layers:
        assert (layers.grown == layers.pruned).all()
        assert float(layers.grown.sum()) > 1000
        assert float(layers.density[1:].std("round").max()) == 0
    model = read_model(quickstart[0])
    kept = sum(int(model[key].sum()) for key in model if key.startswith("mask/"))
    assert kept + model["w/conv1.weight"].numel() <= 5276  # a tenth of 52,768


@pytest.mark.processes
def test_its_model_is_a_plain_torch_module_with_the_recorded_accuracy(quickstart) -> None:
    module = module_of(quickstart[0])
    test = populate(DataSettings(), PartitionSettings(), 0).test
    every = torch.arange(len(test))
    x = (test.images(every).float() / 255 - torch.tensor(test.mean).view(-1, 1, 1)) / torch.tensor(test.std).view(-1, 1, 1)
    right = (module(x).argmax(-1) == test.labels(every)).float().mean()
    assert abs(float(right) - RunReader(quickstart[0]).column("accuracy")[-1]) < 1e-6


def blocks(language: str) -> list[str]:
    """The README's code in a language, as it stands."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def succeeds(*command: str) -> str:
    """What the command prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "rounds"),
    [pytest.param("callback=watch", 21, marks=pytest.mark.full), ("fedsim_analysis.load", 0), ("plots.pareto", 0)],
)
@pytest.mark.processes
def test_the_readmes_scripts_run(quickstart, monkeypatch, name, rounds) -> None:
    """A run from Python, reading the run file, and figures: each as a plain script."""
    monkeypatch.chdir(quickstart[0].parents[1])
    shutil.copytree("runs", "runs/figure", ignore=shutil.ignore_patterns("*.checkpoint", "figure"), dirs_exist_ok=True)
    (script,) = [block for block in blocks("python") if name in block]
    Path("script.py").write_text(script)
    lines = succeeds(sys.executable, "script.py").splitlines()
    assert [line.split()[0] for line in lines if line.split()[1:3] == ["of", "20"]] == [str(r) for r in range(rounds)]


@pytest.mark.parametrize(
    "aggregate",
    [
        "fedavg",
        pytest.param("fedprox", marks=pytest.mark.full),
        pytest.param("fednova", marks=pytest.mark.full),
        pytest.param("scaffold", marks=pytest.mark.full),
    ],
)
@pytest.mark.processes
def test_the_readmes_method_runs_at_its_density_under_every_aggregation(quickstart, monkeypatch, aggregate) -> None:
    monkeypatch.chdir(quickstart[0].parents[1])
    (method,) = [block for block in blocks("python") if "class Magnitude" in block]
    Path("mine.py").write_text(method)
    few = ["rounds=2", "evaluate.every=0", "method.name=mine:Magnitude", f"train.aggregate={aggregate}"]
    settings = [word for setting in few for word in ("--set", setting)]
    succeeds(str(BIN / "fedsim"), "run", "jobs/quickstart_dense.toml", *settings, "--out", f"{aggregate}.h5")
    assert abs(RunReader(f"{aggregate}.h5").column("density_maskable")[-1] - 0.2) < 1e-3


def test_the_readmes_job_is_valid_and_so_are_sections_that_are_added_to_it() -> None:
    from fedsim.config.job import check

    first, *others = map(tomllib.loads, blocks("toml"))
    assert check(first).rounds == 60
    assert [check(first | sections).devices.name for sections in others] == ["four_kinds"]


PLACE = re.compile(r"`((?:[\w.]+/)*[\w.]+\.py|(?:[\w.]+/)+)(?:: ([\w., ]+))?`")  # a path, and names of things in it
PREFIX = re.compile(r"`[a-z]+/`")  # of the keys of a tree


def test_the_map_names_what_exists() -> None:
    """Every path in fedsim/README.md, and every name after it."""
    text = (ROOT / "fedsim" / "README.md").read_text()
    table = set(PREFIX.findall(text.partition("## Keys of a tree")[2].partition("## Promises")[0]))
    places = [found for found in PLACE.finditer(text) if found[0] not in table]
    assert len(places) > 150
    for path, names in (place.groups() for place in places):
        known = [folder / path for folder in (ROOT / "fedsim", ROOT) if (folder / path).exists()]
        assert known, path
        for name in re.split(r", |\.", names or ""):
            assert not names or re.search(rf"^ *(def {name}|class {name}|{name}\b.*=)", known[0].read_text(), re.MULTILINE), (path, name)


def test_the_other_jobs_are_valid() -> None:
    from fedsim.config.job import load

    paths = sorted(ROOT.glob("jobs/**/*.toml"))
    assert [load(path).name for path in paths] == [path.stem for path in paths]
