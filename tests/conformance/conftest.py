from __future__ import annotations

from pathlib import Path

import pytest
from alone import Alone
from elsewhere import run_lines, shared_folder
from filelock import FileLock

COMPILED = [("static-mask", "sparse"), ("fedmef", "sparse")]  # lines that use all sparse kernels of the table


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user's images lie, for all processes that share the tests."""
    return shared_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def alone(folder: Path) -> Alone:
    """The run file of every line of the table in every way, in one process."""
    return Alone(folder)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has another program compile the sparse kernels, before any test does, so that all processes take them from numba's cache.

    A kernel that was compiled a moment ago does not give the same bits as the same kernel from the cache. In a fresh clone the run in one
    process would compile them, and the ranks would read them.
    """
    ways = {item.callspec.params.get("way") for item in session.items if hasattr(item, "callspec")}
    if "sparse" not in ways or session.config.option.collectonly:
        return
    folder = shared_folder(session.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    with FileLock(folder / "compiled.lock"):
        if not (folder / "compiled").exists():
            run_lines(folder, "compiled", COMPILED)
