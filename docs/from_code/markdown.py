"""Plain text as Markdown, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\*_<>\[\]#$~{}])")
CODE = re.compile(r"(`[^`\n]+`)")
PAPER = re.compile(r"\barXiv:(\d{4}\.\d{4,5})\b")


def plain(text: str) -> str:
    """Text that looks as it is written; `code` stays code, and papers on arXiv become links.

    >>> plain("r_k of `a*b` <0")
    'r\\\\_k of `a*b` \\\\<0'
    """
    parts = [part if CODE.fullmatch(part) else SPECIAL.sub(r"\\\1", part) for part in CODE.split(text)]
    return PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(parts))


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def paragraphs(text: str) -> str:
    """A docstring: its indented paragraphs as code blocks, its lists as lists, anything else as text."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text.strip("\n")))


def _paragraph(text: str) -> str:
    if text.startswith((" ", "\t")):
        return f"```text\n{text}\n```"
    return "\n".join(f"- {plain(line[2:])}" if line.startswith("- ") else plain(line) for line in text.splitlines())
