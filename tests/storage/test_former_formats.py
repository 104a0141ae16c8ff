"""Run files of format 1 are read as if they had been written under the present names, by every command and by both readers."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedsim_analysis
import fedsim_analysis.former_names
import h5py
import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from cases import images, run, table
from former_run_file import COLUMNS, in_format_1
from rich.console import Console

import fedsim
from fedsim.cli import commands
from fedsim.errors import BadInput
from fedsim.reporting.summary import show
from fedsim.simulation.planning.plan import Plan
from fedsim.storage import checkpoint, former_names
from fedsim.storage.client_gates import Gates
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

DRAWN = {
    "data": {"name": "fake", "channels": 1, "image_size": 8, "classes": 4, "train_images": 120, "test_images": 40},
    "partition": {"name": "dirichlet_class", "clients": 5, "min_images": 1},
    "execution": {
        "plan": "reference",
        "device": "cpu",
        "fleet": "packed",
        "packs": 2,
        "memory_format": "contiguous",
        "packed_conv": "matmul",
    },
}
RUNS = {  # which together use every name that changed -> (line of the table of methods, change to its job)
    "adp": ("adp", {}),
    "fedtiny": ("fedtiny", {}),
    "fedmef": ("fedmef", {}),
    "dwfnp": ("dwfnp", {}),
    "structured": ("structured", {}),
    "feddp": ("feddp", {}),
    "drawn": ("fedprox", DRAWN),
}
GROUPS = {
    "rounds": RunReader.column,
    "clients": RunReader.clients,
    "layers": RunReader.layers,
    "timing": RunReader.timing,
    "speed": RunReader.speed,
}
OTHERWISE = {"format_version", "fedsim_version", "job_sha256"}  # attributes that no reader translates
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of RUNS: NAME.h5, and in former/NAME.h5 the same in format 1."""
    where = tmp_path_factory.mktemp("formats")
    images(where)
    (where / "former").mkdir()
    for name, (line, change) in RUNS.items():
        assert run(line, "serial", where, where / f"{name}.h5", change=change) == 0
        in_format_1(where / f"{name}.h5", where / "former" / f"{name}.h5")
    return where


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: the exit code, and what it writes on both streams."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, arguments)])
        capsys.readouterr()
        code = commands._outcome()
        return code, *capsys.readouterr()

    return called


def both(folder: Path, name: str) -> tuple[Path, Path]:
    """The run file of format 1, and the one of format 2."""
    return folder / "former" / f"{name}.h5", folder / f"{name}.h5"


def words(file: h5py.File) -> set[str]:
    """Every name in a file that a table of former names may translate: "group/column", "section.field", "METHOD.field"."""
    job = tomllib.loads(file.attrs["job"])
    fields = {f"{section}.{name}" for section, values in job.items() if isinstance(values, dict) for name in values}
    fields |= {f"{job['method']['name']}.{name}" for name in job["method"]}
    return {*file, *fields} | {f"{group}/{name}" for group in GROUPS for name in file[group]}


def test_these_runs_use_every_name_that_changed(folder: Path) -> None:
    old = {*former_names.COLUMNS, *former_names.GROUPS}
    old |= {f"{place}.{name}" for place, names in (former_names.SECTIONS | former_names.METHODS).items() for name in names}
    found, left = set[str](), set[str]()
    for name in RUNS:
        before, after = both(folder, name)
        with h5py.File(before) as former, h5py.File(after) as present:
            found |= words(former)
            left |= words(present)
    assert old <= found
    assert not old & left - {"structured.keep"}
    assert set(COLUMNS.values()) == {*former_names.COLUMNS, *former_names.GROUPS}


def test_both_packages_know_the_same_names() -> None:
    for name in ("COLUMNS", "GROUPS", "SECTIONS", "METHODS", "FLEETS"):
        assert getattr(former_names, name) == getattr(fedsim_analysis.former_names, name), name


# ---- the reader


@every_run
def test_the_reader_gives_the_same_under_the_present_names(name: str, folder: Path) -> None:
    former, present = map(fedsim.open_run, both(folder, name))
    ours, theirs = former.attributes, present.attributes
    assert {key: value for key, value in ours.items() if key not in OTHERWISE} == {k: v for k, v in theirs.items() if k not in OTHERWISE}
    assert (ours["format_version"], ours["fedsim_version"]) == (1, "0.1.0")
    for group, read in GROUPS.items():
        assert sorted(former.names(group)) == sorted(present.names(group))
        for column in present.names(group):
            np.testing.assert_array_equal(read(former, column), read(present, column), err_msg=f"{group}/{column}")
            assert former.about(group, column) == present.about(group, column)
    np.testing.assert_array_equal(former.counts(), present.counts())
    for dimension in ("client", "layer"):
        assert former.labels(dimension) == present.labels(dimension)
    for r in range(present.rounds + 1):
        assert_same_tensors(former.masks(r), present.masks(r))
    assert_same_tensors(former.model(), present.model())


def assert_same_tensors(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in some.items())


@pytest.mark.parametrize("name", ["adp", "dwfnp", "structured"])
def test_the_gates_of_clients_are_found(name: str, folder: Path) -> None:
    former, present = map(RunReader, both(folder, name))
    for r in (*range(present.rounds + 1), None):
        for mine, its in zip(former.gates(r), present.gates(r), strict=True):
            np.testing.assert_array_equal(mine, its)
        assert former.groups(r) == present.groups(r)
    assert len(former.gates()[0]) > 0 or name == "structured"


def test_constants_in_the_place_of_gates_are_found(tmp_path: Path) -> None:
    values = np.array([[0.5, 0, 2]], np.float32)
    attributes = {"job": 'seed = 0\n[method]\nname = "adp"\n', "seed": 0, "plan": "{}", "partition": '{"parameters": {}}'}
    with RunWriter.create(tmp_path / "new.h5", attributes=attributes, layers=["conv1"], clients=2) as record:
        record.row(0, {}, gates=Gates(np.array([1]), values > 0, {"conv1": 3}, values))
    found = RunReader(in_format_1(tmp_path / "new.h5", tmp_path / "old.h5")).gate_values()
    assert found is not None
    assert found.tolist() == values.tolist()


def test_a_former_name_is_answered_with_the_present_ones(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"has no rounds/adjusted; it has .*weights_swapped"):
        RunReader(both(folder, "fedtiny")[0]).column("adjusted")


# ---- the commands


@every_run
def test_show_prints_the_same(name: str, folder: Path) -> None:
    texts = []
    for path in both(folder, name):
        console = Console(file=io.StringIO(), width=120)
        show(path, console)
        texts.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert texts[0].replace("fedsim 0.1.0", f"fedsim {version('fedsim')}") == texts[1]


@every_run
def test_compare_counts_them_as_seeds_of_one_job(name: str, folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    former, present = both(folder, name)
    code, _, error = call("compare", former, present)
    assert (code, error) == (2, f"{former} and {present} are one job with one seed, 0: leave one out\n")
    other = in_format_1(present, tmp_path / "other.h5", seed=1)
    code, text, _ = call("compare", other, present, "--csv")
    assert code == 0
    grouped = pd.read_csv(io.StringIO(text))
    assert grouped["seeds"].tolist() == [2]
    _, text, _ = call("compare", present, "--csv")
    alone = pd.read_csv(io.StringIO(text))
    assert list(grouped) == list(alone)
    for column in ("accuracy", "density", "bytes", "max_client_flops", "max_client_memory", "client_accuracy_min"):
        np.testing.assert_allclose(grouped[column], alone[column])


@pytest.mark.parametrize(("name", "own"), [("adp", ()), ("adp", ("--client", 3)), ("dwfnp", ("--client", 0)), ("fedtiny", ())])
def test_export_writes_the_same_network(name: str, own: tuple[Any, ...], folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    said, networks = [], []
    for path in both(folder, name):
        code, out, _ = call("export", path, *own, "--out", tmp_path / "model.pt")
        assert code == 0
        said.append(out.replace(str(path), "RUN.h5"))
        networks.append(torch.load(tmp_path / "model.pt", weights_only=False))
    assert said[0] == said[1]
    assert_same_tensors(networks[0].state_dict(), networks[1].state_dict())
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(networks[0](x), networks[1](x))


def test_a_run_may_take_the_plan_of_a_former_file(folder: Path, tmp_path: Path) -> None:
    former, present = both(folder, "drawn")
    with h5py.File(former) as file:
        assert "stacked" in json.loads(file.attrs["plan"])
    change = DRAWN | {"execution": {"plan": str(former), "device": "cpu"}}
    assert run("fedprox", "serial", folder, tmp_path / "run.h5", change=change) == 0
    taken, first = (RunReader(path).attributes for path in (tmp_path / "run.h5", present))
    assert (taken["plan"], taken["weights_sha256"]) == (first["plan"], first["weights_sha256"])
    assert Plan.of(taken["plan"]).packed_conv == "matmul"


def test_a_fleet_of_another_name_then_is_known(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(both(folder, "drawn")[0], tmp_path / "old.h5"))
    with h5py.File(path, "r+") as file:
        job = tomllib.loads(file.attrs["job"])
        job["execution"]["fleet"] = "graphed"
        file.attrs["job"] = tomli_w.dumps(job)
        file.attrs["plan"] = json.dumps(json.loads(file.attrs["plan"]) | {"fleet": "graphed"})
    found = RunReader(path).attributes
    assert Plan.of(found["plan"]).fleet == "cuda_graph" == tomllib.loads(found["job"])["execution"]["fleet"]
    assert fedsim_analysis.load(path).job == tomllib.loads(found["job"])


# ---- the analysis package


@every_run
def test_the_analysis_gives_the_same_tables(name: str, folder: Path) -> None:
    former, present = map(fedsim_analysis.load, both(folder, name))
    assert former.job == present.job
    pd.testing.assert_frame_equal(former.rounds, present.rounds, check_like=True)
    pd.testing.assert_frame_equal(former.timing(), present.timing())
    for group in ("rounds", "clients", "layers", "timing"):
        assert former.units(group) == present.units(group)
    for column in present.units("clients"):
        pd.testing.assert_frame_equal(former.clients(column), present.clients(column))
    for column in present.units("layers"):
        pd.testing.assert_frame_equal(former.layers(column), present.layers(column))


# ---- what is refused


@pytest.fixture
def stopped(folder: Path, tmp_path: Path) -> Path:
    """A folder with a run of FedTiny that stopped in its first rounds, its checkpoints and its job file."""
    asked = iter(range(1000))
    assert run("fedtiny", "serial", folder, tmp_path / "run.h5", lambda: next(asked) >= 25) == 3
    (tmp_path / "job.toml").write_text(tomli_w.dumps(table("fedtiny", "serial", folder)))
    return tmp_path


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
def test_a_run_of_format_1_is_not_continued(resume: str, stopped: Path, call: Callable[..., Any]) -> None:
    path = in_format_1(stopped / "run.h5", stopped / "old.h5")
    shutil.copytree(checkpoint.folder_of(stopped / "run.h5"), checkpoint.folder_of(path))
    before = path.read_bytes()
    code, _, error = call("run", stopped / "job.toml", "--out", path, "--resume", resume)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert f"{path} was written by fedsim 0.1.0 in format 1: this fedsim reads it, but cannot continue it" in error
    assert path.read_bytes() == before


def test_a_sweep_does_not_continue_a_run_of_format_1(stopped: Path, call: Callable[..., Any]) -> None:
    (stopped / "runs").mkdir()
    path = in_format_1(stopped / "run.h5", stopped / "runs" / "fedtiny-serial.h5")
    code, _, error = call("sweep", stopped / "job.toml", "--out", stopped / "runs")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert f"{path} was written by fedsim 0.1.0 in format 1" in error


def test_a_checkpoint_of_format_1_is_not_continued(stopped: Path, call: Callable[..., Any]) -> None:
    for path in checkpoint.folder_of(stopped / "run.h5").glob("*.json"):
        body = json.dumps(json.loads(path.read_text())["manifest"] | {"format_version": 1, "fedsim_version": "0.1.0"})
        path.write_text(f'{{"sha256": "{sha256(body.encode()).hexdigest()}", "manifest": {body}}}\n')
    code, _, error = call("run", stopped / "job.toml", "--out", stopped / "run.h5")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "was written by fedsim 0.1.0 in format 1, whose classes have other names now" in error
    assert "--out" in error


@every_run
def test_a_job_under_former_names_is_refused_with_the_present_ones(name: str, folder: Path) -> None:
    before, _ = both(folder, name)
    with h5py.File(before) as file, pytest.raises(BadInput) as refused:
        fedsim.load_job(tomllib.loads(file.attrs["job"]))
    assert "memory_share" in str(refused.value)
    assert "gpu_memory_fraction" in str(refused.value)
