"""The job file: a TOML file becomes one validated, frozen Job, or one BadInput with a line for each error.

The settings of a section are a frozen dataclass in the package that uses them. pydantic validates these classes as they are, so that a
field and its default are written once. A Job says what is computed; [execution] says how, and changes results by rounding at most.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tomli_w
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    create_model,
    model_validator,
)

from fedsim.config import limits, method_registry
from fedsim.config.job_file import flat, put, table_of
from fedsim.config.messages import complain
from fedsim.config.sections import Cohort, Evaluate, Execution, Number, Record, Section, Train
from fedsim.config.unused import Unused, unused
from fedsim.data.partition import PartitionSettings
from fedsim.data.settings import DataSettings
from fedsim.devices.settings import DeviceSettings
from fedsim.errors import BadInput
from fedsim.models.settings import ModelSettings

WHERE_NOT_WHAT = ("execution", "record", "data.root", "data.download")  # may differ between two runs of one job
SWEEP = 'a list of values for each field, for example "train.lr" = [0.1, 0.05]'
MOST_RUNS = 10_000  # of a sweep; each is validated before the first one begins
FILE_NAME = "a text that can name a file: not empty, without / and line breaks"


@dataclass(frozen=True)
class Chosen:
    """The section [method]: the name in the job, and the method with its hyperparameters."""

    name: str
    use: Any


def _choose(table: Any) -> Chosen:
    """The method that [method] names. BadInput: there is none; ValidationError: its fields are wrong."""
    if not isinstance(table, dict):
        raise BadInput('[method] is a section: write [method] and below it name = "fedavg"')
    if not isinstance(table.get("name"), str):
        raise BadInput(f"[method] needs a name. There are: {', '.join(method_registry.names())}")
    method: Any = method_registry.find(table["name"])
    rest = {key: value for key, value in table.items() if key != "name"}
    _refuse_kinds(table["name"], method, rest)
    holder = create_model("Holder", __config__=Section.model_config, use=(method, ...))
    return Chosen(table["name"], holder.model_validate_json(json.dumps({"use": rest})).use)  # type: ignore[attr-defined]


def _refuse_kinds(name: str, method: Any, given: dict[str, Any]) -> None:
    """BadInput for a number by kind of device, where the method gives all clients one model; it lists the fields that can be given so."""
    hints = get_type_hints(method)
    for field, value in given.items():
        if isinstance(value, dict) and field in hints and "dict" not in str(hints[field]):
            can = [f"{field} of {name}" for name, fields in method_registry.by_kind().items() for field in fields]
            raise BadInput(f"[method] {field} is given by kind of device, and {name} has one for all clients. By kind: {', '.join(can)}")


def _write(chosen: Chosen) -> dict[str, Any]:
    return {"name": chosen.name, **asdict(chosen.use)}


class Job(Section):
    """A validated job. Made by `load` or `check`."""

    name: Annotated[str, Field(pattern=r"^[^/\s\x00-\x1f][^/\x00-\x1f]*$", description=FILE_NAME)] = "job"  # also the name of the run file
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of the partition, the cohorts, the batches and the first weights
    rounds: Number = 100  # all of them, warm-up and fine-tuning included
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    cohort: Cohort = Cohort()
    devices: DeviceSettings = DeviceSettings()
    model: ModelSettings = ModelSettings()
    train: Train = Train()
    method: Annotated[Chosen, PlainValidator(_choose), PlainSerializer(_write)]
    evaluate: Evaluate = Evaluate()
    record: Record = Record()
    execution: Execution = Execution()
    sweep: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(description=SWEEP)] = Field(default_factory=dict)

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)  # the values in the file and on the command line, for `runs`

    @property
    def given(self) -> dict[str, Any]:
        """The values in the file and on the command line, as a table; defaults are not in it."""
        return deepcopy(self._given)

    @property
    def file(self) -> str:
        """The name of its run file, in signs of the file system where a locale has only ASCII names."""
        return os.fsdecode(f"{self.name}.h5".encode())

    @property
    def population(self) -> int | None:
        """Registered clients; None when the data alone knows (one for each natural user)."""
        return self.partition.clients or None

    @model_validator(mode="after")
    def _fits(self) -> Job:
        if too_large := list(self._too_large()):
            raise ValueError("\n".join(too_large))
        for section in ("model", "method"):
            for field, value in _densities(getattr(self, section)):
                if not 0 < value <= 1:
                    raise ValueError(f"[{section}] {field} = {value}: a density is a share of the weights, above 0 and at most 1")
        if self.cohort.of_devices and not self.devices.name:
            field, value = next(iter(self.cohort.of_devices.items()))
            raise ValueError(f"[cohort] {field} = {value!r} needs devices: [devices] name; `fedsim devices` lists them")
        if self.population is not None:
            self.cohort.of(self.population)
            self.evaluate.of(self.population)
        return self

    def _too_large(self) -> Iterator[str]:
        if self.rounds > limits.LARGEST_WHOLE:
            yield f"rounds = {self.rounds} is too large: should be at most {limits.LARGEST_WHOLE:,}"
        for section in ("data", "partition", "cohort", "devices", "model", "train", "method", "evaluate", "execution"):
            settings = getattr(self, section)
            yield from limits.too_large(getattr(settings, "use", settings), f"[{section}] ")


def _densities(settings: Any) -> Iterator[tuple[str, float]]:
    """The densities in a section, with their names. A density means the same in every section, so it is checked in one place."""
    for name, value in vars(getattr(settings, "use", settings)).items():
        if (name == "density" or name.endswith("_density")) and isinstance(value, int | float):
            yield name, value


def load(path: Path | str, overrides: Sequence[str] = ()) -> Job:
    """The job in a file, with some `section.field=value` replaced. Its name is that of the file, unless the job gives one."""
    path = Path(path)
    return check(table_of(path, overrides), str(path))


def check(table: dict[str, Any], where: str = "job") -> Job:
    """The job in a table, as a TOML file gives it. BadInput has a line for each error, each beginning with `where`."""
    job = recorded(table, where)
    if job.sweep:
        runs(job, where)  # an error in any run of a sweep is reported now
    else:
        _refuse(unused(job), where)
    return job


def recorded(table: dict[str, Any], where: str = "job") -> Job:
    """The job in a run file, which may be of a time when fields that it does not use were not refused."""
    if lines := list(limits.foreign(table)):
        raise BadInput("\n".join(f"{where}: {line}" for line in lines))
    settled = _settled(table, where)
    try:
        job = Job.model_validate_json(json.dumps(settled, default=str))
    except ValidationError as error:
        raise BadInput("\n".join(f"{where}: {line}" for line in complain(error, Job, settled))) from None
    job._given = deepcopy(table)
    return job


def _refuse(found: Iterable[Unused], where: str) -> None:
    if lines := [f"{where}: {each}" for each in found]:
        raise BadInput("\n".join(lines))


def runs(job: Job, where: str = "job") -> list[Job]:
    """The runs of the job's [sweep], the last field varying fastest; the job itself when it has no sweep.

    A field of the job that only some runs use is left out of the others.
    """
    if not job.sweep:
        return [job]
    if (count := prod(map(len, job.sweep.values()))) > MOST_RUNS:
        sizes = " x ".join(f"{len(values):,}" for values in job.sweep.values())
        raise BadInput(f"{where}: [sweep] makes {sizes} = {count:,} runs; at most {MOST_RUNS:,} can be made: list fewer values")
    made = [_run(job, dict(zip(job.sweep, values, strict=True)), where) for values in product(*job.sweep.values())]
    names = [run.name for run in made]
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise BadInput(f"{where}: [sweep] makes two runs with the name {twice[0]!r}; list each value once")
    return _without_unused(made, set(job.sweep), where)


def _run(job: Job, values: dict[str, Any], where: str) -> Job:
    table = {key: deepcopy(value) for key, value in job._given.items() if key != "sweep"}
    shown = [f"{key.rpartition('.')[2]}{value}" for key, value in values.items()]
    name = "-".join([job.name, *(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in shown)])
    for key, value in ({"name": name} | values).items():
        put(table, key, value)
    return recorded(table, _of_sweep(where, name))


def _of_sweep(where: str, name: str) -> str:
    return f"{where}, run {name} of [sweep]"


def _without_unused(made: list[Job], swept: set[str], where: str) -> list[Job]:
    """The runs, without the fields of the job that others use. BadInput for a field that none uses, or a swept one that one does not."""
    found = [unused(run) for run in made]
    by_none = set.intersection(*({each.key for each in some} for some in found))
    _refuse([each for each in found[0] if each.key in by_none - swept], where)
    for run, some in zip(made, found, strict=True):
        _refuse([each for each in some if each.key in swept], _of_sweep(where, run.name))
    return [_without(run, some) if some else run for run, some in zip(made, found, strict=True)]


def _without(run: Job, some: list[Unused]) -> Job:
    table = run.given
    for each in some:
        del table[each.section][each.field]
    return recorded(table, run.name)


def resolved(job: Job, without: Sequence[str] = ()) -> str:
    """The whole job as TOML, with all defaults written out, and `without` some sections or "section.field"s."""
    table = job.model_dump(exclude={"sweep"} if not job.sweep else None)
    if not job.devices.name:  # a job without devices is written as before there were any
        del table["devices"]
        table["cohort"] = {"size": table["cohort"]["size"]}
    table["train"]["epochs"] = None if job.train.steps else job.train.epochs or 1
    if job.population is not None:
        table["cohort"]["size"] = job.cohort.of(job.population)
        table["evaluate"]["clients"] = job.evaluate.of(job.population)
    for key in without:
        section, _, field = key.partition(".")
        (table[section] if field else table).pop(field or section)
    return tomli_w.dumps(_without_none(table))


def identity(job: Job) -> str:
    """SHA-256 of what the job computes: two jobs that differ only in [execution], [record] or the place of the data are the same job."""
    return sha256(resolved(job, WHERE_NOT_WHAT).encode()).hexdigest()


def _without_none(value: Any) -> Any:
    """TOML has no null: a field that is None is left out, since None is its default."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _settled(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with its sweep flattened, and with the fields that an alias of a method or a natural partition fixes."""
    table = deepcopy(table)
    table["sweep"] = flat(table.get("sweep", {}))
    table.setdefault("method", {})  # so that a missing section gives the message of a missing name
    if isinstance(partition := table.get("partition"), dict) and partition.get("name") == "natural":
        partition.setdefault("clients", 0)  # one for each user, unless the job wants them merged
    name = table["method"].get("name") if isinstance(table.get("method"), dict) else None
    alias = method_registry.ALIASES.get(str(name))
    for key, value in alias.fixed.items() if alias else ():
        section, _, field = key.partition(".")
        given = table.setdefault(section, {})
        if isinstance(given, dict) and given.setdefault(field, value) != value:
            raise BadInput(f"{where}: [method] name = {name!r} means {key} = {value!r}; the job says {given[field]!r}; leave it out")
    return table
