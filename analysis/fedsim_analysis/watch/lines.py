"""Lines of a screen, none longer than it is wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from fedsim_analysis.watch.signs import ascii_only

STYLES = {
    "running": "cyan",
    "waiting": "dim",
    "done": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "unreadable": "red",
    "not read yet": "dim",
}


def fitted(line: Text, width: int, plain: bool) -> Text:
    """The line, cut at the width, in signs that can be shown."""
    cut = line.copy()
    cut.truncate(max(width, 1), overflow="ellipsis")
    if plain:
        cut.plain = ascii_only(cut.plain)
    return cut


def wrapped(line: Text, width: int, most: int) -> list[Text]:
    """The line in as many as it needs, `most` at most, between words where it can."""
    found: list[Text] = [Text()]
    for word in line.split(" "):
        begun = found[-1]
        if begun.cell_len and begun.cell_len + 1 + word.cell_len > width and len(found) < most:
            found.append(word)
        else:
            found[-1] = word if not begun.cell_len else Text(" ").join([begun, word])
    return found


def beside(cells: Sequence[Sequence[Text]], width: int) -> list[Text]:
    """Blocks of lines side by side, each `width` wide, with two blanks between them."""
    rows = []
    for r in range(max(map(len, cells))):
        row = Text()
        for at, cell in enumerate(cells):
            line = cell[r].copy() if r < len(cell) else Text()
            line.truncate(width, overflow="ellipsis", pad=at < len(cells) - 1)
            row.append_text(line)
            row.append("  " if at < len(cells) - 1 else "")
        rows.append(row)
    return rows


def padded(text: str, width: int, right: bool = False) -> str:
    """The text with blanks, `width` cells wide if it is not wider."""
    blanks = " " * max(width - cell_len(text), 0)
    return blanks + text if right else text + blanks
