"""What stands below the tables: what their columns mean, and what a reader might take for more than it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import pandas as pd

from fedsim_analysis.comparison.grouping import Comparison
from fedsim_analysis.comparison.printed.naming import Naming
from fedsim_analysis.comparison.printed.sheets import costs_named
from fedsim_analysis.comparison.tables import UNMEASURED

FEW = 6  # pairs, below which no p of the test can be under 0.05
INTERVAL = "±: half the 95 % interval of the mean over seeds, by Student's t."
ONE_PARTITION = "All seeds of a row have one partition: the interval is over cohorts, batches and first weights."
OWN_PARTITIONS = "Each seed has a partition of its own, so the interval is over partitions too; partition.seed gives all seeds one."
PAIRED = (
    "difference: of pairs of runs with the same seed, partition, cohorts and first weights, from the baseline, in the mean. p: of"
    " Wilcoxon's signed-rank test, two-sided, exact."
)
HOLM = "p by Holm: corrected over all rows of the table that are held against the same baseline."
FEW_PAIRS = "{} cannot give a p below {:.3g}; with fewer than {} pairs no p is below 0.05, however large the difference is."
EQUAL = "At equal cost nothing is interpolated; - where no evaluation after training is within the budget, or the memory does not suffice."
BEST = "best: of the rows of a method, for one may choose among them; it is chosen by the accuracy that it is shown with."
TARGET = "{} until a target are means over the seeds that reached it."
UNFINISHED = "unfinished: runs that go on or were stopped; they count with what they have so far."
OVERVIEW = (
    "Overview: accuracy of the last model; density, the kept share of the weights; share of dense FLOPs, those of training the dense"
    " network, of a client in its most expensive round after round 0; sent, up and down, by all clients in all rounds; memory of the"
    " client that needs most, as fedsim counts it, and without the activations of a batch."
)


def of(naming: Naming, frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """The remarks that these tables need, each a line or more."""
    comparison = naming.comparison
    held = [frame for name, frame in frames.items() if name in ("metrics", "equal") and len(comparison.groups) > 1]
    found = [OVERVIEW] if "overview" in frames else []
    if any(len(group.runs) > 1 for group in comparison.groups):
        found.append(INTERVAL)
    if "overview" in frames and (text := drawn(comparison)):
        found.append(text)
    if held:
        found += [PAIRED, *_of_pairs(naming, pd.concat(held, ignore_index=True))]
    if "equal" in frames:
        found += [EQUAL, *([BEST] if _has_choices(comparison) else [])]
    found += [TARGET.format(costs_named(frames["target"]))] if "target" in frames else []
    found += [UNFINISHED] if any(group.unfinished for group in comparison.groups) else []
    if len(comparison.blocks) > 1:
        found.append(f"Runs on {' and on '.join(comparison.blocks)} are not held against each other: their accuracies are of other images.")
    return found


def drawn(comparison: Comparison) -> str:
    """What else than training differs between the seeds of a row; empty where a row has one run, or where rows differ in this."""
    hashes = [[run.attributes.get("partition_sha256") for run in group.runs] for group in comparison.groups if len(group.runs) > 1]
    if not hashes or not all(map(all, hashes)):
        return ""
    if all(len(set(each)) == 1 for each in hashes):
        return ONE_PARTITION
    return OWN_PARTITIONS if all(len(set(each)) == len(each) for each in hashes) else ""


def _of_pairs(naming: Naming, rows: pd.DataFrame) -> list[str]:
    apart = rows[rows["group"] != rows["baseline"]]
    found = [HOLM] if (apart["p_holm"] != apart["p"])[apart["p"].notna()].any() else []
    if 0 < (least := min((n for n in apart["pairs"] if n), default=0)) < FEW:
        found.append(FEW_PAIRS.format("1 pair" if least == 1 else f"{least} pairs", 2.0 ** (1 - least), FEW))
    reasons = apart[~apart["why_not"].isin(["", UNMEASURED])].drop_duplicates(["group", "baseline", "why_not"])
    return [*found, *(_reason(naming, row) for row in reasons.to_dict("records"))]


def _reason(naming: Naming, row: Mapping[Hashable, object]) -> str:
    pairs = "no pairs" if not row["pairs"] else f"{row['pairs']} pairs of {row['runs']} runs"
    return f"{naming.of(row['group'])} and {naming.of(row['baseline'])} have {pairs}: {row['why_not']}."


def _has_choices(comparison: Comparison) -> bool:
    methods = [(group.data, group.job.get("method.name")) for group in comparison.groups]
    return len(set(map(repr, methods))) < len(methods)
