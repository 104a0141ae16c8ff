"""A disk that fills in the first rounds of a run: whatever it leaves, the same command goes on when there is room."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_disk import grown, limited, small_disk
from small_job import small_job

import fedsim
from fedsim.errors import NoRoom

JOB = tomllib.loads(
    small_job(
        3,
        method={"name": "fedtiny", "density": 0.3, "adjust_every": 1, "stop_round": 2, "selection": "vanilla"},
        partition={"public": 4},
    )
)
STEPS = 16_384
WALKS = [  # from nothing to room for all: the empty file, its lock and checkpoint, its first row, masks that move
    pytest.param("disk", [4_096, 81_920, 188_416, 1_589_248, 1_699_840, 8_388_608], id="disk"),
    pytest.param("limit", [100, 70_000, 90_000, 1_378_000, 8_388_608], id="limit"),
    pytest.param("disk", range(4_096, 2_000_000, STEPS), id="disk-in-small-steps", marks=pytest.mark.full),
    pytest.param("limit", range(100, 1_700_000, STEPS), id="limit-in-small-steps", marks=pytest.mark.full),
]


@contextmanager
def place(kind: str, size: int, folder: Path) -> Iterator[Path]:
    """A folder for one run, on a disk of so many bytes, or on one that is large enough."""
    if kind == "disk":
        with small_disk(size) as disk:
            yield disk
    else:
        (folder / str(size)).mkdir()
        yield folder / str(size)


def stopped(kind: str, size: int, run: Path) -> str:
    """What the run says where it stops for want of room; empty where it ends."""
    try:
        with limited(size if kind == "limit" else -1):
            fedsim.run(JOB, out=run)
    except NoRoom as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "sizes"), WALKS)
def test_whatever_room_a_young_run_has_the_same_command_goes_on_with_more(kind: str, sizes: list[int], tmp_path: Path) -> None:
    """It stops before there is a file, before the first row, among the rows, or not at all, and leaves nothing that blocks the next one."""
    whole, reached = fedsim.run(JOB, out=tmp_path / "whole.h5").attributes["weights_sha256"], set()
    for size in sizes:
        with place(kind, size, tmp_path) as folder:
            run = folder / "run.h5"
            said = stopped(kind, size, run)
            assert said.startswith(f"no room for {folder}/run.h5") == bool(said)
            reached.add("ended" if not said else fedsim.open_run(run).rounds if run.exists() else "no file")
            assert [file for file in folder.rglob("*") if file.suffix in (".new", ".lock") or file.name.startswith(".")] == [], said
            if kind == "disk":
                grown(folder, "50m")
            assert fedsim.run(JOB, out=run).attributes["weights_sha256"] == whole, (size, said)
    assert {"no file", -1, "ended"} <= reached
    assert 0 in reached or kind == "limit"
