"""The console script in this process, as a person calls it on one small job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.cli import commands


def console(job: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`call(command, *settings)` on smoke.toml in a folder that holds nothing else: the exit code and what it says on the error stream."""
    (folder / "smoke.toml").write_text(job)
    monkeypatch.chdir(folder)
    for name in commands.RANK:
        monkeypatch.delenv(name, raising=False)

    def call(command: str, *settings: str) -> tuple[int, str]:
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["fedsim", command, "smoke.toml", *overrides])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return int(ended.value.code or 0), capfd.readouterr().err

    return call
