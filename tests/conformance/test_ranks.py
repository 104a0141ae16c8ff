"""Every method on 1, 2, 3 and 5 ranks: the same answer, to the last bit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
from cases import RUNS, TABLE
from elsewhere import run_lines
from run_files import assert_same

from fedsim.storage.reader import RunReader, read_model

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
RANKS = (2, 3, 5)
ONE = ("fedavg", "serial")  # on one rank a run is the run without mpirun: one line shows it


def lines() -> list[Any]:
    """(ranks, method, way). With the marker full: every method in every way on every number of ranks.

    Without it, each method runs on 3 ranks, one whose network is cut on 5 too, and the ways take turns.
    """
    ways = {name: [way for other, way in RUNS if other == name] for name in TABLE}
    turns = {
        (ranks, name, ways[name][(place + turn) % len(ways[name])])
        for place, name in enumerate(TABLE)
        for turn, ranks in enumerate(RANKS)
        if ranks == 3 or (ranks == 5 and name == "dwfnp")
    } | {(ranks, *ONE) for ranks in RANKS[1:]}

    def chosen(ranks: int, pair: tuple[str, str]) -> bool:
        return (ranks, *pair) in turns

    every = [(ranks, pair) for ranks in (1, *RANKS) for pair in RUNS]
    return [pytest.param(ranks, *pair, marks=() if chosen(ranks, pair) else pytest.mark.full) for ranks, pair in every]


@pytest.fixture(scope="session")
def run_files(request: pytest.FixtureRequest, folder: Path) -> Callable[[int], Path]:
    """The folder of the run files on so many ranks: one mpirun does all lines that a test of this session asks for."""
    if MPIRUN is None:
        pytest.fail("no mpirun here: pip install 'fedsim[mpi]'")
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    @cache
    def made(ranks: int) -> Path | Exception:
        pairs = sorted({(one["name"], one["way"]) for one in params if "way" in one and one.get("ranks") == ranks})
        try:
            return run_lines(folder, f"ranks{ranks}", pairs, (MPIRUN, "-n", str(ranks)))
        except (AssertionError, TimeoutExpired) as error:  # kept too: what failed once is not tried again for every test
            return error

    def found(ranks: int) -> Path:
        if isinstance(where := made(ranks), Exception):
            raise where
        return where

    return found


@pytest.mark.parametrize(("ranks", "name", "way"), lines())
@pytest.mark.processes
def test_ranks_change_no_bit(ranks, name, way, run_files, alone) -> None:
    assert_same(run_files(ranks) / f"{name}-{way}.h5", alone[name, way])


@pytest.mark.parametrize(
    ("ranks", "name", "way"), [pytest.param(n, *ONE, marks=() if n in RANKS[1:] else pytest.mark.full) for n in (1, *RANKS)]
)
@pytest.mark.processes
def test_messages_of_rank_0_grow_with_the_levels_of_the_tree_whatever_the_clients(ranks, name, way, run_files, alone) -> None:
    """A work costs two messages down and two up for every level of the tree, whatever the ranks have to say; a round has two works,
    the cohort's in four packs, and evaluation on two shards of test images, which also says what clients' own images come to."""
    reader, training = RunReader(run_files(ranks) / f"{name}-{way}.h5"), min(ranks - 1, 4)
    expected = sum(2 * (ranks - 1).bit_length() + 2 * min(ranks - 1, packs).bit_length() for packs in (4, 2))
    assert (reader.column("rank0_messages")[2:] == expected).all()
    if ranks > 1:
        sent, every = reader.column("rank0_bytes"), reader.column("rank_bytes")
        assert (sent == every).all() == (ranks < 4)
        reduced = reader.speed("reduce_bytes") * reader.timing("reduce")
        model = sum(value.numel() for value in read_model(alone[name, way]).values())
        assert (reduced[1:] >= 8 * model * training).all()
