"""Sheets as text: for a terminal, as Markdown, as LaTeX with booktabs. Texts of run files are shown and never obeyed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from unicodedata import combining, east_asian_width, normalize

from fedsim_analysis.comparison.printed.cells import ROW, Cell, Column, Sheet

GAP = "  "
PLAIN_WIDTH = 140  # of notes, where nobody says how wide
MARKDOWN = re.compile(r"([\\`*_\[\]<>#!|~$&])")
LIST = re.compile(r"^(\d*)([-+.)])(?=\s|$)")  # how a paragraph begins that would be an item
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r'\string"',
    "`": r"\`{}",
    "±": r"$\pm$",
    "…": r"\dots{}",
}


def terminal(sheets: Sequence[Sheet], notes: Sequence[str], width: int | None = None) -> str:
    """Aligned columns. A sheet that is wider than `width` is continued below, with its keys again."""
    parts = []
    for sheet in sheets:
        lines = [*textwrap.wrap(sheet.title, width or PLAIN_WIDTH), *_aligned(sheet.columns, width)]
        lines += [line for note in sheet.notes for line in textwrap.wrap(note, width or PLAIN_WIDTH)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_wrapped(notes, width)])


def _wrapped(notes: Sequence[str], width: int | None) -> list[str]:
    return ["\n".join(line for note in notes for line in textwrap.wrap(note, width or PLAIN_WIDTH))] if notes else []


def _aligned(columns: Sequence[Column], width: int | None) -> list[str]:
    texts = [_padded(column) for column in columns]
    if width is None or _total(texts) <= width:
        return _lines(texts)
    keys = [text for text, column in zip(texts, columns, strict=True) if column.key]
    rest = [text for text, column in zip(texts, columns, strict=True) if not column.key]
    if _total(keys) > width // 2:
        has = columns[0].title == ROW
        numbers = Column(ROW, tuple(Cell(str(i + 1), number=True) for i in range(len(columns[0].cells))))
        keys, rest = [texts[0] if has else _padded(numbers)], texts[1:] if has else texts
    lines: list[str] = []
    while rest:
        fit = next((n for n in range(len(rest), 0, -1) if _total([*keys, *rest[:n]]) <= width), 1)
        lines += [*([""] if lines else []), *_lines([*keys, *rest[:fit]])]
        rest = rest[fit:]
    return lines


def _padded(column: Column) -> list[str]:
    """The heading and the cells, all as wide as the widest; numbers at the right."""
    texts = [heading(column), *(_plain(cell) for cell in column.cells)]
    wide = max(map(cells_of, texts))
    right = any(cell.number for cell in column.cells)
    return [" " * (wide - cells_of(text)) + text if right else text + " " * (wide - cells_of(text)) for text in texts]


def cells_of(text: str) -> int:
    """How many places of a terminal a text takes."""
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)


def _total(texts: Sequence[Sequence[str]]) -> int:
    return sum(cells_of(text[0]) + len(GAP) for text in texts) - len(GAP)


def _lines(texts: Sequence[Sequence[str]]) -> list[str]:
    return [GAP.join(row).rstrip() for row in zip(*texts, strict=True)]


def heading(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _plain(cell: Cell) -> str:
    return f"{cell.text} ± {cell.half}" if cell.half else cell.text


def markdown(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Tables as GitHub reads them."""
    parts = []
    for sheet in sheets:
        right = [any(cell.number for cell in column.cells) for column in sheet.columns]
        rows = [
            [heading(column) for column in sheet.columns],
            *zip(*([_plain(cell) for cell in c.cells] for c in sheet.columns), strict=True),
        ]
        lines = ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("---:" if number else "---" for number in right) + "|")
        parts += [f"**{escaped(sheet.title)}**", "\n".join(lines), *map(_paragraph, sheet.notes)]
    return "\n\n".join([*parts, *map(_paragraph, notes)])


def escaped(text: str) -> str:
    """For Markdown."""
    return MARKDOWN.sub(r"\\\1", text)


def _paragraph(text: str) -> str:
    return LIST.sub(r"\1\\\2", escaped(text))


def latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """One `table` a sheet, for a document with \\usepackage{booktabs}; the notes are comments."""
    head = ["% needs \\usepackage{booktabs}", *(f"% {line}" for line in "\n".join(_wrapped(notes, None)).splitlines())]
    return "\n".join([*head, *("\n" + _latex_table(sheet) for sheet in sheets)])


def _latex_table(sheet: Sheet) -> str:
    right = "".join("r" if any(cell.number for cell in column.cells) else "l" for column in sheet.columns)
    rows = zip(*([_latex_cell(cell) for cell in column.cells] for column in sheet.columns), strict=True)
    caption = " ".join([sheet.title, *sheet.notes])
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(caption)}}}",
        rf"\begin{{tabular}}{{{right}}}",
        r"\toprule",
        _latex_row([tex(heading(column)) for column in sheet.columns]),
        r"\midrule",
        *(_latex_row(row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def _latex_cell(cell: Cell) -> str:
    if not (cell.number and NUMBER.fullmatch(cell.text)):
        return "--" if cell.text == "-" else tex(cell.text)
    return rf"${cell.text} \pm {cell.half}$" if cell.half else f"${cell.text}$"


def tex(text: str) -> str:
    """For LaTeX. A sign that a plain font of LaTeX lacks is shown by its number."""
    signs = "".join(LATEX.get(sign) or (sign if _is_known(sign) else f"U+{ord(sign):04X}") for sign in text)
    return signs.replace("--", "-{}-").replace("--", "-{}-")  # which would be one dash


def _is_known(sign: str) -> bool:
    """ASCII, and its letters with an accent."""
    base = normalize("NFD", sign)
    return sign.isascii() or (len(base) == 2 and base[0].isascii() and base[0].isalpha() and base[1] in ACCENTS)


ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u030c"
FORMS: dict[str, Callable[[Sequence[Sheet], Sequence[str]], str]] = {"terminal": terminal, "markdown": markdown, "latex": latex}
