"""measures: the numbers of figures against numbers computed by hand from tiny run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fedsim_analysis
import numpy as np
import pytest
from drawn_runs import COUNTS, write
from fedsim_analysis import measures
from fedsim_analysis.measures import Lacking
from fedsim_analysis.measures.groups import text_of

T2 = 12.706204736432095  # Student's t, 97.5 %, one degree of freedom
HALF = T2 / 2  # of the interval of the mean of two numbers, as a multiple of their difference
OTHER_MASKS = ((True, True, True, False),)


def paths(runs: Any) -> list[str]:
    found: list[str] = runs["rounds"]["path"].values.tolist()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two seeds of fedtiny, the second sends twice as much; two of dense fedavg."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "a.h5", (0.1, np.nan, 0.3))
    write(folder / "b.h5", (0.2, np.nan, 0.7), seed=1, scale=2)
    write(folder / "c.h5", (0.2, np.nan, 0.5), "fedavg", fields="", masks=None)
    write(folder / "d.h5", (0.2, np.nan, 0.6), "fedavg", seed=1, fields="", masks=None)
    return fedsim_analysis.open(folder)


def test_runs_that_differ_in_the_seed_alone_are_a_group(runs: Any) -> None:
    tiny, dense = measures.groups(runs)
    assert (tiny.label, tiny.method, tiny.runs, tiny.seeds, tiny.places) == ("fedtiny", "fedtiny", ("a", "b"), (0, 1), (0, 1))
    assert (dense.label, dense.runs, dense.finished) == ("fedavg", ("c", "d"), True)


def test_labels_have_the_fields_in_which_groups_of_a_method_differ(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", fields="density = 0.1\nkeep = true")
    write(tmp_path / "b.h5", fields="density = 0.25\nkeep = true")
    write(tmp_path / "c.h5", method="fedmef", planned=5)
    write(tmp_path / "d.h5", (0.1, 0.2), method="fedmef")
    found = measures.groups(fedsim_analysis.open(tmp_path))
    assert [group.label for group in found] == ["fedtiny, density 0.1", "fedtiny, density 0.25", "fedmef, rounds 5", "fedmef, rounds 1"]
    assert [group.finished for group in found] == [True, True, False, True]
    assert found[0].style.colour != found[1].style.colour != found[2].style.colour


def test_one_seed_twice_is_no_group(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5")
    assert [group.label for group in measures.groups(fedsim_analysis.open(tmp_path))] == ["fedtiny, a", "fedtiny, b"]


def test_nodes_and_single_runs_give_the_same(runs: Any) -> None:
    whole = measures.curves(runs, "accuracy")
    for held in (fedsim_analysis.open(paths(runs)[:2], group="rounds"), runs["rounds"]):
        np.testing.assert_array_equal(measures.curves(held, "accuracy")[0].mean, whole[0].mean)
    (alone,) = measures.curves(runs["rounds"].to_dataset().sel(run="b"), "accuracy")
    assert (alone.label, alone.mean.tolist(), alone.n.tolist()) == ("fedtiny", [0.2, 0.7], [1, 1])
    bare = measures.groups(runs["rounds"].to_dataset().drop_vars("method"))
    assert [group.label for group in bare] == ["a", "b", "c", "d"]


def test_curves_are_mean_and_interval_over_seeds(runs: Any) -> None:
    one = measures.curves(runs, "accuracy")[0]
    np.testing.assert_allclose(one.mean, [0.15, 0.5])
    np.testing.assert_allclose(one.high - one.mean, [0.1 * HALF, 0.4 * HALF])
    np.testing.assert_allclose(one.mean - one.low, [0.1 * HALF, 0.4 * HALF])
    assert (one.x.tolist(), one.rounds.tolist(), one.n.tolist()) == ([0, 2], [0, 2], [2, 2])
    assert (one.y_label, one.units, one.share, one.x_label) == ("Test accuracy", "1", True, "Round")
    assert measures.note_of([one]) == "mean and 95 % interval of 2 seeds"


@pytest.mark.parametrize(
    ("over", "x", "units"),
    [("bytes", [0, 1.5 * 33], "B"), ("flops", [0, 3000], "FLOP"), ("seconds", [2, 6], "s"), ("memory", [102], "B")],
)
def test_a_point_stands_at_the_mean_of_what_its_runs_have_spent(runs: Any, over: str, x: list[float], units: str) -> None:
    one = measures.curves(runs, "accuracy", over)[0]
    np.testing.assert_allclose(one.x, x)  # no client has computed in round 0, so that nothing is known of its memory
    np.testing.assert_allclose(one.mean, [0.15, 0.5][-len(x) :])
    assert one.x_units == units


def test_costs_add_up_or_are_of_each_round(runs: Any) -> None:
    assert measures.curves(runs, "bytes")[1].mean.tolist() == [0, 11, 33]
    assert measures.curves(runs, "bytes", per_round=True)[1].mean.tolist() == [0, 11, 22]
    assert measures.curves(runs, "memory")[0].mean.tolist() == [101, 102]
    assert measures.curves(runs, "train_loss")[0].mean.tolist() == [2, 1, 0]
    assert measures.curves(runs, "bytes_down")[1].mean.tolist() == [0, 10, 20]


def test_a_shorter_run_leaves_its_group_at_its_end(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", (0.1, 0.2), planned=3)
    write(tmp_path / "b.h5", (0.3, 0.4, 0.5, 0.6), seed=1)
    (one,) = measures.curves(fedsim_analysis.open(tmp_path), "accuracy", "bytes")
    assert (one.n.tolist(), one.finished) == ([2, 2, 1, 1], False)
    np.testing.assert_allclose(one.mean, [0.2, 0.3, 0.5, 0.6])
    np.testing.assert_allclose(one.x, [0, 11, 33, 66])
    assert np.isnan(one.low).tolist() == [False, False, True, True]
    assert measures.note_of([one]) == "mean and 95 % interval of 1 to 2 seeds"


def test_what_the_runs_lack_is_said(runs: Any) -> None:
    with pytest.raises(Lacking, match=r"there is no metric 'acuracy'; there are accuracy, loss.*bytes_up"):
        measures.curves(runs, "acuracy")
    with pytest.raises(Lacking, match=r"there is no axis 'byte'; there are round, bytes, flops, memory, seconds"):
        measures.curves(runs, "accuracy", "byte")
    with pytest.raises(Lacking, match=r"no run has measured rounds/server_flops"):
        measures.curves(runs, "server_flops")
    with pytest.raises(Lacking, match=r"no column layers/density; give the DataTree of fedsim_analysis.open\(RUNS\), or its node 'layers'"):
        measures.layer_density(runs["rounds"].to_dataset())
    with pytest.raises(Lacking, match=r"no run 'z'; the runs are a, b, c, d"):
        measures.partition(runs, "z")
    with pytest.raises(Lacking, match=r"no group 'z'; the groups are fedtiny; fedavg"):
        measures.layer_density(runs, group="z")


def test_density_of_layers(runs: Any) -> None:
    found = measures.layer_density(runs)
    assert (found.rows, found.columns, found.label, found.n) == (("conv1", "fc"), ("0", "1", "2"), "fedtiny", 2)
    assert found.values.tolist() == [[1, 1, 1], [0.5, 0.5, 0.75]]
    assert measures.layer_density(runs, run="c").values[1].tolist() == [1, 1, 1]


def test_churn_is_what_came_and_went_over_what_is_kept(runs: Any) -> None:
    (one,) = measures.churn(runs)  # fedavg has no masks
    assert (one.label, one.rounds.tolist()) == ("fedtiny", [1, 2])
    np.testing.assert_allclose(one.mean, [2 / 2, 1 / 3])
    with pytest.raises(Lacking, match="needs the nodes 'layers' and 'masks'"):
        measures.churn(runs["layers"].to_dataset())
    with pytest.raises(Lacking, match="no run has masks: the networks are dense"):
        measures.churn(runs.isel(run=[2, 3]))


@pytest.mark.parametrize(
    ("against", "rounds", "values"),
    [("first", [0, 1, 2], [1, 1 / 3, 1 / 4]), ("previous", [1, 2], [1 / 3, 2 / 3]), ("last", [0, 1, 2], [1 / 4, 2 / 3, 1])],
)
@pytest.mark.parametrize("node", [None, "masks"])
def test_overlap_is_jaccard(runs: Any, against: Any, rounds: list[int], values: list[float], node: str | None) -> None:
    (one,) = measures.overlap(runs[node].to_dataset() if node else runs, against)
    assert one.rounds.tolist() == rounds
    np.testing.assert_allclose(one.mean, values)


def test_a_mask_that_stays_is_its_own_predecessor(tmp_path: Path) -> None:
    write(
        tmp_path / "a.h5", (0.1, 0.2, 0.3, 0.4), masks=((True, True, False, False), (True, True, False, False), (True, False, True, False))
    )
    (one,) = measures.overlap(fedsim_analysis.open(tmp_path), "previous")
    np.testing.assert_allclose(one.mean, [1, 1 / 3, 1])


def test_overlap_of_rounds_and_of_runs(runs: Any, tmp_path: Path) -> None:
    rounds = measures.overlap_of_rounds(runs)
    np.testing.assert_allclose(rounds.values, [[1, 1 / 3, 1 / 4], [1 / 3, 1, 2 / 3], [1 / 4, 2 / 3, 1]])
    assert measures.overlap_of_rounds(runs, most=2).columns == ("0", "2")
    with pytest.raises(Lacking, match="the run c has no masks"):
        measures.overlap_of_rounds(runs, "c")
    write(tmp_path / "e.h5", masks=OTHER_MASKS)
    ends = measures.overlap_of_runs(fedsim_analysis.open([*paths(runs), tmp_path / "e.h5"]))
    assert ends.rows == ("a", "b", "e")  # a and b end with 1011, e with 1110
    np.testing.assert_allclose(ends.values, [[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]])


def test_clients_are_spread(runs: Any) -> None:
    one = measures.distribution(runs)[0]
    assert (one.rounds.tolist(), one.clients.tolist(), one.n.tolist()) == ([0, 2], [3, 3], [2, 2])
    by_level = dict(zip(one.levels, one.quantiles, strict=True))
    np.testing.assert_allclose(by_level[0.5], [0.05, 0.4])  # of each run the accuracy less 0.1, then the mean
    np.testing.assert_allclose(by_level[0.0], [-0.05, 0.3])
    np.testing.assert_allclose(by_level[0.9], [0.13, 0.48])
    last = measures.of_clients(runs, "b")
    assert (last.round, last.worst, last.clients) == (2, "2", ("0", "1", "2"))
    np.testing.assert_allclose(last.values, [0.7, 0.6, 0.5])
    assert measures.curves(runs, "worst_client")[0].mean.tolist() == pytest.approx([-0.05, 0.3])


def test_partition(runs: Any, tmp_path: Path) -> None:
    found = measures.partition(runs, "b")
    assert (found.rows, found.columns, found.label) == (("0", "1", "2"), ("0", "1"), "b")
    np.testing.assert_array_equal(found.values, COUNTS)
    write(tmp_path / "a.h5", called={"client": ["$x$", "y", "z"], "class": ["cat", "dog"]})
    named = measures.partition(fedsim_analysis.open(tmp_path))
    assert (named.rows, named.columns) == (("$x$", "y", "z"), ("cat", "dog"))


def test_phases(runs: Any) -> None:
    one = measures.phases(runs)[0]
    found = dict(zip(one.phases, one.total, strict=True))
    assert (found["compute"], found["evaluate"], found["server"]) == (6, 1.5, 0)
    assert one.seconds[one.phases.index("compute")].tolist() == [1, 2, 3]
    assert one.phases[:2] == ("broadcast", "compute")
    assert one.n == 2


def test_paired_differences(runs: Any, tmp_path: Path) -> None:
    (one,) = measures.differences(runs)  # 0.3 - 0.5 and 0.7 - 0.6
    assert (one.label, one.against, one.seeds, one.unpaired) == ("fedtiny", "fedavg", (0, 1), "")
    np.testing.assert_allclose(one.values, [-0.2, 0.1])
    np.testing.assert_allclose([one.mean, one.high], [-0.05, -0.05 + 0.3 * HALF])
    (other,) = measures.differences(runs, against="fedtiny")
    np.testing.assert_allclose(other.values, [0.2, -0.1])
    with pytest.raises(Lacking, match="there is one group alone"):
        measures.differences(runs.isel(run=[0, 1]))
    write(tmp_path / "e.h5", method="fedavg", seed=7, fields="", masks=None)
    with pytest.raises(Lacking, match=r"no two runs of different groups are a pair \(fedtiny: other seed\)"):
        measures.differences(fedsim_analysis.open([paths(runs)[0], tmp_path / "e.h5"]))


def test_numbers_in_labels_have_the_digits_that_tell_them_apart() -> None:
    assert text_of(1 / 3, [1 / 3, 0.5]) == "0.333333"
    assert text_of(0.12345671, [0.12345671, 0.12345672]) == "0.12345671"
    assert text_of(1 / 3) == "0.3333333333333333"
    assert text_of(10.0) == "10"
