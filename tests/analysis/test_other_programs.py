"""Debian's h5dump and ncdump, R's hdf5r and rhdf5, and Octave see the numbers of a run file: of each group, finished and growing.

A program that is not there is named in the skip.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fedsim_analysis.export import command
from hand_made_run import ATTRIBUTES, hand_made_run
from numpy.typing import NDArray

from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS
from fedsim.storage.writer import RunWriter

pytestmark = pytest.mark.processes
GROUPS = {"rounds", "clients", "layers", "timing", "speed", "masks", "client_gates", "partition", "checksums"}


def need(program: str, library: str = "") -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if library and not has(program, library):
        pytest.skip(f"{program} has no {library}")


@cache
def has(program: str, library: str) -> bool:
    tried = {"Rscript": ["-e", f"library({library})"], "octave": [*OCTAVE[1:], "--eval", f"pkg load {library}"]}
    return subprocess.run([program, *tried[program]], capture_output=True, check=False).returncode == 0


OCTAVE = ["octave", "--no-gui", "--quiet", "--no-init-file"]


def ran(*command: object, **options: Any) -> str:
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def gates(count: int) -> Gates:
    return Gates(np.arange(count), np.eye(count, 9, dtype=bool), {"conv1": 9})


@pytest.fixture(scope="module", params=["finished", "growing"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run file with all groups; its writer still has the second kind open."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "finished":
        path = hand_made_run(folder / "run.h5")
        with RunWriter.resume(path, 3) as record:
            record.row(4, {"accuracy": 1.0}, gates=gates(2))
            record.finish({"w/fc": torch.tensor([0.5, 2.0])}, "0" * 64, gates(3))
        yield path
        return
    few = {name: COLUMNS[name] for name in ("rounds/accuracy", "clients/loss", "layers/density", "timing/compute", "speed/record_bytes")}
    about: dict[str, Any] = {"attributes": ATTRIBUTES, "counts": np.arange(6).reshape(3, 2), "called": {"class": ["cat", "dog"]}}
    with RunWriter.create(folder / "run.h5", layers=["conv1", "fc"], clients=3, columns=few, **about) as record:
        for r in range(70):
            masks = {"mask/fc.weight": torch.arange(20) % (1 + r // 30) == 0}
            clients = {"loss": (np.array([r % 3]), np.array([r + 0.5]))}
            record.row(r, {"accuracy": r / 70}, clients, {"density": np.array([1, 1 / (r + 1)])}, masks, {"compute": r}, gates(2))
        yield folder / "run.h5"


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All numbers in the file that are not none."""
    found: dict[str, NDArray[Any]] = {}

    def look(name: str, held: h5py.Group | h5py.Dataset) -> None:
        if isinstance(held, h5py.Dataset) and held.dtype.kind in "fiu" and held.size:
            found[name] = held[()]

    with h5py.File(path, locking=False) as file:
        file.visititems(look)
        for group in ("rounds", "clients", "layers", "timing", "speed", "partition"):  # what stands in two places is visited once
            found |= {f"{group}/{name}": held[()] for name, held in file[group].items() if held.dtype.kind in "fiu"}
    assert {name.partition("/")[0] for name in found} >= GROUPS
    return found


def same(printed: str, expected: dict[str, NDArray[Any]]) -> None:
    """Lines "name number number …", in the order of C."""
    found = {name: values for name, *values in (line.split() for line in printed.splitlines() if line.startswith("@"))}
    assert set(found) == {f"@{name}" for name in expected}
    for name, values in expected.items():
        np.testing.assert_array_equal([float(text.replace("NA", "nan")) for text in found[f"@{name}"]], values.ravel(), err_msg=name)


def test_h5dump_sees_every_number(run: Path, tmp_path: Path) -> None:
    need("h5dump")
    for name, values in arrays(run).items():
        ran("h5dump", "-d", f"/{name}", "-b", "LE", "-o", tmp_path / "raw", run)
        np.testing.assert_array_equal(np.fromfile(tmp_path / "raw", values.dtype), values.ravel(), err_msg=name)


def test_h5dump_sees_units_labels_and_attributes(run: Path) -> None:
    need("h5dump")
    assert '(0): "conv1", "fc"' in ran("h5dump", "-d", "/layers/layer", run)
    assert "share of the global test set" in ran("h5dump", "-a", "/rounds/accuracy/long_name", run)
    assert '(0): "s"' in ran("h5dump", "-a", "/timing/compute/units", run)
    finished = ran("h5dump", "-a", "/finished", run)
    assert "H5T_STD_I64LE" in finished
    assert f"(0): {int(run.parent.name.startswith('finished'))}" in finished
    scales = ran("h5dump", "-a", "/clients/loss/DIMENSION_LIST", run)
    assert "/round" in scales
    assert "/client" in scales
    ran("h5dump", run)


def test_ncdump_sees_dimensions_units_and_numbers(run: Path) -> None:
    need("ncdump")
    text = ran("ncdump", run)
    for line in (":finished = ", "double accuracy(round) ;", "double loss(round, client) ;", "double density(round, layer) ;"):
        assert line in text
    assert 'string accuracy:units = "1" ;' in text
    assert 'layer = "conv1", "fc" ;' in text
    numbers = ran("ncdump", "-p", "9,17", "-v", "/timing/compute", run).partition("data:")[2].partition(" compute = ")[2].partition(";")[0]
    assert [float(number.replace("_", "nan")) for number in numbers.split(",")] == pytest.approx(arrays(run)["timing/compute"], nan_ok=True)


HDF5R = """
library(hdf5r)
arguments <- commandArgs(TRUE)
file <- H5File$new(arguments[1], "r")
for (name in arguments[-1]) cat(paste0("@", name), sprintf("%.17g", as.numeric(file[[name]]$read())), "\\n")
cat("finished", h5attr(file, "finished"), "units", h5attr(file[["timing/compute"]], "units"), "layers", file[["layers/layer"]][], "\\n")
"""
RHDF5 = """
library(rhdf5)
arguments <- commandArgs(TRUE)
for (name in arguments[-1]) {
  values <- h5read(arguments[1], name, bit64conversion = "double")
  cat(paste0("@", name), sprintf("%.17g", as.numeric(values)), "\\n")
}
units <- h5readAttributes(arguments[1], "timing/compute")$units
cat("finished", h5readAttributes(arguments[1], "/")$finished, "units", units, "layers", h5read(arguments[1], "layers/layer"), "\\n")
"""


@pytest.mark.parametrize(("library", "script"), [("hdf5r", HDF5R), ("rhdf5", RHDF5)])
def test_r_sees_every_number(run: Path, tmp_path: Path, library: str, script: str) -> None:
    need("Rscript", library)
    expected = {name: values for name, values in arrays(run).items() if name.partition("/")[0] != "checksums"}  # R has no unsigned numbers
    (tmp_path / "read.R").write_text(f"options(warn = 1)\n{script}")
    printed = ran("Rscript", tmp_path / "read.R", run, *expected)
    same(printed, expected)
    finished = int(run.parent.name.startswith("finished"))
    assert printed.splitlines()[-1].strip() == f"finished {finished} units s layers conv1 fc"


BY_LOAD = """
function show(name, value)
  if isstruct(value)
    for [inner, key] = value
      show([name "/" regexprep(key, "^_", "")], inner);
    end
  elseif isnumeric(value) && numel(value)
    printf("@%s%s\\n", name, sprintf(" %.17g", value));
  end
end
file = argv(){end};
for group = {"rounds", "clients", "timing", "speed", "masks", "client_gates"}
  run = load("-hdf5", file, group{1});
  show(group{1}, run.(group{1}));
end
"""
BY_NCREAD = """
pkg load netcdf
arguments = argv();
file = arguments{1};
for name = arguments(2:end)'
  printf("@%s%s\\n", name{1}, sprintf(" %.17g", double(ncread(file, ["/" name{1}]))));
end
printf("finished %d rounds %d\\n", ncreadatt(file, "/", "finished"), ncreadatt(file, "/", "rounds"));
"""


def test_octave_loads_the_groups_without_text(run: Path, tmp_path: Path) -> None:
    """Its own `load` stops at the names of layers and classes: it has no text of variable length, and netCDF needs such text."""
    need("octave")
    (tmp_path / "read.m").write_text(BY_LOAD)
    groups = ("rounds", "clients", "timing", "speed", "masks", "client_gates")
    expected = {name: values for name, values in arrays(run).items() if name.partition("/")[0] in groups}
    same(ran(*OCTAVE, tmp_path / "read.m", run), expected)


BY_MAT = """
function show(name, value)
  if isstruct(value)
    for [inner, key] = value
      show([name "/" key], inner);
    end
  elseif isnumeric(value) && numel(value)
    printf("@%s%s\\n", name, sprintf(" %.17g", value'));
  end
end
run = load(argv(){end});
for group = {"rounds", "clients", "layers", "timing", "speed"}
  show(group{1}, run.(group{1}));
end
show("partition/counts", run.partition.counts);
printf("finished %d units %s layers %s classes %s\\n", run.attributes.finished, run.units.timing.compute, ...
       strjoin(run.layers.layer, ","), strjoin(run.partition.class_name, ","));
"""


def test_octave_loads_every_number_and_name_of_a_mat_file(run: Path, tmp_path: Path) -> None:
    """By `load` alone, without names of groups and without a package."""
    need("octave")
    (tmp_path / "read.m").write_text(BY_MAT)
    command.write(run, "mat", tmp_path / "run.mat")
    groups = ("rounds", "clients", "layers", "timing", "speed")
    expected = {name: values for name, values in arrays(run).items() if name.partition("/")[0] in groups or name == "partition/counts"}
    printed = ran(*OCTAVE, tmp_path / "read.m", tmp_path / "run.mat")
    same(printed, expected)
    finished = int(run.parent.name.startswith("finished"))
    assert printed.splitlines()[-1] == f"finished {finished} units s layers conv1,fc classes cat,dog"


def test_octave_s_netcdf_sees_every_number(run: Path, tmp_path: Path) -> None:
    need("octave", "netcdf")
    (tmp_path / "read.m").write_text(BY_NCREAD)
    expected = arrays(run)
    printed = ran(*OCTAVE, tmp_path / "read.m", run, *expected)
    same(printed, expected)
    with h5py.File(run, locking=False) as file:
        assert printed.splitlines()[-1] == f"finished {file.attrs['finished']} rounds {file.attrs['rounds']}"
