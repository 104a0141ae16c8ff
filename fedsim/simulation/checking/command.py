"""`fedsim check`: every way to compute a model, held against the plain torch module, as a table."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from fedsim import models
from fedsim.config.job import Job
from fedsim.core import rng
from fedsim.data.population import populate
from fedsim.errors import BadInput
from fedsim.models import ModelSettings
from fedsim.nn.checks import ways
from fedsim.nn.checks.ways import Found
from fedsim.simulation.checking.start import IMAGES, Images, images_of, refuse_wrong, uncounted


def check_job(job: Job, console: Console) -> int:
    """Checks the model of a job on its own images; the exit code."""
    data = populate(job.data, job.partition, job.seed).train
    return _check(job.model, models.build(job.model, data.shape, data.classes, job.seed), images_of(data), console)


def check_factory(place: str, shape: tuple[int, int, int], classes: int, console: Console) -> int:
    """Checks what a factory makes, on drawn images; the exit code. place: "package.module:function" or "file.py:function"."""
    where, _, name = place.rpartition(":")
    if where.endswith(".py"):
        if not (file := Path(where)).is_file():
            raise BadInput(f"fedsim check {place}: there is no file {where}")
        sys.path.insert(0, str(file.resolve().parent))
        where = file.stem
        _refuse_taken(place, file)
    settings = ModelSettings(factory=f"{where}:{name}")
    module = models.build(settings, shape, classes, 0)
    numbers = rng.normal(rng.key(0, "check"), IMAGES * shape[0] * shape[1] * shape[2])
    labels = rng.integers(rng.key(0, "labels"), IMAGES, classes)
    return _check(settings, module, (numbers.view(IMAGES, *shape), labels, classes), console)


def _refuse_taken(place: str, file: Path) -> None:
    """BadInput where Python knows another module by the name of the file; a module that fails is named later."""
    try:
        found = import_module(file.stem).__file__
    except (Exception, SystemExit):
        return
    if found is None or not file.samefile(found):
        raise BadInput(f"fedsim check {place}: Python has another module called {file.stem} ({found or 'built in'}); rename {file}")


def _check(settings: ModelSettings, module: nn.Module, images: Images, console: Console) -> int:
    refuse_wrong(settings, module, images)
    found = ways.every(module, *images[:2])
    console.print(_table(found))
    if not found[1].right:
        console.print("A run of this model trains one client after the other (the serial fleet).")
    if note := uncounted(settings, module):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _table(found: list[Found]) -> Table:
    table = Table(title="against the plain torch module: logits, gradients and buffers of two training steps", title_justify="left")
    for name in ("way to compute it", "works", "why not, or how much"):
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(row.way, "yes" if row.right else "no", Text(row.why))
    return table
