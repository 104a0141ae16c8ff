"""A note about ranks that have been silent for long: seldom, and never for what is as long as before."""

from __future__ import annotations

import pytest

from fedsim.errors import SilentRanks
from fedsim.simulation.launchers.silence import FIRST, LONGER, PATIENCE, Silence

HOSTS = ["a", "a", "b", *["c"] * 6]


def test_a_note_comes_after_a_while_and_then_ever_more_seldom() -> None:
    said: list[str] = []
    silence = Silence(said.append, HOSTS)
    for second in range(int(10 * FIRST)):
        silence({2}, float(second))
    assert [line.split(" silent")[0] for line in said] == ["note: rank 2 (b) has been"] * 3
    assert f"for {FIRST + 1:.0f} s" in said[0]


def test_packs_that_take_long_every_round_are_no_news() -> None:
    said: list[str] = []
    silence = Silence(said.append, HOSTS)
    for _ in range(5):
        for second in range(int(2 * FIRST)):
            silence({1, 2}, float(second))
    assert len(said) == 1
    for second in range(int(2 * LONGER * FIRST) + 9):
        silence({2}, float(second))
    assert len(said) == 2


def test_many_silent_ranks_are_counted_and_a_wait_for_nobody_in_particular_is_not_spoken_of() -> None:
    said: list[str] = []
    silence = Silence(said.append, HOSTS)
    for second in range(int(2 * FIRST)):
        silence((), float(second))
    assert said == []
    silence(range(1, 9), 0.0)
    for second in range(1, int(7 * FIRST)):
        silence(range(1, 9), float(second))
    assert "ranks 1 (a), 2 (b), 3 (c), 4 (c), 5 (c) and 3 more have been silent" in said[0]


def test_a_run_that_is_to_stop_waits_a_while_for_ranks_and_no_longer() -> None:
    """From the signal on, not from the beginning of the wait; a wait that ended well counts anew."""
    stop = False
    silence = Silence(lambda line: None, HOSTS, lambda: stop)
    silence({1, 2}, 100.0)
    stop = True
    silence({1, 2}, 101.0)
    silence({2}, 101.0 + PATIENCE)
    silence({2}, 0.0)
    silence({2}, PATIENCE)
    with pytest.raises(SilentRanks, match=r"rank 2 \(b\) has been silent for 21 s, and the run is to stop"):
        silence({2}, PATIENCE + 1)


def test_a_note_names_those_that_answer_through_a_silent_rank() -> None:
    said: list[str] = []
    silence = Silence(said.append, HOSTS)
    for second in range(int(FIRST) + 2):
        silence({4}, float(second))
    assert said[0].startswith("note: rank 4 (c) has been silent for 121 s, or waits for ranks that answer through it (5, 6, 7); long work")
