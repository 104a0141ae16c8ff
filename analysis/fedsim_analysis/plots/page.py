"""The one style of the figures: sizes in print, fonts, axes, and files that are the same bytes whenever they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim_analysis.plots.text import families, plain, wrapped

WIDTHS = {"column": 3.35, "page": 6.9}  # inches, of a journal with two columns
HEIGHT = 2.1  # inches of the axes and their labels, without the legend
INK, GREY, PALE = "#262626", "#595959", "#D9D9D9"  # of text and axes, of notes, of the grid
SMALL, LARGE = 7.0, 8.0  # points: of numbers and legends, of the names of axes
METADATA: dict[str, dict[str, Any]] = {  # without the time
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
    "ps": {"CreationDate": None},
    "eps": {"CreationDate": None},
}

_own: ContextVar[Mapping[str, Any] | None] = ContextVar("own", default=None)  # what `style` was given


def settings() -> dict[str, Any]:
    """matplotlib's settings for the figures of this module."""
    return {
        "font.family": list(families()),
        "font.size": SMALL,
        "text.usetex": False,
        "text.parse_math": True,  # by which `text.plain` escapes
        "text.color": INK,
        "axes.labelsize": LARGE,
        "axes.titlesize": LARGE,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "grid.color": PALE,
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.6,
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "savefig.dpi": 300,
        "figure.dpi": 144,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "pdf.fonttype": 42,  # TrueType, which publishers accept
        "ps.fonttype": 42,
        "svg.fonttype": "path",  # looks the same without the font
        "svg.hashsalt": "fedsim",  # else its ids are drawn anew each time
        **{f"{axis}tick.{name}": value for axis in "xy" for name, value in _ticks().items()},
    }


def _ticks() -> dict[str, Any]:
    sizes = {"major.width": 0.6, "major.size": 2.5, "minor.width": 0.4, "minor.size": 1.5}
    return {"labelsize": SMALL, "color": INK, "labelcolor": INK} | sizes


@contextmanager
def style(rc: Mapping[str, Any] | None = None) -> Iterator[None]:
    """matplotlib's settings within `with plots.style():` are those of the figures here, and `rc` on top; outside they stay as they are.

    The functions of `plots` use the style by themselves. Use it for figures of several axes, or to change something in all:
    `with plots.style({"font.size": 9}): plots.accuracy(runs)`.
    """
    if _is_shown():
        _load_backend()
    own = {**(_own.get() or {}), **(rc or {})}
    token = _own.set(own)
    try:
        every: Any = {**settings(), **own}
        with mpl.rc_context(every):
            yield
    finally:
        _own.reset(token)


class PaperFigure(Figure):
    """A figure that is drawn and saved in the style, and whose PDF and SVG are the same bytes each time."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._style = dict(_own.get() or {})

    def draw(self, renderer: Any) -> None:
        with style(self._style):
            super().draw(renderer)

    def savefig(self, fname: Any, **more: Any) -> None:
        """As matplotlib's, without the time in the file."""
        with style(self._style):
            super().savefig(fname, **_timeless(fname, more))


def save(ax: Axes | Figure, path: str | Path, **more: Any) -> None:
    """Saves the figure in the style, also of axes that were given. PDF and SVG are the same bytes each time and hold their fonts."""
    figure = ax if isinstance(ax, Figure) else ax.figure
    with style():
        Figure.savefig(figure, path, **_timeless(path, more))  # type: ignore[arg-type]


def _timeless(path: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(more.get("format") or (Path(path).suffix.lstrip(".") if isinstance(path, str | Path) else "")).lower()
    known = METADATA.get(kind, {}) | dict(more.get("metadata") or {})
    return {**more, **({"metadata": known} if known else {})}


def inches(width: str | float) -> float:
    """The width of a figure; ValueError for what is neither of WIDTHS nor a positive number."""
    if isinstance(width, str):
        if width not in WIDTHS:
            raise ValueError(f"width={width!r}; it is {' or '.join(map(repr, WIDTHS))}, or a number of inches")
        return WIDTHS[width]
    if not width > 0:
        raise ValueError(f"width={width!r}; a number of inches is more than 0")
    return float(width)


def axes(ax: Axes | None, width: str | float, height: float = HEIGHT) -> Axes:
    """The axes that were given, in the style; or those of a new figure of this size.

    In a notebook, and where pyplot is interactive, pyplot has the new figure and shows it. Elsewhere it belongs to its axes alone.
    """
    if ax is None:
        figure = new(inches(width), height)
        ax = figure.add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set(edgecolor=INK, linewidth=0.6)
    ax.tick_params(which="both", labelsize=mpl.rcParams["xtick.labelsize"], color=INK, labelcolor=INK, labelfontfamily=families()[0])
    ax.tick_params(which="major", width=0.6, size=2.5)
    ax.tick_params(which="minor", width=0.4, size=1.5)
    ax.grid(True, color=PALE, linewidth=0.4)
    ax.set_axisbelow(True)
    return ax


def name(ax: Axes, x: str, y: str, taken: float = 0.0) -> None:
    """The names of both axes, of plain text, in lines that are as long as the axes are. taken: inches of the width that others have."""
    width, height = size_of(ax)
    width = max(width - taken, 1.2)
    size = float(mpl.rcParams["axes.labelsize"])
    ax.set_xlabel(wrapped(plain(x), size, width), fontsize=size, color=INK)
    ax.set_ylabel(wrapped(plain(y), size, height), fontsize=size, color=INK)


def size_of(ax: Axes) -> tuple[float, float]:
    """About the inches that axes have between their labels."""
    figure, spec = ax.get_figure(root=True), ax.get_subplotspec()
    width, height = figure.get_size_inches() if figure is not None else (WIDTHS["column"], HEIGHT)
    if figure is None or spec is None or figure.get_layout_engine() is None:
        return width * ax.get_position().width, height * ax.get_position().height
    grid = spec.get_gridspec()
    return max(width * len(spec.colspan) / grid.ncols - 0.6, 0.5), max(height * len(spec.rowspan) / grid.nrows - 0.45, 0.5)


def new(width: float, height: float) -> Figure:
    """A figure of this size in inches, which pyplot shows where somebody looks."""
    if _is_shown():
        from matplotlib import pyplot

        return pyplot.figure(FigureClass=PaperFigure, figsize=(width, height), layout="constrained")
    return PaperFigure(figsize=(width, height), layout="constrained")


@cache
def _load_backend() -> None:
    """Before settings are changed: a notebook's backend changes some when it is loaded, and these must stay."""
    from matplotlib import pyplot

    pyplot.draw_if_interactive()


def _is_shown() -> bool:
    """Whether somebody sees a figure of pyplot without asking for it."""
    shell = sys.modules.get("IPython")
    return mpl.is_interactive() or (shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None)
