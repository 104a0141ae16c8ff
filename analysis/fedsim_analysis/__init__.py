"""Analysis of fedsim's run files: reads HDF5 only, and needs neither torch nor fedsim.

open         runs as labelled arrays of xarray
plots        figures of them for papers
comparison   tables of several runs; `compare` is its overview
measures     the numbers that figures show
load         one run as tables of pandas

Each is imported when it is first used. `run_file` needs h5py and numpy alone; fedsim reads with it too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim_analysis import comparison, measures, plots
    from fedsim_analysis.comparison import compare
    from fedsim_analysis.dataset.opening import open
    from fedsim_analysis.tables import Run, load

__all__ = ["Run", "compare", "comparison", "load", "measures", "open", "plots"]

_PLACES = {"Run": "tables", "compare": "comparison", "load": "tables", "open": "dataset.opening"}
_PACKAGES = ("comparison", "measures", "plots")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
