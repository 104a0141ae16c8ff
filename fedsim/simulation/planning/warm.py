"""`fedsim warm`: compiles every kernel ahead of the first run, as for the image of a cluster, by small runs that use them all."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from fedsim.config.job import check
from fedsim.core.compiled import cache_folder
from fedsim.errors import BadInput
from fedsim.simulation import launch
from fedsim.simulation.launch import Observer

SMALL: dict[str, Any] = {
    "rounds": 1,
    "data": {"name": "fake", "image_size": 8, "train_images": 80, "test_images": 20},
    "partition": {"name": "blocks", "clients": 2, "min_images": 1},
    "cohort": {"size": 2},
    "train": {"steps": 2, "batch": 8, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.001},
    "execution": {"fleet": "serial", "packs": 1, "kernels": "sparse", "device": "cpu"},
}
GROWING = {"name": "fedtiny", "selection": "none", "density": 0.3, "pretrain_epochs": 0, "adjust_every": 1, "stop_round": 2}
RUNS: dict[str, dict[str, Any]] = {  # kernels are compiled for types and layouts of arrays, whatever their sizes
    "sparse, batch norm": {"model": {"name": "resnet8", "norm": "batch"}, "method": GROWING},
    "sparse, group norm": {"model": {"name": "resnet8", "norm": "group"}, "method": GROWING},
    "sparse, without momentum": {
        "model": {"name": "cnn", "norm": "none"},
        "train": {"momentum": 0.0, "weight_decay": 0.0},
        "method": {"name": "magnitude", "density": 0.3, "pretrain_epochs": 0},
    },
    "sparse, normalised convolutions": {"model": {"name": "resnet8", "norm": "nsconv"}, "method": GROWING},
    "pruned activations": {"model": {"name": "resnet8"}, "method": GROWING, "train": {"activation_keep": 0.3}},
    "pruned activations, dense": {
        "model": {"name": "cnn", "norm": "nsconv"},
        "method": GROWING,
        "train": {"activation_keep": 0.3},
        "execution": {"kernels": "dense"},
    },
    "stacked clients": {"model": {"name": "cnn"}, "method": {"name": "fedavg"}, "execution": {"fleet": "packed", "kernels": "dense"}},
    "stacked normalised convolutions": {
        "model": {"name": "cnn", "norm": "nsconv"},
        "method": {"name": "fedavg"},
        "execution": {"fleet": "packed", "kernels": "dense"},
    },
    "gated channels": {
        "rounds": 2,
        "partition": {"name": "iid", "holdout": 0.2},
        "model": {"name": "resnet8", "norm": "group"},
        "method": {"name": "dwfnp", "cotrain": 2, "warmup": 0, "hyper_interval": 1},
        "execution": {"kernels": "dense"},
    },
    "scaffold": {"model": {"name": "cnn"}, "method": {"name": "fedavg"}, "train": {"aggregate": "scaffold", "momentum": 0.0}},
}


def warm(console: Console) -> int:
    """Says what it compiled and where. BadInput where the code could not be kept."""
    folder = cache_folder()
    if folder is None:
        raise BadInput("compiled kernels cannot be kept: no folder for them can be written; NUMBA_CACHE_DIR names one")
    before = set(folder.iterdir())
    with TemporaryDirectory() as made:
        for number, (name, sections) in enumerate(RUNS.items()):
            with console.status(name):
                job = check({key: _merged(SMALL.get(key, {}), sections.get(key, {})) for key in {**SMALL, **sections}})
                quiet = Observer(console=Console(file=io.StringIO()))
                launch.run(job, Path(made) / f"{number}.h5", "never", None, quiet)
    new = len(set(folder.iterdir()) - before)
    console.print(f"{new} kernels compiled, {len(before)} were there already: {folder}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _merged(one: Any, other: Any) -> Any:
    """A section with the values of both, those of `other` where both have one; of what is no section the other, if there is one."""
    return {**one, **other} if isinstance(one, dict) else other or one
