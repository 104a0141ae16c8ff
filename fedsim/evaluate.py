"""Evaluation: the deployed model on the global test set, in fixed shards run as pseudo-clients, and on each client's own images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedsim import personal
from fedsim.assemble import Parts
from fedsim.exact import COHORT
from fedsim.fleet.batches import evaluation_shards
from fedsim.fleet.local import LocalFleet
from fedsim.gates import GATES
from fedsim.net import Net
from fedsim.record import Gates
from fedsim.tree import Tree
from fedsim.works import Evaluate

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
BLOCK = 4_096  # clients whose gates are asked for at once
GATES_UP_TO = 100_000  # clients, all of whose gates are stored at the end of a run


@dataclass(frozen=True)
class Score:
    """What an evaluation finds; `clients` maps a column to (ids, values)."""

    rounds: dict[str, float]
    clients: Columns
    gates: Gates | None = None


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
    return _personal(parts, Score(rounds | scores, columns), net or parts.setting.net, shared, own)


def _personal(parts: Parts, score: Score, net: Net, shared: Tree, own: Tree) -> Score:
    """The score, and where clients have sub-networks of their own what these are."""
    ids, accuracy = score.clients["accuracy"]
    gates = personal.gates_of(net, own, ids.tolist())
    if gates is None:
        return score
    rounds, columns = personal.of_clients(net, parts.anatomy, shared, own[GATES])
    rounds["client_worst"] = int(ids[accuracy.argmin()])
    mine = {name: (ids, values) for name, values in columns.items()}
    return replace(score, rounds=score.rounds | rounds, clients=score.clients | mine, gates=gates)


def final_gates(parts: Parts, state: Any, fleet: LocalFleet) -> Gates | None:
    """The gates of all clients with images, or of those evaluated last where there are more than GATES_UP_TO clients."""
    shards, setting = parts.population.shards, parts.setting
    if setting.clients <= GATES_UP_TO:
        clients = np.flatnonzero(shards["train"].sizes() + shards["test"].sizes()).tolist()
    else:
        clients = whose(parts, fleet, parts.job.rounds)
    found: list[Gates] = []
    for begin in range(0, len(clients), BLOCK):
        block = clients[begin : begin + BLOCK]
        _, own, net = parts.method.deploy(setting, state, fleet, block)
        if (gates := personal.gates_of(net or setting.net, own, block)) is None:
            return None
        found.append(gates)
    return Gates(np.array(clients), np.concatenate([gates.hard for gates in found]), found[0].groups) if found else None


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
