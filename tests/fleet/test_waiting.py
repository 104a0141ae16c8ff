"""A rank that waits looks often enough to oversleep little, and seldom where a wait has always taken long."""

from __future__ import annotations

import pytest

from fedsim.fleet.mpi.waiting import LONG, SHORT, Waiting


def waited(waiting: Waiting, kind: object, seconds: float) -> tuple[int, float]:
    """How often a rank looks until something comes after so many seconds, and how long it oversleeps it."""
    now, looks = 0.0, 0
    while now < seconds:
        looks += 1
        now += waiting.pause(kind, now)
    waiting.ended(kind, now)
    return looks, now - seconds


@pytest.mark.parametrize("seconds", [0.0005, 0.003, 0.02, 0.09])
def test_a_first_wait_is_overslept_by_a_two_hundredth_at_most(seconds: float) -> None:
    looks, late = waited(Waiting(), "reply", seconds)
    assert late <= max(SHORT, seconds / 200) + 1e-9
    assert looks <= seconds / SHORT + 1


def test_a_wait_as_long_as_the_two_before_it_takes_few_looks_and_is_overslept_as_little() -> None:
    waiting = Waiting()
    first, _ = waited(waiting, "reply", 0.02)
    waited(waiting, "reply", 0.02)
    looks, late = waited(waiting, "reply", 0.02)
    assert looks < first / 3
    assert late <= 0.02 / 200 + 1e-9


def test_a_shorter_wait_than_usual_is_overslept_by_an_eighth_of_the_usual_time_and_two_milliseconds_at_most() -> None:
    for usual in (0.004, 0.02, 1.0):
        waiting = Waiting()
        for _ in range(3):
            waited(waiting, "reply", usual)
        _, late = waited(waiting, "reply", usual / 10)
        assert late <= min(LONG, usual / 8) + 1e-9
        assert waiting.pause("another", 0.0) == waiting.pause(None, 0.0) == SHORT


def test_of_waits_that_take_turns_the_shorter_is_the_usual_one() -> None:
    waiting = Waiting()
    for seconds in (0.05, 0.001, 0.05, 0.001):
        waited(waiting, "reply", seconds)
    assert waiting.pause("reply", 0.0) <= 0.0011 / 8
