"""The run file and the client that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedsim.cli import run_files
from fedsim.errors import BadInput
from fedsim.storage.writer import RunWriter


def run_of(folder: Path, names: Sequence[str] | None) -> Path:
    """A run of three clients with these names."""
    called = None if names is None else {"client": names}
    RunWriter.create(folder / "run.h5", attributes={}, layers=["fc"], clients=3, called=called).close()
    return folder / "run.h5"


@pytest.mark.parametrize(
    ("names", "said", "number"),
    [
        (None, "2", 2),
        (None, "-1", -1),  # which `fedsim export` refuses
        (["ann", "bob", "cleo"], "bob", 1),
        (["ann", "bob", "cleo"], "2", 2),
        (["1", "2", "3"], "1", 0),
        (["1", "10", "2"], "2", 2),
        (["ann", "0", "bob"], "0", 1),
    ],
)
def test_a_client_is_found_by_its_name_or_else_by_its_number(tmp_path: Path, names: list[str] | None, said: str, number: int) -> None:
    assert run_files.client(run_of(tmp_path, names), said) == number


@pytest.mark.parametrize(
    ("names", "said", "message"),
    [
        (None, "ann", "have no names, only numbers from 0"),
        (["ann", "bob", "cleo"], "dan", "has no client of this name; it has ann, bob, cleo"),
        (["1", "2", "3"], "0", "has no client of this name; it has 1, 2, 3"),  # the first is called 1
    ],
)
def test_a_client_that_is_not_there(tmp_path: Path, names: list[str] | None, said: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run_files.client(run_of(tmp_path, names), said)


@pytest.mark.parametrize("look", [run_files.check, run_files.found])
def test_a_name_that_is_too_long(tmp_path: Path, look) -> None:
    with pytest.raises(BadInput, match="cannot be reached: File name too long"):
        look(tmp_path / ("x" * 300))
