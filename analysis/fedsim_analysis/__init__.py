"""Analysis of fedsim's run files: reads HDF5 only, and needs neither torch nor fedsim."""

from fedsim_analysis.compare import compare
from fedsim_analysis.load import Run, load

__all__ = ["Run", "compare", "load"]
