from __future__ import annotations

from pathlib import Path

import pytest
from alone import Alone
from elsewhere import shared_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user's images lie, for all processes that share the tests."""
    return shared_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def alone(folder: Path) -> Alone:
    """The run file of every line of the table in every way, in one process."""
    return Alone(folder)
