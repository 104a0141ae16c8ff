"""Legends above the axes, where they cover no data; the figure grows by what they need."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from fedsim_analysis.plots.page import GREY, INK, PaperFigure, size_of
from fedsim_analysis.plots.text import plain, shortened, width_of, wrapped

NARROW = 1.2  # inches that axes have at least
LONGEST, SHORT = 60, 22  # signs of a label, and of one beside the axes
SIGN = 0.009  # inches of a sign, about, in sizes
HANDLE, GAP = 0.25, 0.12  # inches: line and marker of an entry with the space after them; between columns
LINE = 1.35  # height of a line of text, in sizes


def legend(ax: Axes, handles: Sequence[Artist], labels: Sequence[str], note: str = "", taken: float = 0.0) -> None:
    """Entries in as many columns as the axes are wide, and the note below them. Labels are plain text of files.

    taken: inches of the width that names beside the axes have.
    """
    size, (wide, high) = float(mpl.rcParams["legend.fontsize"]), size_of(ax)
    room = max(wide - taken, NARROW), high
    most = max(12, min(LONGEST, int((room[0] - HANDLE) / (SIGN * size))))
    names, text = shortened(labels, most), wrapped(plain(note), size, room[0])
    columns = _columns([width_of(name, size) + HANDLE for name in names], room[0])
    below = text.count("\n") + 1 if text else 0
    own = ax.get_figure(root=True)
    if isinstance(own, PaperFigure) and len(own.axes) == 1:
        own.set_figheight(own.get_figheight() + (ceil(len(names) / columns) + below) * LINE * size / 72)
    if text:
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom", "linespacing": LINE - 0.15}
        ax.annotate(text, (0, 1), (0, 0.3 * size), fontsize=size, color=GREY, **place)
    if names:
        bottom = 1 + (below * LINE + 0.1) * size / (72 * room[1])
        spaces: dict[str, Any] = {"handlelength": 1.9, "handletextpad": 0.5, "columnspacing": 1.2, "labelspacing": 0.35, "borderpad": 0}
        spaces |= {"loc": "lower left", "bbox_to_anchor": (0, bottom), "borderaxespad": 0.2}
        ax.legend(handles, names, ncols=columns, fontsize=size, frameon=False, labelcolor=INK, **spaces)


def _columns(widths: Sequence[float], room: float) -> int:
    """As many as have room. Columns of matplotlib differ in length by at most one entry, the first ones are the longer ones."""
    for count in range(len(widths), 1, -1):
        if sum(column.max() + GAP for column in np.array_split(widths, count)) - GAP <= room:
            return count
    return 1
