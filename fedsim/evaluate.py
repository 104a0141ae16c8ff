"""Evaluation: the deployed model on the global test set, in fixed shards run as pseudo-clients, and on each client's own images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.assemble import Parts
from fedsim.exact import COHORT
from fedsim.fleet.batches import evaluation_shards
from fedsim.fleet.local import LocalFleet
from fedsim.tree import Tree
from fedsim.works import Evaluate

Columns = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Score:
    """What an evaluation finds; `clients` maps a column to (ids, values)."""

    rounds: dict[str, float]
    clients: Columns


def due(parts: Parts, r: int) -> bool:
    """Whether round `r` is evaluated: every so often, and the last always, unless the job says never."""
    every = parts.job.evaluate.every
    return bool(every) and (r % every == 0 or r == parts.job.rounds)


def evaluate(parts: Parts, state: Any, fleet: LocalFleet, r: int) -> Score:
    """Accuracy and loss of the state after round `r`, by count over all images."""
    clients = whose(parts, fleet, r)
    work = Evaluate.of(parts.method, parts.job.evaluate.batch)
    shared, own, net = parts.method.deploy(parts.setting, state, fleet, clients)
    first = parts.setting.clients
    whole = fleet.run(work, range(first, first + evaluation_shards(parts.population)), shared, net=net).total
    rounds = {"accuracy": _share(whole), "loss": float(whole["loss/sum"] / whole["n/images"])}
    if not clients:
        return Score(rounds, {})
    parts_of = [slice(begin, begin + COHORT) for begin in range(0, len(clients), COHORT)]
    replies = [fleet.run(work, clients[part], shared, {key: rows[part] for key, rows in own.items()}, net).each for part in parts_of]
    each = {key: torch.cat([reply[key] for reply in replies]) for key in replies[0]}
    scores, columns = _per_client(each, np.array(clients))
    return Score(rounds | scores, columns)


def whose(parts: Parts, fleet: LocalFleet, r: int) -> list[int]:
    """The clients that are evaluated in round `r`: those of the job's choice that have test images."""
    setting, chosen = parts.setting, parts.job.evaluate.of(parts.setting.clients)
    every: Iterable[int] = range(setting.clients)
    if chosen == "cohort":
        every = fleet.pick(setting.cohort, max(r, 1))
    elif chosen != "all":
        every = np.random.default_rng((setting.seed, 0)).choice(setting.clients, chosen, replace=False).tolist()
    tests = parts.population.shards["test"]
    return sorted(client for client in every if tests.size(client))


def _per_client(each: Tree, clients: np.ndarray) -> tuple[dict[str, float], Columns]:
    correct, images, losses = (each[key].cpu().numpy() for key in ("n/correct", "n/images", "loss/sum"))
    accuracy = correct / images
    scores = {
        "client_accuracy": float(correct.sum() / images.sum()),
        "client_accuracy_macro": float(accuracy.mean()),
        "client_accuracy_std": float(accuracy.std()),
        "client_accuracy_min": float(accuracy.min()),
        "client_accuracy_p10": float(np.percentile(accuracy, 10)),
        "clients_tested": len(clients),
    }
    return scores, {"accuracy": (clients, accuracy), "loss": (clients, losses / images)}


def _share(total: Mapping[str, Any]) -> float:
    return float(total["n/correct"] / total["n/images"])
