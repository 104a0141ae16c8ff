"""Which files a user's own module stands on: a change in one of them is another run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.config import imported_files

FILES = {
    "mine_top.py": "import os, numpy.linalg, mine_near\nfrom fedsim.methods import fedavg\nfrom mine_pack.inner import deep\n",
    "mine_near.py": "import json, mine_top\n\n\ndef late():\n    import mine_late\n    from mine_absent import nothing\n",
    "mine_late.py": "import torch, mine_broken\n",
    "mine_broken.py": "import mine_unused\nfor\n",
    "mine_unused.py": "",
    "mine_pack/__init__.py": "from .first import *\n",
    "mine_pack/first.py": "from . import second\nfrom .second import number\n",
    "mine_pack/second.py": "number = 1\n",
    "mine_pack/unused.py": "",
    "mine_pack/inner/__init__.py": "",
    "mine_pack/inner/deep.py": "from ..second import number\n",
}
OF_PACK = ("__init__", "first", "inner/__init__", "inner/deep", "second")
WANTED = ["mine_broken.py", "mine_late.py", "mine_near.py", *(f"mine_pack/{name}.py" for name in OF_PACK)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


def test_own_files_are_followed_wherever_they_are_imported_and_no_others(folder: Path) -> None:
    import mine_pack.inner.deep  # type: ignore[import-not-found]  # noqa: F401  # as the job does

    assert [str(file.relative_to(folder)) for file in imported_files.of("mine_top")] == WANTED


def test_nothing_is_imported_to_find_them(folder: Path) -> None:
    found = [str(file.relative_to(folder)) for file in imported_files.of("mine_top")]
    assert found == [
        "mine_broken.py",
        "mine_late.py",
        "mine_near.py",
        "mine_pack/__init__.py",
    ]  # what a package not yet imported holds is not looked for
    assert not [name for name in sys.modules if name.startswith("mine_")]


def test_a_module_without_a_text_imports_nothing() -> None:
    assert imported_files.of("math") == imported_files.of("no_such_module") == []
