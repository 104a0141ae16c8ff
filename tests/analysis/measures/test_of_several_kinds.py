"""measures of runs that differ in more than the method: other networks, other data, nothing measured, long numbers."""

from __future__ import annotations

from pathlib import Path

import compared_runs
import fedsim_analysis
import numpy as np
import pytest
from drawn_runs import write
from fedsim_analysis import measures, plots
from fedsim_analysis.report import sparsity, tradeoffs

NAN = float("nan")


def test_masks_of_a_run_give_the_same_whatever_network_other_runs_have(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", method="fedmef", layers=("conv1", "other"))
    write(tmp_path / "c.h5", method="structured", layers=("fc", "other", "conv1"))
    runs = fedsim_analysis.open(tmp_path)
    for found in (measures.churn(runs), measures.overlap(runs)):
        assert [one.method for one in found] == ["fedtiny", "fedmef", "structured"]
        assert [one.mean[-2:].tolist() for one in found] == [found[0].mean[-2:].tolist()] * 3
    np.testing.assert_allclose(measures.overlap(runs)[0].mean, [1, 1 / 3, 1 / 4])
    np.testing.assert_array_equal(measures.overlap_of_runs(runs).values, np.where(np.eye(3), 1, NAN))
    plots.mask_overlap(runs, "runs")


def test_a_share_above_one_is_shown(tmp_path: Path) -> None:
    dense, sparse = (True,) * 4, (True, False, False, False)
    runs = fedsim_analysis.open(write(tmp_path / "a.h5", masks=(dense, sparse)))
    assert measures.churn(runs)[0].mean[0] == 3  # 3 weights left, 1 is kept
    assert plots.mask_churn(runs).get_ylim()[1] >= 300
    assert sparsity.changes(runs).chart["layout"]["yaxis"]["range"][1] >= 300


def test_a_run_that_has_never_measured_a_cost_has_none(tmp_path: Path) -> None:
    compared_runs.write(tmp_path / "a.h5", "fedavg")
    compared_runs.write(tmp_path / "b.h5", "fedmef", each={"bytes_up": NAN, "bytes_down": NAN})
    runs = fedsim_analysis.open(tmp_path)
    assert [point.cost for point in measures.pareto(runs).points] == [30]
    assert measures.final(runs, measures.METRICS["bytes"]).tolist() == pytest.approx([30, NAN], nan_ok=True)


def test_phases_are_of_the_runs_that_have_measured_them(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", seed=1, accuracies=(), planned=2)
    (one,) = measures.phases(fedsim_analysis.open(tmp_path))
    assert (one.total[one.phases.index("compute")], one.n) == (6, 1)


def test_long_numbers_tell_groups_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", fields="density = 0.12345671")
    write(tmp_path / "b.h5", fields="density = 0.12345672")
    write(tmp_path / "c.h5", fields="density = 1\nother = 2")
    labels = [group.label for group in measures.groups(fedsim_analysis.open(tmp_path))]
    assert labels == ["fedtiny, density 0.12345671", "fedtiny, density 0.12345672", "fedtiny, density 1, other 2"]


def test_each_data_set_and_each_setting_has_its_own_baseline(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for rate in (0.1, 0.2):
            job = {"data": {"name": name}, "train": {"lr": rate}}
            for seed in (0, 1):
                compared_runs.write(tmp_path / f"{name}{rate}-{seed}.h5", "fedavg", seed, (0.1, 0.5), job=job)
                compared_runs.write(tmp_path / f"{name}{rate}+{seed}.h5", "fedmef", seed, (0.1, 0.4 + rate), job=job)
    runs = fedsim_analysis.open(tmp_path)
    found = measures.differences(runs)
    assert [round(one.mean, 9) for one in found] == [0, 0.1, 0, 0.1]
    shown = tradeoffs.pairs(runs)
    assert "Each job less its baseline" in shown.caption
    assert found[-1].against in shown.caption
