"""From a job to the rules by which its server deals with devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from math import ceil, inf
from typing import Any

from fedsim.config import method_registry
from fedsim.config.job import Job
from fedsim.config.sections import SELECTS, Cohort
from fedsim.core import entry_points
from fedsim.core.types import LocalTraining
from fedsim.core.validation import MAX_COHORT
from fedsim.costs import flops
from fedsim.costs.profile import VALUE_BYTES, ModelProfile
from fedsim.devices.mix import DeviceMix
from fedsim.errors import BadInput
from fedsim.fleet.timed.rules import Rules

EXTRA, STALENESS = 0.3, 10  # [cohort] extra and max_staleness, where the job does not say
AVERAGED = ("fedavg", "fedprox")  # aggregations in which answers to older models can be averaged


def rules_of(job: Job, mix: DeviceMix, cohort: int, clients: int, profile: ModelProfile, training: LocalTraining) -> Rules:
    """The rules of a job with devices. BadInput where its own selection cannot be found, and for fields that do not fit together.

    cohort: clients a round; clients: those with images.
    """
    wanted = job.cohort
    if wanted.mode == "buffered":
        refuse_synchronous(job)
    concurrency, buffer = wanted.concurrency or cohort, wanted.buffer or min(cohort, wanted.concurrency or cohort)
    if wanted.mode == "buffered" and buffer > concurrency:
        raise BadInput(f"[cohort] buffer = {buffer} is more than the {concurrency} clients that train at any time; raise concurrency")
    if wanted.mode == "buffered" and concurrency > clients:
        raise BadInput(f"[cohort] concurrency = {concurrency} is more than the {clients:,} clients with images; lower it, or cohort.size")
    extra = (EXTRA if wanted.extra is None else wanted.extra) if wanted.mode == "oversample" else 0.0
    asked = min(clients, ceil(cohort * (1 + extra)))
    if max(asked, buffer) > MAX_COHORT:
        raise BadInput(f"[cohort] {max(asked, buffer):,} clients would be asked at once; at most {MAX_COHORT:,} can be")
    if wanted.mode != "buffered" and wanted.least > cohort:
        raise BadInput(f"[cohort] least = {wanted.least} answers cannot come of {cohort} clients a round")
    return Rules(
        mix,
        job.seed,
        mode=wanted.mode,
        deadline=wanted.deadline or inf,
        least=wanted.least,
        extra=extra,
        select=wanted.select if wanted.select in SELECTS else "own",
        own_select=None if wanted.select in SELECTS else _own(wanted),
        unfit=job.devices.unfit,
        concurrency=concurrency,
        buffer=buffer,
        max_staleness=STALENESS if wanted.max_staleness is None else wanted.max_staleness,
        local=training.feed(),
        flops=flops.training_flops(profile),
        size=VALUE_BYTES * (profile.parameters + profile.buffers),
    )


def refuse_synchronous(job: Job) -> None:
    """BadInput where a method or an aggregation cannot live with answers to older models; it lists those that can."""
    if not job.method.use.asynchronous:
        raise _needs_all(job.method.name, [name for name in method_registry.names() if _asynchronous(name)])
    if job.train.aggregate not in AVERAGED:
        raise _needs_all(f"aggregate = {job.train.aggregate!r}", AVERAGED)


def _asynchronous(name: str) -> bool:
    """Whether a method can live with them, as its name in a job means it."""
    alias = method_registry.ALIASES.get(name)
    fixed = alias.fixed.get("train.aggregate", AVERAGED[0]) if alias else AVERAGED[0]
    return getattr(method_registry.find(name), "asynchronous", False) and fixed in AVERAGED


def _needs_all(what: str, others: Sequence[str]) -> BadInput:
    right = f"Those that do not: {', '.join(others)}"
    return BadInput(f'[cohort] mode = "buffered": {what} needs all answers of a round together. {right}')


def _own(cohort: Cohort) -> Callable[..., Any]:
    module, _, name = cohort.select.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises, the job names what cannot be had
        said = f"module {module!r} cannot be imported: {type(error).__name__}: {error}{entry_points.where_looked(error, module)}"
        raise BadInput(f"[cohort] select = {cohort.select!r}: {said}") from error
    if found is None:
        raise BadInput(f"[cohort] select = {cohort.select!r}: {module} has no function {name!r}")
    if not callable(found):
        raise BadInput(f"[cohort] select = {cohort.select!r} is no function; it takes (clients, how many, round, devices)")
    chosen: Callable[..., Any] = found
    return chosen


def table(mix: DeviceMix) -> str:
    """The kinds as JSON, for the run file; what files of clients and traces say is in it by its digest."""
    kinds = [{field.name: getattr(kind, field.name) for field in fields(kind)} for kind in mix.kinds]
    return json.dumps({"name": mix.name, "kinds": kinds, "files": mix.digests}, sort_keys=True)
