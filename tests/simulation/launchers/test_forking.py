"""Where no rank may be forked from another."""

from __future__ import annotations

import sys

import pytest

from fedsim.simulation.launchers import forking
from fedsim.simulation.launchers.forking import place


class Asked(Exception):
    """Whether this is the rank that forks the others was asked."""


def test_no_rank_is_forked_where_mpi_may_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise Asked

    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    monkeypatch.setattr(place, "ranks_here", lambda: 2)
    monkeypatch.setattr(place, "is_first", asked)
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    with pytest.raises(Asked):
        forking.begin()
    monkeypatch.setitem(sys.modules, "mpi4py", sys)
    forking.begin()
