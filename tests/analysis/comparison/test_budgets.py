"""Accuracy at equal cost and the cost of a target, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared_runs import NAN, write
from fedsim_analysis import comparison

TINY = {"name": "fedtiny", "density": 0.1}
CHEAP = {"bytes_up": 1.0, "bytes_down": 1.0, "train_flops": 40.0, "max_client_memory": 20.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> comparison.Comparison:
    """Dense: 10 B and 100 FLOPs a round, 50 B of memory; it is at 0.5 after 30 B and at 0.9 after 50 B. Tiny, two seeds: 2 B and 40 FLOPs
    a round, 20 B of memory; the one at 0.4 after 6 B and 0.6 after 10 B, the other at 0.3 and 0.5."""
    folder = tmp_path_factory.mktemp("runs")
    finals = {0: (0.1, NAN, 0.4, NAN, 0.6), 1: (0.1, NAN, 0.3, NAN, 0.5)}
    dense = [write(folder / "dense.h5", accuracies=(0.1, NAN, 0.5, NAN, 0.9))]
    return comparison.collect([*dense, *(write(folder / f"{seed}.h5", TINY, seed, values, each=CHEAP) for seed, values in finals.items())])


def at(found: comparison.Comparison, resource: str, **options: Any) -> list[dict[str, Any]]:
    table = comparison.at_equal(found, **options)
    return table[table["resource"] == resource].to_dict("records")


def test_the_budget_is_what_the_cheapest_group_spends(found: comparison.Comparison) -> None:
    dense, tiny = at(found, "bytes")
    assert dense["budget"] == tiny["budget"] == 10
    assert (tiny["seeds"], tiny["mean"], tiny["round"], tiny["spent"]) == (2, pytest.approx(0.55), 4, 10)
    assert tiny["mean_95"] == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t of one degree of freedom, and s / sqrt(2) = 0.05
    assert dense["seeds"] == 0  # round 0 is within 10 B, and precedes training
    assert dense["mean"] != dense["mean"]
    dense, tiny = at(found, "flops")
    assert dense["budget"] == 200
    assert (dense["seeds"], tiny["mean"]) == (0, pytest.approx(0.55))


@pytest.mark.parametrize(("budget", "accuracy", "r"), [(29.9, NAN, NAN), (30, 0.5, 2), (49, 0.5, 2), (50, 0.9, 4), (1e9, 0.9, 4)])
def test_the_last_evaluation_within_a_budget_counts(found: comparison.Comparison, budget: float, accuracy: float, r: float) -> None:
    dense, _ = at(found, "bytes", budgets={"bytes": budget})
    assert [dense["mean"], dense["round"]] == pytest.approx([accuracy, r], nan_ok=True)
    dense, _ = at(found, "flops", budgets={"flops": 10 * budget})
    assert [dense["mean"], dense["round"]] == pytest.approx([accuracy, r], nan_ok=True)


def test_differences_at_equal_cost_are_paired(found: comparison.Comparison) -> None:
    _, tiny = at(found, "bytes", budgets={"bytes": 30})
    assert (tiny["baseline"], tiny["pairs"], tiny["difference"]) == ("fedavg", 1, pytest.approx(0.6 - 0.5))


def test_memory_is_there_or_not(found: comparison.Comparison) -> None:
    dense, tiny = at(found, "memory")
    assert dense["budget"] == 50  # in which each method has a group that fits
    assert (dense["mean"], dense["spent"], tiny["mean"], tiny["spent"]) == (0.9, 50, pytest.approx(0.55), 20)
    dense, tiny = at(found, "memory", budgets={"memory": 49})
    assert (dense["seeds"], tiny["seeds"]) == (0, 2)


def test_the_best_of_a_method_is_marked(tmp_path: Path) -> None:
    grid = {0.1: (0.6, 20.0), 0.2: (0.7, 40.0), 0.5: (0.8, 60.0)}
    runs = [
        write(tmp_path / f"{density}.h5", TINY | {"density": density}, 0, (0.1, accuracy), each={"max_client_memory": memory})
        for density, (accuracy, memory) in grid.items()
    ]
    runs.append(write(tmp_path / "dense.h5", accuracies=(0.1, 0.9)))
    rows = {row["group"]: row for row in at(comparison.collect(runs), "memory")}
    assert {row["budget"] for row in rows.values()} == {50}
    assert [name for name, row in rows.items() if row["best"]] == ["fedavg", "fedtiny, density 0.2"]
    assert rows["fedtiny, density 0.5"]["seeds"] == 0


def test_a_target(found: comparison.Comparison) -> None:
    dense, tiny = comparison.to_target(found).to_dict("records")
    assert dense["target"] == pytest.approx(0.95 * 0.9)
    assert [dense[name] for name in ("seeds", "reached", "rounds", "bytes", "flops")] == [1, 1, 4, 50, 500]
    assert (tiny["reached"], tiny["seeds"]) == (0, 2)
    assert tiny["rounds"] != tiny["rounds"]
    dense, tiny = comparison.to_target(found, 0.5).to_dict("records")
    assert [dense[name] for name in ("reached", "rounds", "bytes", "flops")] == [1, 2, 30, 300]
    assert [tiny[name] for name in ("reached", "rounds", "bytes", "flops", "bytes_95")] == [2, 4, 10, 200, 0]
    assert comparison.to_target(found, 0.55)["reached"].tolist() == [1, 1]


def test_an_unfinished_run_sets_no_budget(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a.h5", accuracies=(0.1, 0.9)), write(tmp_path / "b.h5", TINY, 0, (0.1, 0.95), each=CHEAP, finished=False)]
    both = comparison.collect(runs)
    assert [row["budget"] for row in at(both, "bytes")] == [20, 20]
    assert comparison.to_target(both)["target"].tolist() == pytest.approx([0.95 * 0.9] * 2)
    alone = comparison.collect(runs[1:])
    assert at(alone, "bytes")[0]["budget"] == 4


def test_other_data_have_budgets_and_targets_of_their_own(tmp_path: Path) -> None:
    shapes = {"data": {"name": "shapes"}}
    runs = [
        write(tmp_path / "a.h5", accuracies=(0.1, 0.9)),
        write(tmp_path / "b.h5", TINY, 0, (0.1, 0.8), each=CHEAP),
        write(tmp_path / "c.h5", accuracies=(0.1, 0.5), job=shapes),
        write(tmp_path / "d.h5", TINY, 0, (0.1, 0.4), each=CHEAP | {"bytes_up": 2.0}, job=shapes),
    ]
    both = comparison.collect(runs)
    assert {row["group"]: row["budget"] for row in at(both, "bytes")} == {
        "fedavg, data digits": 4,
        "fedavg, data shapes": 6,
        "fedtiny, data digits": 4,
        "fedtiny, data shapes": 6,
    }
    assert comparison.to_target(both)["target"].tolist() == pytest.approx([0.95 * 0.9, 0.95 * 0.5] * 2)
    assert comparison.paired(both, ["accuracy"])["difference"].tolist() == pytest.approx([NAN, NAN, -0.1, -0.1], nan_ok=True)
    assert comparison.paired(both, ["accuracy"])["baseline"].tolist() == [f"fedavg, data {name}" for name in ("digits", "shapes")] * 2


def test_a_file_without_costs(tmp_path: Path) -> None:
    """As one of an old format: nothing is known, and nothing is made up."""
    nothing = dict.fromkeys(("bytes_up", "bytes_down", "train_flops", "max_client_memory"), NAN)
    table = comparison.at_equal(comparison.collect([write(tmp_path / "a.h5", each=nothing)]))
    assert table["mean"].isna().all()
    assert table["budget"].isna().all()
    assert comparison.to_target(comparison.collect([tmp_path / "a.h5"]))["bytes"].isna().all()
