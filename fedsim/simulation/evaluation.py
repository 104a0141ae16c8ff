"""Evaluation: the deployed model on the global test set, in fixed shards run as pseudo-clients, and on each client's own images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedsim.core import keys
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree
from fedsim.core.validation import MAX_COHORT
from fedsim.federated import verbs
from fedsim.federated.client_work import Evaluate, EvaluateImages, OwnGates
from fedsim.federated.protocol import Method, Reply
from fedsim.fleet.client_images import evaluation_images, evaluation_shards
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.nn.net import Net
from fedsim.simulation import subnetworks
from fedsim.simulation.experiment import Experiment
from fedsim.storage.client_gates import Gates

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
BLOCK = 4_096  # clients whose gates are asked for at once
FORMS = ("accuracy", "loss", "client_accuracy", "client_accuracy_macro", "client_accuracy_min")  # what is recorded of other forms
ON_GLOBAL = 100  # clients at most whose own networks are tried on the global test set
GATES_UP_TO = 100_000  # clients, all of whose gates are stored at the end of a run


@dataclass(frozen=True)
class Score:
    """What an evaluation finds; `clients` maps a column to (ids, values)."""

    rounds: dict[str, float]
    clients: Columns
    gates: Gates | None = None


def due(parts: Experiment, r: int) -> bool:
    """Whether round `r` is evaluated: every so often, and the last always, unless the job says never."""
    every = parts.job.evaluate.every
    return bool(every) and (r % every == 0 or r == parts.job.rounds)


def evaluate(parts: Experiment, state: Any, fleet: LocalFleet, r: int) -> Score:
    """Accuracy and loss of the state after round `r`, by count over all images; after the last round of the method's other forms too."""
    clients, last = whose(parts, fleet, r), r == parts.job.rounds
    score = _scored(parts, parts.method, state, fleet, clients, last)
    others = parts.method.variants() if last else {}
    for name, form in others.items():
        other = _scored(parts, form, state, fleet, clients)
        rounds = {f"{name}_{key}": value for key, value in other.rounds.items() if key in FORMS}
        columns = {f"{name}_{key}": value for key, value in other.clients.items() if key == "accuracy"}
        score = replace(score, rounds=score.rounds | rounds, clients=score.clients | columns)
    return score


def _scored(parts: Experiment, method: Any, state: Any, fleet: LocalFleet, clients: list[int], last: bool = False) -> Score:
    model = Model(method, *verbs.deploy(method, parts.setting, state, fleet, clients))
    once = bool(clients) and _is_one_network(parts, model, fleet)
    whole = _on_shards(parts, model, fleet, once)
    rounds = {"accuracy": _share(whole.total), "loss": float(whole.total[keys.LOSS_SUM] / whole.total[keys.COUNT])}
    if not clients:
        return Score(rounds, {})
    each = _gathered(parts, whole.each, clients) if once else _on_own_images(parts, model, fleet, clients)
    scores, columns = _per_client(each, np.array(clients))
    return _personal(parts, Score(rounds | scores, columns), model, fleet, last)


@dataclass(frozen=True)
class Model:
    """What a method deploys to some clients."""

    method: Any
    shared: Tree
    own: Tree
    net: Net | None


def _is_one_network(parts: Experiment, model: Model, fleet: LocalFleet) -> bool:
    """Whether all clients use one network on the images as they are: then what the global test set comes to holds what clients' do.

    A kept state may be a part of the model, so where there are any each client is evaluated by itself.
    """
    alike = type(model.method).model_of is Method.model_of and not model.own and not len(fleet.kept)
    return alike and parts.population.skew is None


def _on_shards(parts: Experiment, model: Model, fleet: LocalFleet, by_image: bool) -> Reply:
    """The model on the global test set; each: a row per shard, by image or summed."""
    first, shards, batch = parts.setting.clients, evaluation_shards(parts.population), parts.job.evaluate.batch
    longest = -(-len(parts.population.test) // shards)
    work = EvaluateImages.up_to(longest, model.method, batch) if by_image else Evaluate.of(model.method, batch)
    return fleet.run(work, range(first, first + shards), model.shared, net=model.net)


def _gathered(parts: Experiment, shards: Tree, clients: list[int]) -> Mapping[str, np.ndarray]:
    """(K,) images of every client, those that are right and their losses, from what every image of the shards came to."""
    first, tests = parts.setting.clients, parts.population.shards["test"]
    counts = [len(evaluation_images(parts.population, first + row)) for row in range(len(shards[keys.LOSS_IMAGES]))]
    of_images = {
        key: np.concatenate([row[:count] for row, count in zip(shards[key].cpu().numpy(), counts, strict=True)])
        for key in (keys.CORRECT_IMAGES, keys.LOSS_IMAGES)
    }
    mine = [tests.of(client) for client in clients]
    correct, losses = ([values[index].sum() for index in mine] for values in of_images.values())
    return {keys.COUNT: np.array([len(index) for index in mine]), keys.CORRECT: np.array(correct), keys.LOSS_SUM: np.array(losses)}


def _on_own_images(parts: Experiment, model: Model, fleet: LocalFleet, clients: list[int]) -> Mapping[str, np.ndarray]:
    """(K,) the same, where each client runs its own network on its own images."""
    work = Evaluate.of(model.method, parts.job.evaluate.batch)
    parts_of = [slice(begin, begin + MAX_COHORT) for begin in range(0, len(clients), MAX_COHORT)]
    replies = [
        fleet.run(work, clients[part], model.shared, {key: rows[part] for key, rows in model.own.items()}, model.net).each
        for part in parts_of
    ]
    return {key: torch.cat([reply[key] for reply in replies]).cpu().numpy() for key in replies[0]}


def _personal(parts: Experiment, score: Score, model: Model, fleet: LocalFleet, last: bool) -> Score:
    """The score, and where clients have sub-networks of their own what these are; at last what they are worth on the global test set."""
    ids, accuracy = score.clients["accuracy"]
    gates = _gates(parts, model, fleet, ids.tolist())
    if gates is None:
        return score
    net, hard = model.net or parts.setting.net, torch.from_numpy(gates.hard)
    rounds, columns = subnetworks.of_clients(net, parts.model_profile, model.shared, hard, gates.values is not None)
    rounds["worst_client"] = int(ids[accuracy.argmin()])
    mine = {name: (gates.clients, values) for name, values in columns.items()}
    if last:
        share, of_clients = _on_global(parts, model, fleet, gates.clients)
        rounds, mine = rounds | share, mine | of_clients
    return replace(score, rounds=score.rounds | rounds, clients=score.clients | mine, gates=gates)


def _gates(parts: Experiment, model: Model, fleet: LocalFleet, clients: list[int]) -> Gates | None:
    """The hard gates that clients have for themselves: the server's choice, or what they keep, which those with images can."""
    net = model.net or parts.setting.net
    if GATE in model.own or not len(fleet.kept) or type(model.method).model_of is Method.model_of:
        return subnetworks.gates_of(net, model.own, clients)
    train = parts.population.shards["train"]
    holders = [client for client in clients if train.size(client)]
    rows = [row for row, client in enumerate(clients) if train.size(client)]
    work, found = OwnGates.used(model.method), []
    for begin in range(0, len(rows), MAX_COHORT):
        part = rows[begin : begin + MAX_COHORT]
        own = {key: value[part] for key, value in model.own.items()}
        found.append(fleet.run(work, [clients[row] for row in part], model.shared, own, model.net).each)
    each = {key: torch.cat([reply[key] for reply in found]) for key in (found[0] if found else {})}
    return subnetworks.gates_of(net, each, holders)


def _on_global(parts: Experiment, model: Model, fleet: LocalFleet, ids: np.ndarray) -> tuple[dict[str, float], Columns]:
    """Accuracy of at most ON_GLOBAL clients' own networks on all global test images, and their mean."""
    rows = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), ON_GLOBAL)).astype(int))
    work = Evaluate.of(model.method, parts.job.evaluate.batch, "global")
    own = {key: value[rows] for key, value in model.own.items()}
    each = fleet.run(work, ids[rows].tolist(), model.shared, own, model.net).each
    accuracy = (each[keys.CORRECT] / each[keys.COUNT]).cpu().numpy()
    return {"client_global_accuracy": float(accuracy.mean())}, {"global_accuracy": (ids[rows], accuracy)}


def final_gates(parts: Experiment, state: Any, fleet: LocalFleet) -> Gates | None:
    """The gates of all clients with images, or of those evaluated last where there are more than GATES_UP_TO clients."""
    shards, setting = parts.population.shards, parts.setting
    if setting.clients <= GATES_UP_TO:
        clients = np.flatnonzero(shards["train"].sizes() + shards["test"].sizes()).tolist()
    else:
        clients = whose(parts, fleet, parts.job.rounds)
    found: list[Gates] = []
    for begin in range(0, len(clients), BLOCK):
        block = clients[begin : begin + BLOCK]
        if (gates := _gates(parts, Model(parts.method, *verbs.deploy(parts.method, setting, state, fleet, block)), fleet, block)) is None:
            return None
        found.append(gates)
    if not found:
        return None
    ids, hard = np.concatenate([gates.clients for gates in found]), np.concatenate([gates.hard for gates in found])
    values = [gates.values for gates in found if gates.values is not None]
    return Gates(ids, hard, found[0].groups, np.concatenate(values) if values else None)


def whose(parts: Experiment, fleet: LocalFleet, r: int) -> list[int]:
    """The clients that are evaluated in round `r`: those of the job's choice that have test images."""
    setting, chosen = parts.setting, parts.job.evaluate.of(parts.setting.clients)
    every: Iterable[int] = range(setting.clients)
    if chosen == "cohort":
        every = fleet.pick(setting.cohort, max(r, 1))
    elif chosen != "all":
        every = np.random.default_rng((setting.seed, 0)).choice(setting.clients, chosen, replace=False).tolist()
    tests = parts.population.shards["test"]
    return sorted(client for client in every if tests.size(client))


def _per_client(each: Mapping[str, np.ndarray], clients: np.ndarray) -> tuple[dict[str, float], Columns]:
    correct, images, losses = (each[key] for key in (keys.CORRECT, keys.COUNT, keys.LOSS_SUM))
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
    return float(total[keys.CORRECT] / total[keys.COUNT])
