"""From a run file to a plain torch module."""

from __future__ import annotations

import tomllib
from pathlib import Path

from torch import nn

from fedsim import models
from fedsim.assemble import assemble
from fedsim.fault import BadInput
from fedsim.job import check
from fedsim.record import Reader, read_model


def module_of(path: Path | str) -> nn.Module:
    """The final model of a finished run in evaluation mode, pruned weights exactly 0; BadInput for a run without one.

    Its data set must be where the job says, since that knows the shape of the images and the number of classes.
    """
    known = Reader(path).attributes
    if not known["finished"]:
        raise BadInput(f"{path} holds no final model yet: {known['rounds']} of {known['rounds_planned']} rounds are done")
    parts = assemble(check(tomllib.loads(known["job"]), str(path)))
    data = parts.population.train
    module = models.build(parts.job.model, data.shape, data.classes, parts.job.seed)
    tree = read_model(path)
    values = {key.partition("/")[2]: value for key, value in tree.items() if key.startswith(("w/", "buf/"))}
    missing, unknown = module.load_state_dict(values, strict=False)
    if unknown or [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise BadInput(f"{path}: the model in the file is not the job's: {', '.join([*unknown, *missing])}")
    return module.eval()
