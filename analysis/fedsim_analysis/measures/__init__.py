"""The numbers that figures show, as arrays: of the DataTree that `fedsim_analysis.open` gives, or of the suited node's Dataset.

`plots` draws them with matplotlib and `report` with plotly, so that no number is computed twice. All text in them comes from run
files: escape it where markup could be read. All values are in the unit of their column; `units.scale_of` chooses the unit to show.
"""

from fedsim_analysis.measures.clients import ClientValues, Distribution, Timeline, distribution, of_clients, partition, timeline
from fedsim_analysis.measures.curves import OVER, Curve, curves, note, note_of, seeds_of
from fedsim_analysis.measures.differences import Difference, differences
from fedsim_analysis.measures.fronts import Front, Point, pareto
from fedsim_analysis.measures.groups import Group, groups
from fedsim_analysis.measures.layers import Heat, churn, layer_density
from fedsim_analysis.measures.metrics import METRICS, Metric, final, measured, metric_of
from fedsim_analysis.measures.nodes import Lacking
from fedsim_analysis.measures.overlap import overlap, overlap_of_rounds, overlap_of_runs
from fedsim_analysis.measures.phases import Phases, phases
from fedsim_analysis.measures.units import Scale, readable, scale_of

__all__ = [
    "METRICS",
    "OVER",
    "ClientValues",
    "Curve",
    "Difference",
    "Distribution",
    "Front",
    "Group",
    "Heat",
    "Lacking",
    "Metric",
    "Phases",
    "Point",
    "Scale",
    "Timeline",
    "churn",
    "curves",
    "differences",
    "distribution",
    "final",
    "groups",
    "layer_density",
    "measured",
    "metric_of",
    "note",
    "note_of",
    "of_clients",
    "overlap",
    "overlap_of_rounds",
    "overlap_of_runs",
    "pareto",
    "partition",
    "phases",
    "readable",
    "scale_of",
    "seeds_of",
    "timeline",
]
