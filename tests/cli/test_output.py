"""Streams that lack signs get others: every command ends as it does with UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.cli.output import plain
from fedsim.storage.reader import RunReader

JOB = """
name = "prüfung"
rounds = 2
[data]
name = "fake"
image_size = 8
channels = 1
classes = 4
train_images = 120
test_images = 40
[partition]
clients = 4
[model]
width = 4
[execution]
plan = "reference"
[method]
name = "fedavg"
"""
COMMANDS = [
    ["--help"],
    ["run", "--help"],
    ["methods"],
    ["methods", "fedtiny"],
    ["estimate", "prüfung.toml"],
    ["run", "prüfung.toml", "--out", "ü.h5"],
    ["show", "ü.h5"],
    ["compare", "ü.h5"],
    ["export", "ü.h5"],
    ["sweep", "prüfung.toml", "--processes", "1"],
    ["bench", "no"],
    ["run", "fehlt→.toml"],
]
ALL = """
import os, sys
from fedsim.cli import commands
for words in {!a}:
    sys.argv = ["fedsim", *[os.fsdecode(word.encode()) for word in words]]  # as Python reads a command line
    try:
        commands.main()
    except SystemExit as end:
        print("ended", end.code, flush=True)
"""
ENDS = ["ended 0"] * 10 + ["ended 2"] * 2


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.full)])
def test_every_command_prints_what_the_stream_can_take(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prüfung.toml").write_text(JOB, encoding="utf-8")
    environ = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", ALL.format(COMMANDS)]
    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, timeout=200, check=False)
    out, err = (said.decode(encoding, "replace") for said in (ended.stdout, ended.stderr))  # names of files are written as they are
    assert [line for line in out.splitlines() if line.startswith("ended ")] == ENDS, out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(("sign", "written"), [("…", "..."), ("±", "+/-"), ("→", "->"), ("é", "e"), ("╭", "+"), ("│", "|"), ("中", "?")])
def test_signs_have_equivalents(sign: str, written: str) -> None:
    assert plain(sign) == written


@pytest.mark.processes
def test_closed_streams_end_no_command(tmp_path: Path) -> None:
    """No file of the run gets the number of a closed stream either, on which libraries print."""
    (tmp_path / "small.toml").write_text(JOB, encoding="utf-8")
    for words, code in {"run small.toml --out run.h5": 0, "show run.h5": 0, "show none.h5": 2}.items():
        shell = f'"{sys.executable}" -m fedsim {words} <&- >&- 2>&-'
        assert subprocess.run(["sh", "-c", shell], cwd=tmp_path, check=False).returncode == code, words
    assert RunReader(tmp_path / "run.h5").attributes["finished"]
