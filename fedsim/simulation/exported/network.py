"""From a run file to a plain torch module: the network that a run ended with, or the smaller one of a client."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fedsim import models
from fedsim.config.job import Job, recorded
from fedsim.core import keys
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, under
from fedsim.costs import flops
from fedsim.costs.profile import ModelProfile
from fedsim.data.population import Population, populate
from fedsim.errors import BadInput
from fedsim.federated.protocol import Method
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.nn.subnetwork import folded, optimised_for_inference
from fedsim.pruning.cut_and_finetune import CutAndFinetune
from fedsim.simulation import subnetworks
from fedsim.storage.reader import RunReader

LIBRARIES = ("torch", "_operator", "math", "builtins")  # where the functions of a plain module may come from


@dataclass(frozen=True)
class Final:
    """The network of a finished run, and its values."""

    net: Net  # after a permanent cut
    tree: Tree  # w/, buf/, mask/, and the gate in force
    model_profile: ModelProfile  # of the original network
    note: str = ""  # in what it differs from the network that was evaluated

    @property
    def module(self) -> nn.Module:
        """As ordinary torch layers in evaluation mode, masked weights exactly 0, physically small."""
        net, tree = self.net, under(self.tree, keys.WEIGHTS, keys.BUFFERS, keys.MASKS)
        if GATE in self.tree:
            kept = net.channels.kept(self.tree[GATE])
            small = net.cut(kept).plain(net.compact(tree, kept))
            if GATE_VALUES in self.tree:
                return folded(small, {name: part[kept[name]] for name, part in net.channels.split(self.tree[GATE_VALUES]).items()})
            return optimised_for_inference(small) if net.has_dynamic_gates else small
        return net.plain(tree)

    @property
    def flops(self) -> int:
        """Of an image, masks and gates counted."""
        return flops.forward_flops(self.model_profile, subnetworks.in_use(self.net, self.model_profile, self.tree))


def module_of(path: Path | str, client: int | None = None) -> nn.Module:
    """The final model of a finished run in evaluation mode, or a client's sub-network; BadInput where there is none.

    Its layers are torch's own where torch.fx can trace it. Its data set must be where the job says, since that knows the shape of
    the images and the number of classes.
    """
    return traced(final(path, client)[0].module)[0]


def final(path: Path | str, client: int | None = None) -> tuple[Final, Job, Population]:
    """What a finished run ended with, for one client with that client's gates; its job and its images."""
    reader = RunReader(path)
    known = reader.attributes
    if not known["finished"]:
        raise BadInput(f"{path} holds no final model yet: {known['rounds']} of {known.get('rounds_planned', '?')} rounds are done")
    job = recorded(reader.job, str(path))
    gate = {} if client is None else _gate_of(reader, client, job)
    population = populate(job.data, job.partition, job.seed)
    data = population.train
    tree = reader.model()
    try:
        module = models.build(job.model, data.shape, data.classes, job.seed)
        net = Net(module)
        kept = {key.removeprefix(keys.INDICES): value for key, value in tree.items() if key.startswith(keys.INDICES)}
        net = net.cut(kept) if kept else net
        found = Final(
            net,
            under(tree, keys.WEIGHTS, keys.BUFFERS, keys.MASKS, keys.GATES) | gate,
            profiler.profile(module, data.shape),
            _note(job, tree | gate),
        )
        _check_shapes(net.original, found.tree)
        net.plain(found.tree)
    except BadInput:
        raise
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: the model in the file is not the job's: {error}") from error
    return found, job, population


def _check_shapes(module: nn.Module, tree: Tree) -> None:
    """ValueError where a tensor has another shape than in the module: it would be filled in all the same."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        for key in (keys.WEIGHTS + name, keys.BUFFERS + name, keys.MASKS + name):
            if key in tree and tree[key].shape != value.shape:
                raise ValueError(f"{key} has the shape {tuple(tree[key].shape)}, the job's is {tuple(value.shape)}")


def _note(job: Job, tree: Tree) -> str:
    if job.model.gate_choice == "random" and GATE not in tree:
        return "note: here its random channels are drawn from the input of each layer, not from the image: outputs and accuracy differ"
    if GATE not in tree or not _norms_saw_closed(job.method.use) or job.model.norm != "group":
        return ""
    return (
        'note: under norm_over = "all" norms saw the closed channels too, which are not here any more: outputs and accuracy differ a little'
    )


def _norms_saw_closed(method: Method[Any]) -> bool:
    """Whether norms ran over closed channels too while the model was trained."""
    return isinstance(method, CutAndFinetune) and method.norm_over == "all"


def _gate_of(reader: RunReader, client: int, job: Job) -> Tree:
    """(n,) the client's own gate, and the constants in its place if it is one; BadInput where it has none, or more than that."""
    clients = len(reader.labels("client"))
    if not 0 <= client < clients:
        raise BadInput(f"{reader.path} has no client {client}; its clients are 0 to {clients - 1}")
    ids, hard = reader.gates()
    own = job.method.use.stays
    if own and (client in ids or not len(ids)):
        where = f"{reader.path}: its clients have {own} of their own, which are in their kept state and not in the run file"
        raise BadInput(f"{where}; leave out --client for the network that all share")
    if not len(ids):
        raise BadInput(
            f"{reader.path}: client {client} has no network of its own, since this run gave its clients no gates;"
            " leave out --client for the network that all share"
        )
    if client not in ids:
        some = ", ".join(map(str, ids[:10])) + (" …" if len(ids) > 10 else "")
        raise BadInput(f"{reader.path} holds no network of client {client}; it has those of the clients {some}")
    row, values = int(np.flatnonzero(ids == client)[0]), reader.gate_values()
    gate = {GATE: torch.from_numpy(hard[row])}
    return gate if values is None else gate | {GATE_VALUES: torch.from_numpy(values[row])}


def traced(module: nn.Module) -> tuple[nn.Module, str]:
    """(the module of torch's own layers alone, "") or (the module itself, why it needs its class)."""
    twin = copy.deepcopy(module.eval())
    before = [(value, value._version) for value in twin.buffers()]
    try:
        traced = fx.symbolic_trace(twin)
    except Exception as error:  # whatever a user's own forward raises when it is given no numbers
        return module, f"torch.fx cannot trace it ({type(error).__name__}: {error})"
    after = [(value, value._version) for value in twin.buffers()]
    if len(after) != len(before) or any(now is not old or new != version for (now, new), (old, version) in zip(after, before, strict=True)):
        return module, "its forward changes buffers in evaluation mode too"
    calls = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    if own := [call for call in calls if getattr(call, "__module__", "").partition(".")[0] not in LIBRARIES]:
        return module, f"it calls {own[0].__module__}.{own[0].__name__}"
    return traced.eval(), ""
