"""Fields of a job that it does not use: they would make another job of it, and nothing would differ.

The rule: a field that nothing reads must keep its default. What a settings class can see by itself it refuses where it is made;
here is what takes a look at several fields, and what a sweep may have in the runs that do not use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fedsim.config.toml_values import listed, written
from fedsim.data import partition
from fedsim.federated.protocol import Method

NORMED = ("batch", "group")  # values of model.norm that have scales
SHORTCUTS = ("resnet8", "resnet20", "resnet32", "resnet56")


@dataclass(frozen=True)
class Unused:
    """A field that a job gives and does not use."""

    section: str
    field: str
    value: Any
    why: str  # who would read it, and what the job has instead

    @property
    def key(self) -> str:
        return f"{self.section}.{self.field}"

    def __str__(self) -> str:
        way = f"leave it out, on a command line by --set {self.key}="
        return f"[{self.section}] {self.field} = {written(self.value)} is not used: {self.why}; {way}"


def unused(job: Any) -> list[Unused]:
    """The fields of a `Job`, of other values than their defaults, that nothing in it reads, in the order of the sections."""
    rules = {"data": _data, "partition": _partition, "devices": _devices, "model": _model, "train": _train, "evaluate": _evaluate}
    found = []
    for section, rule in {**rules, "method": _method}.items():
        settings = getattr(job, section)
        settings = getattr(settings, "use", settings)
        known = _defaults(settings)
        values = {field: getattr(settings, field) for field in known}
        found += [Unused(section, field, values[field], why) for field, why in rule(job) if values[field] != known[field]]
    return found


Rule = Iterator[tuple[str, str]]  # a field that is not read, and why


def _defaults(settings: Any) -> dict[str, Any]:
    if is_dataclass(settings):
        return {field.name: field.default for field in fields(settings)}
    return {name: info.default for name, info in type(settings).model_fields.items()}


def _data(job: Any) -> Rule:
    if job.data.factory is not None:
        for field in ("name", "split"):
            yield field, "data.factory gives the images"
    kinds = job.data.augments()
    for field, kind in {"crop_pad": "crop", "crop_border": "crop", "cutout": "cutout"}.items():
        if kind not in kinds:
            yield field, f'it is of the augmentation "{kind}", and data.augment is {written(kinds)}'


def _partition(job: Any) -> Rule:
    settings = job.partition
    own = partition.own_fields(settings)
    if "arguments" not in own:
        yield "arguments", f"they are of a function of your own, and partition.name is {written(settings.name)}"
    for field in sorted({field for each in partition.FIELDS.values() for field in each} - {*own}):
        yield field, f"it is of {listed(partition.users_of(field))}, and partition.name is {written(settings.name)}"
    if settings.name == "dirichlet_client":
        for field, sizes in partition.OF_SIZES.items():
            if settings.sizes != sizes:
                yield field, f'under dirichlet_client it is of sizes = "{sizes}", and partition.sizes is {written(settings.sizes)}'
    if settings.name not in partition.RANDOM_SIZES:
        yield (
            "max_tries",
            f"{settings.name} is drawn once; {listed(partition.RANDOM_SIZES)} are drawn again where a client has too few images",
        )


def _devices(job: Any) -> Rule:
    if not job.devices.name:
        yield "unfit", "the clients have no devices, since devices.name is not given"


def _model(job: Any) -> Rule:
    model = job.model
    if model.factory is not None:
        yield "name", "model.factory makes the model"
        yield "width", "model.factory makes the model, and does not see it"
    elif model.norm not in NORMED:
        yield "norm_weight", f"it is of the norms {listed(NORMED)}, and model.norm is {written(model.norm)}"
    if model.name not in SHORTCUTS:
        yield "detach_shortcut", f"it is of {listed(SHORTCUTS)}, and model.name is {written(model.name)}"


def _train(job: Any) -> Rule:
    train = job.train
    if train.schedule not in ("exponential", "step"):
        yield "factor", f'it is of the schedules "exponential" and "step", and train.schedule is {written(train.schedule)}'
    if train.schedule != "step":
        yield "milestones", f'it is of the schedule "step", and train.schedule is {written(train.schedule)}'
    if train.activation_keep == 1:
        for field in ("activation_layers", "activation_cache"):
            yield field, "train.activation_keep = 1 keeps activations whole"
    for field, aggregate in {"fedprox_mu": "fedprox", "fednova_weights": "fednova"}.items():
        if field not in train.read_by_aggregation:
            yield field, f'it is of aggregate = "{aggregate}", and train.aggregate is {written(train.aggregate)}'


def _evaluate(job: Any) -> Rule:
    chosen = job.population is None or job.evaluate.clients != type(job.evaluate)().of(job.population)  # a whole job names the default
    if not job.evaluate.every:
        for field in ("clients", "batch") if chosen else ("batch",):
            yield field, "evaluate.every = 0 evaluates never"
    elif job.partition.test == "global" and chosen:
        yield "clients", 'with partition.test = "global" no client has test images'


def _method(job: Any) -> Rule:
    method: Method[Any] = job.method.use
    yield from method.unread().items()
