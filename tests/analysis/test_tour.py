"""analysis/tour.ipynb: executed as Jupyter does, it makes its figures, warns of nothing, and prints the numbers of its run files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pandas as pd
import pytest
from fedsim_analysis import load

TOUR = Path(__file__).parents[2] / "analysis" / "tour.ipynb"


def test_it_is_stored_without_outputs() -> None:
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert tour.cells[0].source.startswith("# ")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder that it worked in, and all outputs in their order."""
    where, tour = tmp_path_factory.mktemp("tour"), nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(tour, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(where)}}).execute()
    return where, [output for cell in tour.cells for output in cell.get("outputs", ())]


@pytest.mark.processes
def test_the_numbers_are_those_of_the_run_files(executed: tuple[Path, list[Any]]) -> None:
    where, outputs = executed
    assert not [output for output in outputs if output["output_type"] == "stream"]  # no warnings
    printed = "\n".join(output["data"].get("text/plain", "") for output in outputs if "data" in output)
    run = load(where / "tour" / "fedtiny.h5")
    assert (run.attributes["finished"], run.attributes["rounds"]) == (True, 10)
    rounds = run.rounds
    sent = (rounds["bytes_up"] + rounds["bytes_down"]).sum()
    memory = rounds["max_client_memory"].max()
    assert f"accuracy {rounds['accuracy'].dropna().iloc[-1]:.4f}, sent {sent / 1e6:.2f} MB, largest client {memory / 1e3:.0f} kB" in printed
    last = run.clients("accuracy").dropna(how="all").iloc[-1]
    assert f"client {last.idxmin()} has the lowest accuracy, {last.min():.3f}; it holds" in printed
    kept = re.search(r"conv2\.weight \(32, 16, 3, 3\): (\d\.\d{3}) kept at the end", printed)
    assert kept is not None
    assert float(kept[1]) == pytest.approx(run.layers("density")["conv2"].iloc[-1], abs=5e-4)
    clients = pd.read_parquet(where / "tour" / "fedtiny-parquet" / "clients.parquet")
    assert clients["bytes_up"].sum() == rounds["bytes_up"].sum()


@pytest.mark.processes
def test_it_shows_figures_and_tables(executed: tuple[Path, list[Any]]) -> None:
    shown = [set(output["data"]) for output in executed[1] if "data" in output]
    assert sum("image/png" in kinds for kinds in shown) == 5
    assert sum("text/html" in kinds for kinds in shown) == 3
