"""From a job to the parts that run it: population, net, setting, method, and where the work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim import models
from fedsim.config import own_code
from fedsim.config.job import Job, identity, resolved
from fedsim.core import tree
from fedsim.costs.profile import ModelProfile
from fedsim.data.partition import NAMES as PARTITIONS
from fedsim.data.population import Population, populate
from fedsim.devices import reading
from fedsim.errors import BadInput
from fedsim.federated.budgets import given_by_kind, of_clients
from fedsim.federated.protocol import Setting
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.timed.rules import Rules
from fedsim.nn import optim, profiler
from fedsim.nn.checks import traced
from fedsim.nn.net import Net
from fedsim.simulation.checking import room, start
from fedsim.simulation.devices.rules import rules_of


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs that follows from its job alone."""

    job: Job
    population: Population
    model_profile: ModelProfile
    setting: Setting
    method: Any
    site: WorkerContext
    devices: Rules | None = None  # of clients, and how the server deals with them; None: there are none, and no clock

    @property
    def identity(self) -> str:
        """SHA-256 of what the job computes."""
        return identity(self.job)

    @property
    def resolved(self) -> str:
        """The whole job as TOML."""
        return resolved(self.job)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the data and the model before the first round."""
        record, module = self.population.record, self.setting.net.original
        of_model = start.uncounted(self.job.model, module)
        return [*record["notes"], *record["warnings"], *([of_model] if of_model else [])]

    def facts(self) -> dict[str, str]:
        """What must be alike on all ranks of a run, by what messages call it.

        Of a model of one's own the first weights too: a factory may read a file, and not all that it makes is sent to ranks.
        """
        facts = {"the job": self.identity, "own code": own_code.digest(self.job)}
        facts["the hash of images and labels"] = self.population.data_sha256
        if self.job.partition.name not in PARTITIONS:
            facts["the hash of the partition"] = self.population.sha256
        if start.is_own(self.job.model):
            facts["the hash of the first weights"] = tree.sha256_of(start.values(self.setting.net.original))
        return facts

    def account(self, pack: int = 1) -> CostAccount:
        """The books of a run whose ranks train `pack` clients at once."""
        train = self.setting.train
        return CostAccount(
            self.model_profile, self.population, train.feed(), optim.values_per_parameter(train.momentum, train.optimiser), pack
        )


def device_of(job: Job, node_rank: int = 0) -> str:
    """The torch device of this rank: by its number on the node, so that several ranks may share a GPU."""
    wanted = job.execution.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise BadInput('[execution] device = "cuda", and torch sees no CUDA device here; use "auto" or "cpu"')
    return f"cuda:{node_rank % torch.cuda.device_count()}"


def _occupy(device: str, share: float) -> None:
    """Makes the device this process's own choice, of whose memory it takes `share` at most."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(share, device)


def build_experiment(job: Job, node_rank: int = 0, stopped: Callable[[], bool] = lambda: False) -> Experiment:
    """The parts of a job. BadInput says what in the job or its data cannot be."""
    device = device_of(job, node_rank)
    _occupy(device, job.execution.gpu_memory_fraction)
    room.refuse_images(job)
    with room.in_memory():
        population = populate(job.data, job.partition, job.seed)
        start.refuse_other_images(job, population.data_sha256)
    shape, classes = population.train.shape, population.train.classes
    with room.in_memory():
        room.refuse_model(job, shape, classes)
        module = models.build(job.model, shape, classes, job.seed)
    if start.is_own(job.model):
        start.refuse_wrong(job.model, module, start.images_of(population.train))
        with room.in_memory():
            start.refuse_other_weights(job.model, module, models.build(job.model, shape, classes, job.seed))
    model_profile = profiler.profile(module, shape, job.train.keep())
    try:
        net = Net(module).to(device)
    except ValueError as error:
        raise BadInput(f"{start.title(job.model)}: {error}") from error
    if start.is_own(job.model):
        net.not_traced = traced.fault(module, start.images_of(population.train)[0])
    if job.train.keep() and job.execution.packed_conv == "matmul":
        raise BadInput('[execution] packed_conv = "matmul" cannot be combined with train.activation_keep < 1; remove one')
    try:
        net.set_activation_pruning(job.train.keep())
    except ValueError as error:
        raise BadInput(f"[train] activation_keep = {job.train.activation_keep}: {error}") from error
    cohort, filled = job.cohort.of(population.clients), int((population.shards["train"].sizes() > 0).sum())
    if cohort > filled:
        raise BadInput(
            f"[cohort] size = {cohort}, but only {filled} of {population.clients} clients have training images; lower cohort.size"
            " or set partition.min_images >= 1"
        )
    job.evaluate.of(population.clients)
    training = job.train.training(job.rounds, augment=bool(population.augment))
    setting = Setting(
        *(net, training, job.train.aggregation(), job.rounds, cohort, population.clients, job.seed, model_profile, job.partition.holdout),
        image_shape=tuple(shape),
    )
    site, devices = WorkerContext(net, population, job.seed, device, stopped=stopped), _devices(job, setting, filled)
    return Experiment(job, population, model_profile, setting, _method(job, setting, devices), site, devices)


def _method(job: Job, setting: Setting, devices: Rules | None) -> Any:
    """The method, with the budgets of each client where the job gives them by kind of device."""
    if (fields := given_by_kind(job.method.use)) and devices is None:
        raise BadInput(f"[method] {fields[0]} is given by kind of device, and the clients have none: set [devices] name")
    if not fields or devices is None:
        return job.method.use
    return of_clients(job.method.use, devices.mix.names, devices.mix.kind_of(job.seed, np.arange(setting.clients)))


def _devices(job: Job, setting: Setting, filled: int) -> Rules | None:
    if not job.devices.name:
        return None
    mix = reading.read(job.devices)
    mix.check(setting.clients)
    return rules_of(job, mix, setting.cohort, filled, setting.model_profile, setting.train)
