"""Figures of runs for papers: each function draws on a matplotlib `Axes` and returns it.

    from fedsim_analysis import open, plots
    plots.accuracy(open("runs/seeds"), over="bytes").figure.savefig("accuracy.pdf")

Every function takes the DataTree of `fedsim_analysis.open`, or the Dataset of the suited node; `ax=`, to draw on axes that exist
already; and `width=`: "column" (3.35 in), "page" (6.9 in), or inches. All have one style, in which a method has the same colour
and marker in every figure; matplotlib's own settings stay as they are. matplotlib is imported when a function is first used.
`leaderboard` has several axes: it takes run files too, has no `ax=`, and returns a Figure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim_analysis.measures import colours

if TYPE_CHECKING:
    from fedsim_analysis.plots.comparing import differences, pareto
    from fedsim_analysis.plots.heat_maps import layer_density, mask_overlap, partition
    from fedsim_analysis.plots.leaderboards import leaderboard
    from fedsim_analysis.plots.lines import (
        accuracy,
        bytes,
        curve,
        density,
        flops,
        loss,
        mask_churn,
        memory,
        seconds,
        train_loss,
        worst_client,
    )
    from fedsim_analysis.plots.page import save, style
    from fedsim_analysis.plots.spread import clients, phases
    from fedsim_analysis.plots.timelines import timeline

__all__ = [
    "accuracy",
    "bytes",
    "clients",
    "colours",
    "curve",
    "density",
    "differences",
    "flops",
    "layer_density",
    "leaderboard",
    "loss",
    "mask_churn",
    "mask_overlap",
    "memory",
    "pareto",
    "partition",
    "phases",
    "save",
    "seconds",
    "style",
    "timeline",
    "train_loss",
    "worst_client",
]

_PLACES = {
    "comparing": ("differences", "pareto"),
    "heat_maps": ("layer_density", "mask_overlap", "partition"),
    "leaderboards": ("leaderboard",),
    "lines": (
        *("accuracy", "bytes", "curve", "density", "flops", "loss"),
        *("mask_churn", "memory", "seconds", "train_loss", "worst_client"),
    ),
    "page": ("save", "style"),
    "spread": ("clients", "phases"),
    "timelines": ("timeline",),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
