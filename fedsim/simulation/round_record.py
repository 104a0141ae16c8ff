"""A round as the run file holds it, from the bills of its clients, its evaluation, and the masks in force after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum

import numpy as np
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.tree import Tree, under
from fedsim.costs import flops, memory
from fedsim.costs.profile import ModelProfile
from fedsim.fleet.charging.bills import Bills
from fedsim.nn.net import Net
from fedsim.simulation import subnetworks
from fedsim.simulation.evaluation import Columns, Score
from fedsim.storage.client_gates import Gates


@dataclass(frozen=True)
class RoundRow:
    values: dict[str, float]
    clients: Columns = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    masks: Tree = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    gates: Gates | None = None  # of clients, where they have some of their own


def row_of(
    model_profile: ModelProfile,
    bills: Bills,
    score: Score | None,
    shared: Tree,
    before: Tree,
    found: Mapping[str, float],
    net: Net | None = None,
) -> RoundRow:
    """`shared` is what would be broadcast next, `before` the masks of the round before, `found` what the method records.

    net: in use, for a model that may be cut or gated; `model_profile` is always the original network's.
    """
    held = under(shared, keys.MASKS)
    kept = subnetworks.in_use(net, model_profile, shared) if net else _kept(held)
    values = _sums(bills) | _largest(bills) | _densities(model_profile, kept) | _nonzero(model_profile, shared)
    values |= (subnetworks.sizes(net, model_profile, shared) if net else {}) | dict(found)
    layers = _layers(model_profile, kept, held, before)
    if score is None:
        return RoundRow(values, _columns(bills), layers, held)
    return RoundRow(values | score.rounds, _columns(bills) | score.clients, layers, held, gates=score.gates)


def _sums(bills: Bills) -> dict[str, float]:
    samples, loss = bills.column("samples"), bills.column("loss")
    trained = (samples > 0) & ~np.isnan(loss)
    shown = fsum(samples[trained].tolist())
    shares = [bill.train_flops / bill.dense_flops for bill, _ in bills.counted() if bill.dense_flops]
    return {
        "train_loss": fsum((loss[trained] * samples[trained]).tolist()) / shown if shown else float("nan"),
        "train_flops": bills.total("train_flops"),
        "extra_flops": bills.total("extra_flops"),
        "max_client_flops": bills.most("train_flops"),
        "max_client_flops_at_mean": bills.most("flops_at_mean"),
        "max_client_flops_share": max(shares, default=0),
        "bytes_up": bills.total("bytes_up"),
        "bytes_down": bills.total("bytes_down"),
        "max_client_model_memory": bills.most("model_memory"),
    }


def _largest(bills: Bills) -> dict[str, float]:
    """Memory of the client that needs most, the first of equals, and its terms."""
    largest = bills.largest()
    terms: dict[str, float] = {f"memory_{term}": largest.memory_terms.get(term, 0) for term in memory.TERMS}
    return terms | {"max_client_memory": largest.memory}


def speeds(bills: Bills, batch: int, seconds: Mapping[str, float], moved: Mapping[str, int]) -> dict[str, float]:
    """What was achieved per second of a phase by all ranks together: FLOPs of the ledger, and bytes; `moved`: those of other phases.

    A training step writes and reads at least once each what its client holds by the ledger: weights, gradients, optimiser and the
    activations of its batch. A step on fewer than `batch` images counts as that part of a step, so the bytes err on the low side.
    """
    every = bills.counted()
    done = {f"{phase}_bytes": (phase, float(count)) for phase, count in moved.items()}
    done["compute_flops"] = "compute", sum((bill.train_flops - bill.uncomputed_flops) * count for bill, count in every)
    done["compute_dense_flops"] = "compute", sum(bill.dense_flops * count for bill, count in every if bill.samples)
    done["compute_bytes"] = "compute", sum(2 * bill.memory * bill.samples * count / batch for bill, count in every)
    return {name: count / seconds[phase] for name, (phase, count) in done.items() if count and seconds[phase] > 0}


def _kept(held: Tree) -> dict[str, int]:
    return {name.removesuffix(".weight"): count for name, count in masks.ones(held).items()}


def _densities(model_profile: ModelProfile, kept: Mapping[str, int]) -> dict[str, float]:
    return {
        "density": flops.density(model_profile, kept),
        "density_maskable": flops.density_maskable(model_profile, kept),
        "inference_flops": flops.forward_flops(model_profile, kept),
    }


def _nonzero(model_profile: ModelProfile, shared: Tree) -> dict[str, float]:
    """The share of weights that are not 0 under their masks; nothing where some weights are not the server's."""
    weights = [keys.weight(layer.name) for layer in model_profile.layers]
    if any(key not in shared for key in weights):
        return {}
    found = [(shared[key] != 0) & shared[mask] if (mask := keys.mask_of(key)) in shared else shared[key] != 0 for key in weights]
    return {"nonzero_share": sum(map(masks.count, found)) / model_profile.weights}


def _layers(model_profile: ModelProfile, kept: Mapping[str, int], held: Tree, before: Tree) -> dict[str, np.ndarray]:
    """Density, and how many weights came to masks and left them since the round before."""
    shares = flops.densities(model_profile, kept)
    grown, pruned = np.zeros(len(shares)), np.zeros(len(shares))
    for place, name in enumerate(shares):
        now, then = held.get(keys.mask(name)), before.get(keys.mask(name))
        if now is not None and then is not None and now is not then:
            grown[place], pruned[place] = _moved(now, then)
    return {"density": np.array(list(shares.values())), "grown": grown, "pruned": pruned}


def _moved(now: Tensor, then: Tensor) -> tuple[int, int]:
    """Weights that came and that went; a cut only takes."""
    if now.shape != then.shape:
        return 0, masks.count(then) - masks.count(now)
    return masks.count(now & ~then), masks.count(then & ~now)


def _columns(bills: Bills) -> Columns:
    ids = bills.clients
    names = {"samples": "samples", "loss": "train_loss", "density": "density", "train_flops": "train_flops"}
    names |= {"bytes_up": "bytes_up", "bytes_down": "bytes_down", "memory": "memory"}
    columns = {column: (ids, bills.column(name)) for name, column in names.items()}
    return {"in_cohort": (ids, np.ones(len(ids)))} | columns if len(ids) else {}
