"""Ranks that are not alike are named, with their hosts."""

from __future__ import annotations

import json

import pytest

from fedsim.simulation.launchers.alike import blamed, difference, facts_of_this_rank, software


def text(host: str, **facts: str) -> str:
    return json.dumps({"host": host, **facts})


def test_ranks_of_one_environment_are_alike() -> None:
    mine = facts_of_this_rank(software())
    assert json.loads(mine)["Python"].startswith("3.")
    assert difference([mine, mine, mine]) == ""


@pytest.mark.parametrize(("other", "version"), [({"torch": "2.13.0"}, "2.13.0"), ({}, "None")])
def test_the_first_fact_that_differs_is_named_with_ranks_and_hosts(other: dict[str, str], version: str) -> None:
    texts = [text("a", torch="2.14.1"), text("a", torch="2.14.1"), text("b", **other)]
    assert difference(texts) == f"torch is 2.14.1 on rank 0 (a) and {version} on rank 2 (b)"


def test_an_error_that_rank_0_does_not_have_names_the_rank_and_its_host() -> None:
    assert blamed(["", "", ""], ["a", "a", "b"]) == ""
    assert blamed(["no such file", "no such file", ""], ["a", "a", "b"]) == "no such file"
    assert blamed(["", "", "no such file"], ["a", "a", "b"]) == "rank 2 on b: no such file"
