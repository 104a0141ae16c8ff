"""analysis/README.md: every example is executed on a tiny run file and gives its numbers."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made_run import ACCURACY, hand_made_run

from fedsim.cli import commands

README = Path(__file__).parents[2] / "analysis" / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
OCTAVE = ["octave", "--no-gui", "--quiet", "--no-init-file"]
PRINTED = {"r": 'cat("@", sprintf("%.17g", accuracy), "\\n")', "octave": 'printf("@ %s\\n", sprintf("%.17g ", accuracy));'}


def named(language: str) -> list[object]:
    """The examples in a language, each called by its first line or by what it opens."""
    found = [text for lang, text in BLOCKS if lang == language]
    return [pytest.param(text, id=re.sub(r"\W+", " ", text.split("\n")[0]).strip()) for text in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With runs/quickstart.h5 and its exports, which the README's own command makes."""
    where = tmp_path_factory.mktemp("readme")
    (where / "runs").mkdir()
    hand_made_run(where / "runs" / "quickstart.h5")
    exports = next(text for language, text in BLOCKS if language == "sh" and "fedsim export" in text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for line in exports.splitlines():
            command, _, made = line.partition("#")
            patch.setattr(sys, "argv", shlex.split(command))
            assert commands._outcome() == 0
            assert (where / made.split()[0].rstrip(",")).exists()
    return where


def run(folder: Path, lines: str) -> str:
    """What the commands print in a shell."""
    found = subprocess.run(["bash", "-e", "-c", lines], cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.processes
@pytest.mark.parametrize("example", named("python"))
def test_python(folder: Path, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    known: dict[str, object] = {}
    exec(example, known)
    np.testing.assert_array_equal(np.ma.filled(known["accuracy"], np.nan), ACCURACY)


def interpreted(language: str, example: str, folder: Path) -> list[float]:
    """The accuracies, as R or Octave print them."""
    program = {"r": "Rscript", "octave": "octave"}[language]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    script = folder / f"example.{language}"
    script.write_text(f"{example}\n{PRINTED[language]}\n")
    command = [*OCTAVE, str(script)] if language == "octave" else [program, str(script)]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    for library in re.findall(r"library\((\w+)\)|pkg load (\w+)", example):
        name = "".join(library)
        if re.search(rf"no package called .{name}|package {name} is not installed", found.stderr):
            pytest.skip(f"{program} has no {name}")
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("@")]
    return [float(text.replace("NA", "nan")) for text in line[1:].split()]


@pytest.mark.processes
@pytest.mark.parametrize("example", named("r"))
def test_r(folder: Path, example: str) -> None:
    np.testing.assert_array_equal(interpreted("r", example, folder), ACCURACY)


@pytest.mark.processes
@pytest.mark.parametrize("example", named("octave"))
def test_octave(folder: Path, example: str) -> None:
    np.testing.assert_array_equal(interpreted("octave", example, folder), ACCURACY)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "lines"),
    [
        ("ncdump", ['string accuracy:units = "1" ;', "accuracy = 0.25, NaN, 0.5, 0.75 ;", ":rounds = 3LL ;"]),
        ("h5dump", ["dataset    /rounds/accuracy", "(0): 3", "(0): 0.25, nan, 0.5, 0.75"]),
    ],
)
def test_a_terminal(folder: Path, program: str, lines: list[str]) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    (example,) = [text for language, text in BLOCKS if language == "sh" and text.startswith(program)]
    printed = run(folder, example)
    assert [line for line in lines if line not in printed] == []


def test_all_examples_are_known_here() -> None:
    languages = [language for language, _ in BLOCKS]
    assert {name: languages.count(name) for name in set(languages)} == {"python": 7, "sh": 3, "r": 3, "octave": 3}
    lines = [len(text.split("\n")) - text.count("\n\n") - 1 for language, text in BLOCKS if language != "sh"]
    assert max(lines) == 3  # ruff wants an empty line after imports
