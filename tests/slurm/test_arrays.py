"""How the runs of a sweep become job arrays: every run once, no task number at or beyond MaxArraySize."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import BadInput
from fedsim.slurm import arrays
from fedsim.slurm.arrays import Array, Limits


@given(
    st.sets(st.integers(0, 400), min_size=1),
    st.integers(1, 50),
    st.one_of(st.none(), st.integers(1, 60)),
    st.one_of(st.none(), st.integers(1, 500)),
)
def test_every_run_is_in_one_array_that_the_site_allows(indices: set[int], size: int, tasks: int | None, limit: int | None) -> None:
    try:
        found = arrays.cut(sorted(indices), Limits(size, tasks), limit)
    except BadInput:
        assert limit is not None
        assert len(arrays.cut(sorted(indices), Limits(size, tasks), None)) > limit
        return
    assert [index for array in found for index in array.indices] == sorted(indices)
    for array in found:
        assert array.offset % size == 0
        assert array.tasks[0] >= 0
        assert array.tasks[-1] < size
        assert tasks is None or len(array.tasks) <= tasks
    if limit is not None:
        assert sum(array.at_once or 0 for array in found) == limit
        assert all(array.at_once for array in found)


def test_a_thousand_runs_more_than_an_array_may_have() -> None:
    found = arrays.cut(range(2500), Limits(1001), None)
    assert [(array.offset, array.spec) for array in found] == [(0, "0-1000"), (1001, "0-1000"), (2002, "0-497")]
    assert [array.spec for array in arrays.cut([3, 4, 7], Limits(1001), 2)] == ["3-4,7%2"]
    assert Array(10, (0, 2), 1).spec == "0,2%1"


def test_a_line_of_sbatch_holds_the_tasks_however_scattered() -> None:
    scattered = range(0, 20_000, 2)
    found = arrays.cut(scattered, Limits(100_001), None)
    assert [index for array in found for index in array.indices] == list(scattered)
    assert max(len(array.spec) for array in found) < 4000  # sbatch reads lines of 8,192 bytes


@pytest.mark.parametrize(
    ("spec", "positions", "limit"),
    [
        ("", [0, 1, 2, 3, 4, 5], None),
        ("%4", [0, 1, 2, 3, 4, 5], 4),
        ("0-2", [0, 1, 2], None),
        ("5,1-3:2%1", [1, 3, 5], 1),
        ("4", [4], None),
    ],
)
def test_which_runs_the_option_array_chooses(spec: str, positions: list[int], limit: int | None) -> None:
    assert (arrays.chosen(spec, 6), arrays.at_once(spec)) == (positions, limit)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("6", "there is no run 6; there are 6 runs, 0 to 5"),
        ("0-999999999", "there is no run 999999999"),
        ("3-1", "'3-1' has no number in it"),
        ("0-3:0", "has no number in it"),
        ("a", "'a' is no number and no span"),
        ("1,,2", "'' is no number and no span"),
        ("-1", "'-1' is no number and no span"),
        ("0-3%0", "at least 1"),
        ("%", "at least 1"),
        ("%²", "at least 1"),
    ],
)
def test_a_wrong_option_array_is_refused(spec: str, why: str) -> None:
    with pytest.raises(BadInput) as error:
        (arrays.check if "%" in spec else lambda text: arrays.chosen(text, 6))(spec)
    assert str(error.value).startswith(f"array {spec!r}: ")
    assert why in str(error.value)
