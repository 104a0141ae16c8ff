"""The console script as tests of the command line use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captured_console import Fedsim, script, snapshot


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fedsim:
    """The console script, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return script(monkeypatch, capfd)


@pytest.fixture
def refuses(fedsim: Fedsim, tmp_path: Path) -> Callable[..., str]:
    """Bad input: exit code 2, one message, no traceback, and the folder as it was."""

    def call(*words: str) -> str:
        before = snapshot(tmp_path)
        ended = fedsim(*words)
        assert ended.code == 2, ended.out + ended.err
        assert "Traceback" not in ended.err
        assert snapshot(tmp_path) == before
        return ended.err

    return call
