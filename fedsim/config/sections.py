"""Sections of a job: the cohort, local training, evaluation and execution. Other sections stand in the packages that use them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from fedsim.config.durations import FORMS, seconds
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.types import LocalTraining
from fedsim.core.validation import MAX_COHORT
from fedsim.errors import BadInput
from fedsim.federated import aggregation
from fedsim.federated.aggregation import FedAvg

SMALL_COHORT = 10  # clients per round when the job does not say
ALL_CLIENTS = 1_000  # up to this many are evaluated one by one when the job does not say

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Number = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
SELECTS = ("uniform", "available", "fastest", "fits")
SELECT = (
    '"uniform" (those that are away are missing), "available" (only those that are there), "fastest", "fits" (only those with the memory),'
    ' or "package.module:function"'
)
OF_MODE = {"deadline": "deadline", "extra": "oversample", "concurrency": "buffered", "buffer": "buffered", "max_staleness": "buffered"}
LIMIT = f"a number of minutes, above 0, or a time as SLURM writes it: {FORMS}"
PLANS = '"auto", "reference" or the run file whose plan is taken (RUN.h5)'


class Section(BaseModel):
    """A section of the job: no other fields than these, and no values of other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Cohort(Section):
    """The section [cohort]: which clients take part in a round, and with [devices] whose answers the server waits for."""

    size: Number | None = None  # clients per round; None: all, at most 10
    mode: Literal["sync", "deadline", "oversample", "buffered"] = "sync"  # whose answers count, with [devices]
    deadline: Positive | None = None  # seconds that the server waits for answers, in each exchange of a round
    least: Number = 1  # answers; a round with fewer is repeated with other clients
    extra: NotNegative | None = None  # oversample: share of clients that are asked beyond the cohort; None: 0.3
    concurrency: Number | None = None  # buffered: clients that train at any time; None: the size
    buffer: Number | None = None  # buffered: answers of one server step, which is a round; None: the size
    max_staleness: Annotated[int, Field(ge=0)] | None = None  # buffered: server steps after which an answer is dropped; None: 10
    select: Annotated[str, Field(description=SELECT)] = "uniform"

    @model_validator(mode="after")
    def _fits_together(self) -> Cohort:
        for field, mode in OF_MODE.items():
            if getattr(self, field) is not None and self.mode != mode:
                raise ValueError(f'[cohort] {field} belongs to mode = "{mode}"; the job has mode = "{self.mode}"')
        if self.mode == "deadline" and self.deadline is None:
            raise ValueError('[cohort] mode = "deadline" needs a deadline, in seconds')
        if self.mode == "buffered" and (self.least != 1 or self.select not in ("uniform", "available", "fits")):
            raise ValueError('[cohort] mode = "buffered" has no least, and its select is "uniform", "available" or "fits"')
        if self.select not in SELECTS and ":" not in self.select:
            raise ValueError(f"[cohort] select = {self.select!r} is not known. There are: {', '.join(SELECTS)}, or package.module:function")
        return self

    @property
    def of_devices(self) -> dict[str, Any]:
        """What it says that needs [devices]; empty where all is as without."""
        default = type(self)()
        return {field: value for field, value in self if field != "size" and value != getattr(default, field)}

    def of(self, clients: int) -> int:
        """Clients per round out of `clients`; BadInput when there are not that many."""
        size = min(SMALL_COHORT, clients) if self.size is None else self.size
        if size > clients:
            raise BadInput(f"[cohort] size = {size} is more than the population; there are {clients} clients")
        if size > MAX_COHORT:
            raise BadInput(f"[cohort] size = {size}; at most {MAX_COHORT:,} clients a round can be summed exactly")
        return size


class Train(Section):
    """The section [train]: local training, and how its results are averaged."""

    epochs: Number | None = None  # local epochs; 1 unless steps says otherwise
    steps: Number | None = None  # local steps, instead of epochs
    batch: BatchSize = LocalTraining.batch  # images of a step
    lr: NotNegative = LocalTraining.lr  # learning rate of clients
    momentum: Annotated[float, Field(ge=0, lt=1)] = LocalTraining.momentum  # of SGD
    weight_decay: NotNegative = LocalTraining.decay  # times the weights, added to their gradients
    optimiser: Literal["sgd", "adam"] = "sgd"  # of clients
    schedule: Literal["constant", "cosine", "exponential", "step"] = "constant"  # of the learning rate, over rounds
    factor: Positive = LocalTraining.factor  # of exponential (each round) and step (at each milestone)
    milestones: tuple[Share, ...] = LocalTraining.milestones  # of step: shares of the rounds after which the rate falls
    activation_keep: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the inputs of layers, kept for their weights' gradients; 1: plain layers
    )
    activation_layers: Literal["all", "conv"] = "all"  # which: never the first one; conv: linear layers keep all
    activation_cache: Literal["bitmap", "int32"] = "bitmap"  # how the positions of what is kept are kept
    aggregate: str = "fedavg"  # how the server averages: fedavg, fedprox, fednova, scaffold, or "package.module:Class" of your own
    aggregate_fields: dict[str, Any] | None = None  # of an aggregation of your own: its fields that [train] does not have
    fedprox_mu: NotNegative = aggregation.NAMES["fedprox"]().fedprox_mu  # type: ignore[attr-defined]  # weight of the proximal term
    fednova_weights: Literal["samples", "batches"] = "samples"  # what clients count by under fednova: their images, or their local steps

    @field_validator("aggregate")
    @classmethod
    def _known(cls, name: str) -> str:
        aggregation.find(name)
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Train:
        if self.epochs and self.steps:
            raise ValueError(f"[train] has epochs = {self.epochs} and steps = {self.steps}; give one of them")
        if self.optimiser == "adam" and self.momentum:
            raise ValueError(f'[train] optimiser = "adam" has moments of its own; leave out momentum = {self.momentum}')
        if self.optimiser == "adam" and aggregation.find(self.aggregate).sgd:
            raise ValueError(f'[train] aggregate = "{self.aggregate}" follows the steps of SGD; leave out optimiser = "adam"')
        self._check_fields(aggregation.find(self.aggregate))
        return self

    def _check_fields(self, kind: type[FedAvg]) -> None:
        """ValueError where the fields of the aggregation are not those that it has, or not of their types."""
        own = [f.name for f in fields(kind) if not hasattr(self, f.name)]
        given = self.aggregate_fields or {}
        if other := [name for name in given if name not in own]:
            has = f"it has: {', '.join(own)}" if own else "it has no fields of its own"
            raise ValueError(f"[train] aggregate_fields has {other[0]!r}, and {self.aggregate} does not read it from there; {has}")
        try:
            self._made(kind)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"][1:])
            raise ValueError(f"[train] aggregate_fields: {field or self.aggregate}: {first['msg']}") from None

    def _made(self, kind: type[FedAvg]) -> Any:
        """The aggregation, with the values of its fields from this section or from aggregate_fields."""
        values = {f.name: getattr(self, f.name) for f in fields(kind) if hasattr(self, f.name)} | (self.aggregate_fields or {})
        holder = create_model("Holder", __config__=Section.model_config, use=(kind, ...))
        return holder.model_validate_json(json.dumps({"use": values})).use  # type: ignore[attr-defined]

    def training(self, rounds: int, augment: bool) -> LocalTraining:
        """The same numbers as fleets and methods use them."""
        epochs, steps = (0, self.steps) if self.steps else (self.epochs or 1, 0)
        taken = {f.name: getattr(self, f.name) for f in fields(LocalTraining) if hasattr(self, f.name)}
        return LocalTraining(**taken | {"epochs": epochs, "steps": steps, "decay": self.weight_decay, "rounds": rounds, "augment": augment})

    def keep(self) -> ActivationPruning | None:
        """How the inputs of layers are pruned; None: they are not pruned."""
        return ActivationPruning(self.activation_keep, self.activation_layers, self.activation_cache) if self.activation_keep < 1 else None

    @property
    def read_by_aggregation(self) -> list[str]:
        """The fields of this section that the aggregation has too."""
        return [f.name for f in fields(aggregation.find(self.aggregate))]

    def aggregation(self) -> Any:
        """The aggregation of this name, with its parameters from this section."""
        return self._made(aggregation.find(self.aggregate))


class Evaluate(Section):
    """The section [evaluate]: in which rounds, and on which clients."""

    every: Annotated[int, Field(ge=0)] = 1  # rounds from one evaluation to the next; the last one always; 0: never
    clients: Literal["all", "cohort"] | Number | None = None  # whose own test images; None: all up to 1,000 clients, else the cohort
    batch: BatchSize = 256  # images of a forward pass

    def of(self, clients: int) -> Literal["all", "cohort"] | int:
        """Which of `clients` clients are evaluated on their own test images."""
        if self.clients is None:
            return "all" if clients <= ALL_CLIENTS else "cohort"
        if isinstance(self.clients, int) and self.clients > clients:
            raise BadInput(f"[evaluate] clients = {self.clients} is more than the population; there are {clients} clients")
        return self.clients


class Record(Section):
    """The section [record]: where else the rounds are written, beside the run file."""

    mirror: Literal["", "csv", "tensorboard", "mlflow", "wandb-offline"] = ""  # a tracker that gets a copy of each round; "": none


class Execution(Section):
    """The section [execution]: how the job is computed. The plan chooses what is None."""

    plan: Annotated[str, Field(pattern=r"^(auto|reference|.+\.h5)$", description=PLANS)] = "auto"
    fleet: Literal["serial", "packed", "cuda_graph"] | None = None  # how clients are trained on a rank
    packs: Number | None = None  # packs that a cohort is cut into
    memory_format: Literal["contiguous", "channels_last"] | None = None  # of images and convolutions
    kernels: Literal["dense", "sparse"] | None = None  # of layers with a mask; None: by their density, as measured
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where clients train; auto: a GPU where there is one
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"  # of convolutions and products; weights, norms and losses stay float32
    packed_conv: Literal["grouped", "matmul"] | None = None  # how the convolutions of a pack are computed
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a GPU's memory that one rank may take; R ranks on it: 1 / R
    cuda_aware_mpi: Literal["auto", "on", "off"] = "auto"  # whether MPI is handed tensors on the GPU, or copies of them on the host
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # of torch, per rank
    checkpoint_every: Number = 1  # rounds from one checkpoint to the next
    scratch: str = ""  # a folder of the node's own disk where the run writes, copied to --out after each checkpoint; $NAME is expanded
    time_limit: Annotated[Positive | str | None, Field(description=LIMIT)] = None  # minutes, or "1:30:00", after which the run stops gently

    @field_validator("time_limit")
    @classmethod
    def _a_time(cls, limit: float | str | None) -> float | str | None:
        if isinstance(limit, str):
            try:
                short = seconds(limit) <= 0
            except ValueError as error:
                raise ValueError(f"[execution] time_limit = {error}") from None
            if short:
                raise ValueError(f"[execution] time_limit = {limit!r}: should be above 0")
        return limit

    @property
    def limit(self) -> float | None:
        """Its seconds; None where there is none."""
        if self.time_limit is None:
            return None
        return seconds(self.time_limit) if isinstance(self.time_limit, str) else 60 * self.time_limit
