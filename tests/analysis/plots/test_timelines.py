"""Timelines of devices, and comparisons at equal time and energy, of files whose every number is known."""

from __future__ import annotations

from pathlib import Path

import fedsim_analysis
import numpy as np
import pytest
from compared_runs import write
from fedsim_analysis import comparison, measures, plots
from fedsim_analysis.measures.clients import STATUS
from fedsim_analysis.report.devices import builders
from matplotlib.colors import to_hex

from fedsim.fleet.timed.state import STATUS as CODES
from fedsim.storage.columns import COLUMNS, OF_DEVICES
from fedsim.storage.writer import RunWriter

LASTED = [0.0, 10.0, 20.0, 30.0]
# client -> begun, ended, status, in each of the rounds 1 to 3
SPANS = {0: [(0, 10, 0), (0, 12, 0), (0, 30, 0)], 2: [(0, 4, 2), (5, 40, 1), None]}


def timed(path: Path) -> Path:
    """A run of three rounds, two of whose clients are asked."""
    needed = {name: COLUMNS[name] for name in ("rounds/accuracy", "clients/in_cohort")} | OF_DEVICES
    job = 'seed = 0\n[data]\nname = "digits"\n[method]\nname = "fedavg"\n'
    attributes = {"job": job, "seed": 0, "method": "fedavg", "partition_sha256": "a"}
    with RunWriter.create(path, attributes=attributes, layers=["fc"], clients=4, columns=needed) as record:
        for r, lasted in enumerate(LASTED):
            rows = {client: spans[r - 1] for client, spans in SPANS.items() if r and spans[r - 1]}
            ids = np.array(sorted(rows), dtype=np.int64)
            clients = {
                name: (ids, np.array([rows[k][i] for k in sorted(rows)], float)) for i, name in enumerate(("begun", "ended", "status"))
            }
            values = {"accuracy": 0.1 * r, "round_time": lasted, "clock": sum(LASTED[: r + 1]), "energy": 2.0 * r}
            record.row(r, values, clients if rows else {})
    return path


@pytest.fixture
def runs(tmp_path: Path):  # type: ignore[no-untyped-def]
    return fedsim_analysis.open(timed(tmp_path / "run.h5"))


def test_the_codes_are_those_of_the_engine() -> None:
    assert STATUS == CODES


def test_bars_stand_where_the_clock_says(runs) -> None:
    found = measures.timeline(runs)
    assert found.ends.tolist() == [10, 30, 60]
    bars = sorted(zip(found.round_of, found.clients, found.begun, found.ended, found.status, strict=True))
    assert bars == [(1, 0, 0, 10, 0), (1, 2, 0, 4, 2), (2, 0, 10, 22, 0), (2, 2, 15, 50, 1), (3, 0, 30, 60, 0)]
    assert found.counts == {"answered": 3, "late": 1, "failed": 1}
    assert measures.timeline(runs, rounds=[2]).clients.tolist() == [0, 2]


def test_the_figure_has_a_bar_for_each_and_a_line_at_each_end(runs) -> None:
    ax = plots.timeline(runs)
    bars = {(bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in ax.patches}
    assert (15.0, 35.0, "#ee9922") in bars
    assert len(ax.patches) == 5
    assert [line.get_xdata()[0] for line in ax.lines] == [10, 30, 60]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]


def test_runs_without_devices_have_no_timeline_and_no_section(tmp_path) -> None:
    runs = fedsim_analysis.open(write(tmp_path / "plain.h5"))
    with pytest.raises(measures.Lacking, match="no column rounds/clock"):
        plots.timeline(runs)
    assert builders(runs) == []


def test_unknown_rounds_are_refused(runs) -> None:
    with pytest.raises(measures.Lacking, match="has no round 9; it has 0 to 3"):
        measures.timeline(runs, rounds=[9])


def test_accuracy_over_the_clock_and_the_energy(runs) -> None:
    (over,) = measures.curves(runs, "accuracy", over="clock")
    assert over.x.tolist() == [0, 10, 30, 60]
    (over,) = measures.curves(runs, "accuracy", over="energy")
    assert over.x.tolist() == [0, 2, 6, 12]


def test_the_page_of_a_report_has_a_section_of_devices(runs) -> None:
    names = [name for name, _ in builders(runs)]
    assert names == ["accuracy over time", "accuracy over energy", "when devices worked"]
    chart = dict(builders(runs))["when devices worked"]().chart
    assert [trace["name"] for trace in chart["data"]] == ["answered", "late", "failed"]


def fast_and_slow(tmp_path: Path) -> list[Path]:
    """Two methods: one reaches more, the other is there sooner."""
    slow = {"round_time": [0.0, 50.0, 50.0], "energy": [0.0, 5.0, 5.0]}
    fast = {"round_time": [0.0, 10.0, 10.0], "energy": [0.0, 9.0, 9.0]}
    return [
        write(tmp_path / "slow.h5", "fedavg", accuracies=(0.1, 0.5, 0.8), each=slow),
        write(tmp_path / "fast.h5", "fedtiny", accuracies=(0.1, 0.4, 0.7), each=fast),
    ]


def test_accuracy_at_equal_time_and_energy(tmp_path) -> None:
    found = comparison.collect(fast_and_slow(tmp_path))
    table = comparison.at_equal(found, {"clock": 60.0, "energy": 10.0}).set_index(["resource", "method.name"])
    assert table.loc[("clock", "fedavg"), "mean"] == 0.5
    assert table.loc[("clock", "fedtiny"), "mean"] == 0.7
    assert table.loc[("energy", "fedavg"), "mean"] == 0.8
    assert table.loc[("energy", "fedtiny"), "mean"] == 0.4
    assert table.loc[("clock", "fedavg"), "spent"] == 50


def test_time_and_energy_to_a_target(tmp_path) -> None:
    table = comparison.to_target(comparison.collect(fast_and_slow(tmp_path)), 0.6).set_index("method.name")
    assert table.loc["fedavg", ["clock", "energy"]].tolist() == [100, 10]
    assert table.loc["fedtiny", ["clock", "energy"]].tolist() == [20, 18]


def test_without_devices_nothing_is_compared_at_equal_time(tmp_path) -> None:
    found = comparison.collect([write(tmp_path / "a.h5"), write(tmp_path / "b.h5", "fedtiny")])
    assert set(comparison.at_equal(found)["resource"]) == {"bytes", "flops", "memory"}
    assert "clock" not in comparison.to_target(found)
