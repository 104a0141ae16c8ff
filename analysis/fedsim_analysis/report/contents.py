"""What a page consists of, as plain values: sections of notes, cards, tables, figures and details. `page` makes HTML of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsim_analysis.measures.nodes import Runs


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    warns: bool = False


@dataclass(frozen=True)
class Card:
    """One number that stands out, what it is, and a line about it."""

    label: str
    value: str
    text: str = ""
    warns: bool = False


@dataclass(frozen=True)
class Cards:
    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Table:
    """Cells are text, ready to be read. The first column names its row."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()  # columns whose cells stand at the right
    notes: Sequence[str] = ()  # what the columns mean


@dataclass(frozen=True)
class Details:
    """Text as it stands in a file, folded away."""

    kind: ClassVar[str] = "details"
    title: str
    text: str


@dataclass(frozen=True)
class Call:
    """A function of `fedsim_analysis.plots` and its arguments: what draws a figure for paper, and the command that is shown with it."""

    name: str
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return f"plots.{self.name}({', '.join(['runs', *(f'{key}={value!r}' for key, value in self.keywords.items())])})"

    def draw(self, runs: Runs) -> Axes:
        from fedsim_analysis import plots

        axes: Axes = getattr(plots, self.name)(runs, **self.keywords)
        return axes


@dataclass(frozen=True)
class Figure:
    """A figure: curves for the screen, and the same numbers drawn for paper."""

    kind: ClassVar[str] = "figure"
    name: str  # of its files, without suffix; unique on a page
    title: str
    caption: str
    chart: dict[str, Any]  # plotly's "data" and "layout"
    call: Call
    height: int = 360  # pixels on the screen
    wide: bool = False  # over the whole width of the page, where others stand two in a line


Block = Note | Cards | Table | Details | Figure


@dataclass(frozen=True)
class Section:
    name: str  # of its place in the page
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """All of a page. `groups`: (name, colour) of what the curves show, for the switches of the page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    groups: Sequence[tuple[str, str]] = ()
    warning: str = ""  # in one line, at the top: what is not finished
    written: str = ""  # when, by which version
    folder: str = ""  # of the figures as SVG and PDF
    left_out: Sequence[str] = field(default_factory=tuple)

    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
