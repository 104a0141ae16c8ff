"""Draws jobs/devices/devices.svg from the runs of `fedsim sweep jobs/devices/*.toml --out runs/devices`: accuracy over the clock of the
devices, a panel for each answer to how the time of a layer falls with its density.

    python jobs/devices/figure.py runs/devices jobs/devices/devices.svg
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import fedsim_analysis
import matplotlib.pyplot as plt
import numpy as np
from fedsim_analysis.measures import colours
from fedsim_analysis.plots import lines, style

PANELS = ("none", "measured", "ideal")
NAMES = {
    "dense": ("dense", "fedavg"),
    "small_dense": ("small dense", colours.SMALL_DENSE),
    "magnitude": ("magnitude at initialisation", "magnitude"),
    "fedtiny": ("FedTiny", "fedtiny"),
    "fedmef": ("FedMef", "fedmef"),
    "dwfnp": ("device-wise pruning", "dwfnp"),
    "adp": ("adaptive dynamic pruning", "adp"),
}

DASHED = {"small_dense": "--"}


def main(folder: Path, out: Path) -> None:
    """A line for each job: the mean accuracy over its seeds, over the mean time at the end of each round."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.h5")):
        job, _, rest = path.stem.partition("-sparse")
        found[rest.partition("-")[0], job].append(path)
    with style():
        figure, axes = plt.subplots(1, len(PANELS), figsize=(6.9, 2.6), sharex=True, sharey=True, layout="constrained")
        for ax, sparse in zip(axes, PANELS, strict=True):
            for job, (name, method) in NAMES.items():
                rounds = fedsim_analysis.open(found[sparse, job], group="rounds")
                colour, marker = colours.METHODS[method]
                clock, accuracy = (rounds[column].mean("run").values for column in ("clock", "accuracy"))
                here = np.isfinite(accuracy) & (clock > 0)
                ax.plot(
                    clock[here],
                    100 * accuracy[here],
                    color=colour,
                    marker=lines.MARKERS[marker],
                    markevery=(2, 6),
                    ls=DASHED.get(job, "-"),
                    label=name,
                )
            ax.set(xscale="log", title=f'sparse = "{sparse}"', xlabel="time of the devices, s", xlim=(0.5, 600))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.axhline(78, color="0.5", lw=0.6, ls=":")
        axes[0].set(ylabel="accuracy, %", ylim=(40, 87))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
