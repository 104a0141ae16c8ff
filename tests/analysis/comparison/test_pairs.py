"""Which runs are pairs, and which group each one is held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared_runs import NAN, write
from fedsim_analysis import comparison
from fedsim_analysis.comparison import outcomes, pairs
from fedsim_analysis.comparison.metrics import NEEDED
from scipy.stats import wilcoxon

TINY = {"name": "fedtiny", "density": 0.1}
APART = {
    "other seed": {"seed": 1},
    "other data (data.name)": {"job": {"data": {"name": "shapes"}}},
    "other partition (partition.name)": {"job": {"partition": {"name": "shards"}}, "partition_sha256": "x"},
    "other partition (partition_sha256)": {"partition_sha256": "x"},
    "a file does not say who holds which images": {"partition_sha256": ""},
    "other images or labels (data_sha256)": {"data_sha256": "x"},
    "other cohorts (cohort.size)": {"job": {"cohort": {"size": 3}}},
    "other cohorts (clients/in_cohort)": {"cohorts": {1: (1, 2), 2: (2, 3)}},
    "other first weights (model.width)": {"job": {"model": {"width": 8}}},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "another method": {"method": TINY},
    "other training": {"job": {"train": {"lr": 0.2}, "execution": {"packs": 3}}},
    "gates, which come after the first weights": {"job": {"model": {"gate_l1": 0.1}}},
    "what is done with images, and where they lie": {"job": {"data": {"augment": ["crop"], "root": "/elsewhere"}}},
    "further clients in one round": {"cohorts": {2: (0, 1, 2, 3)}},
    "shorter": {"accuracies": (0.1, 0.2)},
    "of a file that does not say which images it had": {"data_sha256": ""},
    "own code of the method alone": {"own_code_sha256": "x"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "run.h5")


def obstacle(plain: Path, other: Path) -> str | None:
    return pairs.obstacle(*outcomes.read([plain, other], NEEDED))


@pytest.mark.parametrize("why", APART)
def test_runs_that_are_no_pair(why: str, plain: Path, tmp_path: Path) -> None:
    assert obstacle(plain, write(tmp_path / "other.h5", **APART[why])) == why


@pytest.mark.parametrize("why", TOGETHER)
def test_runs_that_are_one(why: str, plain: Path, tmp_path: Path) -> None:
    assert obstacle(plain, write(tmp_path / "other.h5", **TOGETHER[why])) is None


def test_models_of_other_code_are_no_pair(tmp_path: Path) -> None:
    own = {"job": {"model": {"factory": "mine:net"}}}
    runs = [write(tmp_path / f"{code}.h5", own_code_sha256=code, **own) for code in ("a", "b", "c")]
    one, other, _ = outcomes.read(runs, NEEDED)
    assert pairs.obstacle(one, other) == "other first weights (own_code_sha256)"
    assert pairs.obstacle(one, one) is None


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> comparison.Comparison:
    """Dense, and two that keep less; seeds 0 to 2, of which the sparsest lacks one."""
    folder = tmp_path_factory.mktemp("three")
    finals = {"fedavg": (0.9, 0.8, 0.7), 0.1: (0.8, 0.75, 0.68), 0.01: (0.5, 0.4)}
    runs = []
    for density, values in finals.items():
        method = "fedavg" if density == "fedavg" else TINY | {"density": density}
        runs += [write(folder / f"{density}-{seed}.h5", method, seed, (0.1, final)) for seed, final in enumerate(values)]
    return comparison.collect(runs)


def test_differences_by_hand(three: comparison.Comparison) -> None:
    table = comparison.paired(three, ["accuracy"])
    assert table["group"].tolist() == ["fedavg", "fedtiny, density 0.01", "fedtiny, density 0.1"]
    assert table["baseline"].tolist() == ["fedavg"] * 3
    assert table["pairs"].tolist() == [0, 2, 3]
    assert table["difference"].tolist() == pytest.approx([NAN, (-0.4 - 0.4) / 2, (-0.1 - 0.05 - 0.02) / 3], nan_ok=True)
    spread = np.std([-0.1, -0.05, -0.02], ddof=1)
    assert table["difference_95"].tolist() == pytest.approx([NAN, 0, 4.302653 * spread / 3**0.5], nan_ok=True, abs=1e-6)
    assert table["p"].tolist() == pytest.approx([NAN, 0.5, 0.25], nan_ok=True)
    assert table["p_holm"].tolist() == pytest.approx([NAN, 0.5, 0.5], nan_ok=True)
    assert table["why_not"].tolist() == ["", "", ""]


def test_six_pairs_may_be_significant(plain: Path) -> None:
    """Six differences of one sign have p = 2^-5; Holm takes the smallest of three p values three times."""
    (run,) = outcomes.read([plain], NEEDED)
    finals = {"fedavg": [0.5] * 6, "a": [0.6] * 6, "b": [0.4, 0.41, 0.42, 0.43, 0.44, 0.45], "c": [0.6, 0.39, 0.62, 0.37, 0.64, 0.35]}
    made = []
    for method, values in finals.items():
        seeds = [replace(run, seed=seed, columns=run.columns | {"accuracy": np.array([value])}) for seed, value in enumerate(values)]
        made.append(comparison.Group({"method.name": method}, tuple(seeds), method, "digits"))
    table = comparison.paired(comparison.Comparison(tuple(made), ("method.name",)), ["accuracy"]).set_index("group")
    assert table["pairs"].tolist() == [0, 6, 6, 6]
    assert table["p"].tolist() == pytest.approx([NAN, 2**-5, 2**-5, wilcoxon(np.array(finals["c"]) - 0.5).pvalue], nan_ok=True)
    assert table["p_holm"].tolist() == pytest.approx([NAN, 3 * 2**-5, 3 * 2**-5, table["p"].iloc[3]], nan_ok=True)


def test_another_baseline(three: comparison.Comparison) -> None:
    for wanted in ("density=0.1", "method.density=0.1", "fedtiny, density 0.1", "fedtiny,density=0.1"):
        assert set(comparison.paired(three, ["accuracy"], wanted)["baseline"]) == {"fedtiny, density 0.1"}
    with pytest.raises(ValueError, match=r"--baseline fedmef: no row is this; .* The rows are: fedavg; fedtiny, density 0.01; fedtiny"):
        comparison.paired(three, ["accuracy"], "fedmef")


def test_without_a_dense_method_the_first_row_is_the_baseline(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a.h5", TINY), write(tmp_path / "b.h5", "fedavg", job={"model": {"match": "params"}})]
    table = comparison.paired(comparison.collect(runs), ["accuracy"])
    assert table["baseline"].tolist() == ["fedavg, match params"] * 2
    assert table["why_not"].tolist() == ["", "other first weights (model.match)"]


def test_in_a_sweep_each_row_has_the_baseline_of_its_own_setting(tmp_path: Path) -> None:
    runs = []
    for lr in (0.1, 0.2):
        for method in ("fedavg", TINY, TINY | {"density": 0.2}):
            runs.append(write(tmp_path / f"{len(runs)}.h5", method, job={"train": {"lr": lr}}))
    table = comparison.paired(comparison.collect(runs), ["accuracy"]).set_index("group")["baseline"]
    settings = [f"lr {lr}" for lr in (0.1, 0.2)]
    rows = [f"fedavg, {lr}" for lr in settings] + [f"fedtiny, {lr}, density {d}" for lr in settings for d in (0.1, 0.2)]
    assert table.to_dict() == {row: f"fedavg, {row.split(', ')[1]}" for row in rows}


def test_of_dense_runs_alone_the_first_row_is_the_baseline(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"{lr}.h5", job={"train": {"lr": lr}}, accuracies=(0.1, lr)) for lr in (0.2, 0.1, 0.4)]
    table = comparison.paired(comparison.collect(runs), ["accuracy"])
    assert table["baseline"].tolist() == ["fedavg, lr 0.1"] * 3
    assert table["difference"].tolist() == pytest.approx([NAN, 0.1, 0.3], nan_ok=True)


def test_a_run_that_goes_on_is_a_pair_and_one_without_a_number_is_not(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a.h5"), write(tmp_path / "b.h5", TINY, accuracies=(NAN, NAN), finished=False)]
    row = comparison.paired(comparison.collect(runs), ["accuracy", "bytes"]).to_dict("records")
    assert (row[1]["pairs"], row[1]["why_not"], row[1]["unfinished"]) == (0, "a run has no such number", 1)
    assert (row[3]["pairs"], row[3]["difference"]) == (1, 20 - 30)
