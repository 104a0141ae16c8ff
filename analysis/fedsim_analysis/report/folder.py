"""The folder of a page's figures: each as SVG and PDF, with an index of captions and of the commands that draw them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim_analysis.report import files
from fedsim_analysis.report.contents import Figure

if TYPE_CHECKING:
    from fedsim_analysis.measures.nodes import Runs

INDEX = "README.md"
MARK = "<!-- made by fedsim report -->"
KINDS = ("svg", "pdf")


def drawn(figures: Sequence[Figure], runs: Runs) -> dict[str, dict[str, bytes]]:
    """Name of a figure -> its SVG and PDF, which are the same bytes each time."""
    found: dict[str, dict[str, bytes]] = {}
    for figure in figures:
        paper = figure.call.draw(runs).figure
        found[figure.name] = {kind: _saved(paper, kind) for kind in KINDS}
    return found


def _saved(paper: Any, kind: str) -> bytes:
    stream = io.BytesIO()
    paper.savefig(stream, format=kind)
    return stream.getvalue()


def check(folder: Path) -> None:
    """FileExistsError where the folder has files and is not one of ours."""
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise FileExistsError(f"{folder} has files that fedsim report did not write; move them, or choose another --out")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is in the way of the folder of figures; move it, or choose another --out")


def _is_ours(folder: Path) -> bool:
    index = folder / INDEX
    return index.is_file() and MARK in index.read_text(errors="replace")[:200]


def write(folder: Path, pictures: Mapping[str, Mapping[str, bytes]], index: str) -> None:
    """Writes the figures, and removes those of an earlier page that this one has not."""
    folder.mkdir(parents=True, exist_ok=True)
    former = _listed(folder) if _is_ours(folder) else set()
    for name, kinds in pictures.items():
        for kind, content in kinds.items():
            files.put(folder / f"{name}.{kind}", content)
    files.put(folder / INDEX, index.encode())
    for name in former - _listed(folder):
        (folder / name).unlink(missing_ok=True)


def _listed(folder: Path) -> set[str]:
    """The files that the index names."""
    lines = (folder / INDEX).read_text(errors="replace").splitlines()
    names = {line.removeprefix("Files: ") for line in lines if line.startswith("Files: ")}
    found = {name for line in names for name in line.split(", ")}
    return {name for name in found if Path(name).name == name and Path(name).suffix[1:] in KINDS}


def index(title: str, figures: Sequence[Figure], opening: str) -> str:
    """The captions, files and commands, in Markdown. Text of run files stands in it as code."""
    parts = [MARK, f"# Figures of {_code(title)}", "Each figure is drawn by the lines below it, after these:", _block(opening)]
    for figure in figures:
        listed = ", ".join(f"{figure.name}.{kind}" for kind in KINDS)
        parts += [f"## {figure.name}", _plain(f"{figure.title}. {figure.caption}"), f"Files: {listed}", _block(figure.call.text)]
    return "\n\n".join(parts) + "\n"


def _block(lines: str) -> str:
    return f"```python\n{lines.replace('```', '` ` `')}\n```"


def _code(text: str) -> str:
    return f"`{_one_line(text).replace('`', '')}`"


def _plain(text: str) -> str:
    """Text without Markdown's signs being obeyed."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|" else sign for sign in _one_line(text))


def _one_line(text: str) -> str:
    from fedsim_analysis.report.escaping import shown

    return shown(" ".join(text.split()))
