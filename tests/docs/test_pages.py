"""The pages of the site: their examples run, from top to bottom, and print what the pages show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:\{code-block\} )?(\w+)\n(?::caption: (\S+)\n\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {str(path.relative_to(ROOT / "docs")): BLOCK.findall(path.read_text("utf-8")) for path in (ROOT / "docs").rglob("*.md")}
WITH_EXAMPLES = {"guide/own_data.md", "guide/own_method.md", "guide/own_model.md", "tutorial.md"}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def test_these_pages_have_examples() -> None:
    assert {page for page, blocks in PAGES.items() if blocks} == WITH_EXAMPLES


@pytest.mark.outside
@pytest.mark.processes
@pytest.mark.parametrize("page", sorted(WITH_EXAMPLES))
def test_the_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    """A block with a caption is a file. `sh` and `python` run, and print the `text` below but for its numbers. `bash` is only shown."""
    printed = ""
    for language, name, text in PAGES[page]:
        if name:
            (tmp_path / name).write_text(text)
        elif language in ("sh", "python"):
            command = ["bash", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
            printed = succeeds(command, tmp_path)
        elif language == "text":
            lines = {shape(line) for line in printed.splitlines()}
            assert [line for line in text.splitlines() if shape(line) not in lines] == [], printed


def succeeds(command: list[str], folder: Path) -> str:
    """What the command prints, with this Python's programs before all others."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shape(line: str) -> str:
    """A line whose numbers and widths may differ: another torch rounds otherwise."""
    return " ".join(NUMBER.sub("#", line).split())
