"""The timer, on a clock that only the timed calls move."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedsim.bench.timing import interleaved, median_seconds
from fedsim.simulation.planning import timing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Names and seconds of the calls made so far; their sum is the time."""
    made: list[tuple[str, float]] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(seconds for _, seconds in made))
    return made


def taking(calls: list[tuple[str, float]], name: str, *seconds: float) -> Callable[[], None]:
    """A call that takes these seconds in turn, the last of them from then on."""
    return lambda: calls.append((name, seconds[min(sum(each == name for each, _ in calls), len(seconds) - 1)]))


def test_the_seconds_of_several_calls_are_their_mean(calls: list[tuple[str, float]]) -> None:
    assert timing.seconds_of(taking(calls, "a", 1.0, 2.0, 6.0), calls=3) == 3.0


def test_calls_that_warm_up_do_not_count_however_short(calls: list[tuple[str, float]]) -> None:
    assert timing.least_seconds(taking(calls, "a", 1.0, 4.0, 3.0, 5.0), runs=3, warm=1) == 3.0
    assert len(calls) == 4


def test_more_calls_are_made_while_there_is_time(calls: list[tuple[str, float]]) -> None:
    assert timing.least_seconds(taking(calls, "a", 4.0, 3.0, 2.0, 1.0), runs=2, warm=0, spent=9.0) == 2.0
    assert len(calls) == 3


def test_runs_take_turns_and_a_reading_takes_a_while(calls: list[tuple[str, float]]) -> None:
    runs = {"short": taking(calls, "short", 9.0, 0.25), "long": taking(calls, "long", 9.0, 2.0)}
    assert interleaved(runs, "cpu", 2, busy=1.0) == {"short": [0.25, 0.25], "long": [2.0, 2.0]}  # the first call warms up
    assert [name for name, _ in calls[4:]] == 2 * (5 * ["short"] + ["long"])


def test_a_median_of_calls(calls: list[tuple[str, float]]) -> None:
    assert median_seconds(taking(calls, "a", 1.0, 5.0, 2.0), 3) == 2.0
