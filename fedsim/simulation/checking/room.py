"""Whether the images and the model of a job have room in this machine's memory. Answered before any of them is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fedsim import models
from fedsim.config.job import Job
from fedsim.data.settings import DRAWN
from fedsim.errors import BadInput
from fedsim.reporting.formatting import quantity

FIELDS = ("train_images", "test_images", "channels", "image_size")
LABEL = 16  # bytes of an image beside its pixels: its label and its client
COPIES = 3  # of the parameters, at least: the shared ones, a client's, and their gradients
SIGNS = ("can't allocate memory", "out of memory", "size calculation overflowed", "array is too big", "Maximum allowed dimension")


def refuse_images(job: Job) -> None:
    """BadInput where the images that the job has drawn need more memory than there is."""
    data = job.data
    size, channels = data.image_size or 1, data.channels or 1
    images = (data.train_images or 1) + (data.test_images or 1) if data.called in DRAWN else 1
    stored = images if data.called == "shapes" else 1  # the other images are made when they are used
    fields = [f"{name} = {value:,}" for name in FIELDS if (value := getattr(data, name)) is not None]
    _refuse("[data] " + ", ".join(fields), stored * channels * size**2 + images * LABEL, "images")


def refuse_model(job: Job, shape: models.Shape, classes: int) -> None:
    """BadInput where a model of fedsim has more parameters than memory can hold."""
    width, family = job.model.width, models.FAMILIES.get(job.model.name)
    if job.model.factory or family is None or width is None or width <= family.width:
        return
    count = models.parameters(job.model, shape, classes)
    _refuse(f"[model] width = {width:,}", COPIES * 4 * count, f"{count:,} parameters")


@contextmanager
def in_memory() -> Iterator[None]:
    """An allocation that fails inside becomes a BadInput."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if isinstance(error, BadInput) or not (isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "lower the numbers of [data], [partition] or [model]"
        raise BadInput(f"the images, the clients or the model need more memory than this machine has: {fix} ({what})") from error


def _refuse(fields: str, needed: int, what: str) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise BadInput(f"{fields}: {what} need at least {quantity(needed, 'B')} of memory; this machine has {quantity(there, 'B')}")
