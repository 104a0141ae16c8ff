"""What a plain start imports: nothing that takes a second and that neither a run, nor its clients, nor an estimate needs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MPIRUN = Path(sys.executable).with_name("mpirun")
QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.toml"
FEW = ("--set", "rounds=1", "--set", "method.adjust_every=1", "--set", "method.stop_round=1")
NEVER = {
    *("torchvision", "torch._dynamo", "torch._inductor", "sympy", "PIL"),  # 1 s and 160 MB with the first
    *("sklearn.linear_model", "matplotlib", "pandas", "xarray", "plotly", "onnx"),
    *("numba.np.linalg", "numba.typed.typedlist"),  # what only compiling needs
}
# Python imports `sitecustomize` from the first folder of its path; at the end it writes down what the process has imported.
NOTES = """
import atexit, json, os, sys
def note():
    if "fedsim.simulation.experiment" in sys.modules:
        name = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
        with open(os.path.join(os.environ["FEDSIM_TEST_NOTES"], name + ".json"), "w") as file:
            json.dump(sorted(sys.modules), file)
atexit.register(note)
"""


def imported(folder: Path, words: tuple[str, ...], ranks: int = 0) -> list[set[str]]:
    """The modules of each process of `fedsim …`; kernels are compiled before, by the same command."""
    (folder / "sitecustomize.py").write_text(NOTES)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_", "SLURM_"))}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "FEDSIM_TEST_NOTES": str(folder)}
    variables["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*((str(MPIRUN), "-n", str(ranks)) if ranks else ()), sys.executable, "-m", "fedsim", *words]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        for file in folder.glob("*.h5"):
            file.unlink()
    return [set(json.loads((folder / f"{rank}.json").read_text())) for rank in range(ranks or 1)]


@pytest.mark.processes
def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    (modules,) = imported(tmp_path, ("run", str(QUICKSTART), "--out", "run.h5", "--resume", "never", *FEW))
    assert not modules & (NEVER | {"mpi4py"})


@pytest.mark.processes
def test_an_estimate_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    (modules,) = imported(tmp_path, ("estimate", str(QUICKSTART), "--set", "model.name=resnet18", "--set", "model.width=4", *FEW))
    assert not modules & (NEVER | {"mpi4py"})


@pytest.mark.processes
def test_published_images_that_are_there_are_read_without_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 200, 28, 28) + bytes(200 * 28 * 28))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 200) + bytes(range(10)) * 20)
    data = ("--set", "data.name=fashion_mnist", "--set", f"data.root={tmp_path}", "--set", "data.download=true")
    (modules,) = imported(tmp_path, ("estimate", str(QUICKSTART), *data, *FEW))
    assert "fedsim.data.torchvision_sets" in modules
    assert not modules & {"torchvision", "torch._dynamo", "sympy"}


@pytest.mark.processes
def test_a_client_rank_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    if not MPIRUN.exists():
        pytest.skip("needs the extra [mpi]")
    for modules in imported(tmp_path, ("run", str(QUICKSTART), "--out", "run.h5", "--resume", "never", *FEW), ranks=2):
        assert "fedsim.fleet.mpi.communicator" in modules
        assert not modules & NEVER
