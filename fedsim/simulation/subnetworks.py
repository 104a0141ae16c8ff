"""Networks smaller than the job's own: what is left of them after cuts, under masks and gates, and how far clients' ones overlap."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, under
from fedsim.costs import flops
from fedsim.costs.flops import forward_flops
from fedsim.costs.profile import ModelProfile
from fedsim.nn.layers.input_gate import SHIFTS_MODULE
from fedsim.nn.net import Net
from fedsim.pruning.gates import overlap
from fedsim.storage.client_gates import Gates

COMPARED_UP_TO = 1_000  # clients whose sub-networks are compared, pair by pair
Values = dict[str, NDArray[np.float64]]


def gates_of(net: Net, own: Tree, clients: list[int]) -> Gates | None:
    """The hard gates that clients have for themselves; None where they have none."""
    hard = own.get(GATE)
    if hard is None or hard.dtype != torch.bool or not len(hard):
        return None
    values = own[GATE_VALUES].cpu().numpy() if GATE_VALUES in own else None
    return Gates(np.array(clients), hard.cpu().numpy(), {group.name: group.size for group in net.channels.groups}, values)


def in_use(net: Net, model_profile: ModelProfile, tree: Tree) -> dict[str, int]:
    """Weights in use of every layer that has a mask, or that a gate or a cut makes smaller. model_profile: of the original network."""
    full = {layer.name: layer.weights for layer in model_profile.layers}
    counts = net.sizes | net.used(tree)
    return {name: count for name, count in counts.items() if count < full[name] or keys.mask(name) in tree}


def parameters(net: Net, tree: Tree) -> int:
    """Conv and linear weights in use, and the biases and norm entries of the channels in use.

    Constants in the place of dynamic gates are multiplied into what stands before them; where that is a norm without a scale, they
    become its scale.
    """
    gate = tree.get(GATE)
    hard = gate is not None and gate.dtype == torch.bool
    widths = {name: int(part.sum()) for name, part in net.channels.split(gate).items()} if gate is not None and hard else {}
    rows = net.channels.rows if hard else {}
    gone = tuple(f"{keys.WEIGHTS}{group.gate}." for group in net.channels.groups) if GATE_VALUES in tree else ()
    free = [key for key in net.weights if keys.layer_of(key) not in net.sizes and not key.startswith(gone)]
    free += [key for key in free if gone and key.startswith(f"{keys.WEIGHTS}{SHIFTS_MODULE}.")]
    return sum((net.sizes | net.used(tree)).values()) + sum(
        widths.get(rows.get(keys.name_of(key), ""), net.initial[key].numel()) for key in free
    )


def sizes(net: Net, model_profile: ModelProfile, shared: Tree) -> dict[str, float]:
    """What a row says of a server's model that was cut, or has a gate."""
    if not net.kept and GATE not in shared:
        return {}
    count = parameters(net, shared)
    share = flops.forward_flops(model_profile, in_use(net, model_profile, shared)) / flops.forward_flops(model_profile)
    return {"inference_share": share, "parameters": count, "parameters_share": count / model_profile.parameters}


def of_clients(
    net: Net, model_profile: ModelProfile, shared: Tree, hard: Tensor, constant: bool = False
) -> tuple[dict[str, float], Values]:
    """(what a row says of the clients' sub-networks, their columns) of hard gates (K, n), each in the place of the shared one.

    constant: what looked at the image is a number for each channel, and costs nothing.
    """
    trees = [under(shared, keys.MASKS) | {GATE: gate} | ({GATE_VALUES: gate} if constant else {}) for gate in hard.cpu()]
    flops = np.array([forward_flops(model_profile, in_use(net, model_profile, tree)) for tree in trees], float)
    counts = np.array([parameters(net, tree) for tree in trees], float)
    rounds = {
        "client_inference_flops": float(flops.mean()),
        "client_inference_share": float(flops.mean()) / forward_flops(model_profile),
        "client_parameters": float(counts.mean()),
    }
    if len(hard) > 1:
        rounds["client_overlap"] = mean_overlap(hard)
    return rounds, {"inference_flops": flops, "parameters": counts, "gates_open": hard.double().mean(1).cpu().numpy()}


def mean_overlap(hard: Tensor) -> float:
    """The mean over pairs of |m_i and m_j| / |m_i or m_j|; of many clients, COMPARED_UP_TO evenly chosen ones."""
    chosen = torch.linspace(0, len(hard) - 1, min(len(hard), COMPARED_UP_TO)).long()
    shares = overlap(hard[chosen.to(hard.device)]).double()
    return float((shares.sum() - shares.trace()) / (len(shares) * (len(shares) - 1)))
