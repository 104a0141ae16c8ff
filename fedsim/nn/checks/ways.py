"""Every way in which fedsim computes a model, held against the plain torch module on one batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.core import keys, rng
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE
from fedsim.kernels.sparse.cost_model import always_sparse
from fedsim.kernels.sparse.layers import missing
from fedsim.nn.checks import record
from fedsim.nn.checks.plain import first_line, recorded, without_dropout
from fedsim.nn.checks.record import Record, differences, unlike
from fedsim.nn.checks.refusals import called
from fedsim.nn.checks.trail import following
from fedsim.nn.net import Net

CLIENTS = 2
FAR = 8.0  # how much larger the images are that fill up a batch: what is made of them, too, must not count
ONE, STACKED, SPARSE = "one client after the other", "clients stacked (packed)", "masks on sparse kernels"
GATED, PRUNED = "channels closed by gates", "activation pruning"
EMPTY = "fedsim's own forward or backward pass of it fails where torch's works, as it does with checkpoint(…, use_reentrant=True)"
OUTSIDE = "forward may read or keep values outside of parameters and of registered buffers, which clients do not share"
OVERWRITTEN = "forward writes over the images that it is given, and they are used again; begin it with x = x.clone()"
KEPT = "a layer's weight is read from outside of that layer, which holds its kept values alone"
BRANCH = "its forward takes a branch, a count or a Python number from a tensor's value, which differs between stacked clients"


@dataclass(frozen=True)
class Found:
    """Whether a way to compute a model is right; `why` says what is not, or why there is no such way."""

    way: str
    right: bool
    why: str = ""


def one_by_one(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """What differs from torch for one client after the other; empty where nothing does."""
    module = without_dropout(module)
    net, right = Net(module), recorded(module, x, y)
    try:
        mine = record.of_net(net, net.initial, x, y)
    except Exception as error:
        return f"{EMPTY} ({first_line(error)})"
    if fault := _other(mine, right):
        return f"{fault}{_where(module, net, x)}; {OVERWRITTEN if _overwrites(module, x) else OUTSIDE}"
    if differences(record.of_net(net, net.initial, x, y), right):
        return f"a second call gives other logits; {OUTSIDE}"
    return ""


def _other(mine: Record, right: Record) -> str:
    found = differences(mine, right)
    return f"{found[0]} {'differ' if found[0] in record.LOGITS else 'differs'} from what torch gives" if found else ""


def _overwrites(module: nn.Module, x: Tensor) -> bool:
    given = x.clone()
    with torch.no_grad():
        copy.deepcopy(module)(given)
    return not torch.equal(given, x)


def _where(module: nn.Module, net: Net, x: Tensor) -> str:
    """The first layer that answers otherwise, in training mode."""
    with following(module.train()) as plain, following(net.module) as mine, torch.no_grad():
        module(x.clone())
        net(net.initial, x, True)
    name = plain.fork(mine, unlike)
    return f", from {called(name, module.get_submodule(name))} on" if name else ""


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hides what torch says to its developers about operations that vmap runs client by client."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@_without_advice()
def stacked(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """What keeps clients from being stacked (the packed fleet), or differs when they are."""
    net = Net(module)
    pure = net.under_vmap()
    batches = torch.stack([x, x.flip(0)]), torch.stack([y, y.flip(0)])
    trees, draws = {key: torch.stack([value] * CLIENTS) for key, value in net.initial.items()}, rng.key(0, torch.arange(CLIENTS))
    for program in {net.program, None}:
        pure.program = program
        try:
            with torch.no_grad():
                together = torch.vmap(lambda tree, x, y, key: record.of_net(pure, tree, x, y, key=key))(trees, *batches, draws)
        except Exception as error:
            text = str(error)
            reason = (
                BRANCH
                if any(sign in text for sign in ("data-dependent", ".item()", "dynamic shape"))
                else f"torch.func.vmap cannot ({first_line(error)})"
            )
            return reason
        for k in range(CLIENTS):
            alone = record.of_net(net, net.initial, batches[0][k], batches[1][k], key=draws[k])
            if fault := _other({name: value[k] for name, value in together.items()}, alone):
                return fault.replace("what torch gives", "what one client alone gives")
    return _padded(net, x, y)


def _padded(net: Net, x: Tensor, y: Tensor) -> str:
    """Clients with fewer images than others get batches filled up with images that do not count."""
    count = len(x) - 1
    key = rng.key(0)
    alone = record.of_net(net, net.initial, x[:count], y[:count], key=key)
    real = (torch.arange(len(x)) < count).float()
    filled = torch.cat([x[:count], FAR * x[count:]])
    try:
        whole = record.of_net(net.under_vmap(), net.initial, filled, y, real, key)
    except Exception as error:
        return f"a batch that is filled up with images that do not count fails ({first_line(error)})"
    if differences({name: value[:count] if name in record.LOGITS else value for name, value in whole.items()}, alone):
        return "images that fill up a batch change what it computes for the others: its forward mixes the images of a batch"
    return ""


def sparse(module: nn.Module, x: Tensor, y: Tensor) -> Found:
    """Masks on half of the weights, on sparse kernels."""
    way, net = SPARSE, Net(without_dropout(module))
    layers = [layer for layer in net.geometries if layer in net.maskable]
    if fault := missing("cpu"):
        return Found(way, False, fault)
    if not layers:
        return Found(way, False, "no convolution or linear layer after the first one can be pruned")
    masks = {keys.mask(layer): rng.uniform(rng.key(0, layer), net.sizes[layer]).view(net.shapes[layer]) < 0.5 for layer in layers}
    net.set_sparse_costs(always_sparse(layers))
    tree = net.initial | masks
    tree |= net.effective(tree)
    try:
        mine = record.of_net(net, tree, x, y)
    except Exception as error:
        return Found(way, False, f"{KEPT} ({first_line(error)})")
    return Found(way, not (why := _other(mine, recorded(without_dropout(module), x, y, masks))), why)


def gated(module: nn.Module, x: Tensor, y: Tensor) -> Found:
    """A gate that closes every other channel: cut out of the network, against multiplied by 0."""
    way, net = GATED, Net(without_dropout(module))
    try:
        channels = net.channels
    except ValueError as error:
        return Found(way, False, str(error))
    gate = channels.gate({group.name: torch.arange(0, group.size, 2) for group in channels.groups})
    whole, half = (net.initial | {GATE: part} for part in (torch.ones_like(gate), gate))
    why = _other(record.of_net(net, whole, x, y), recorded(without_dropout(module), x, y))
    why = why or _other(record.of_net(net, half, x, y), record.of_net(net.under_vmap(), half, x, y))
    return Found(way, not why, why or f"{channels.n} channels of {len(channels.groups)} layer{'s' * (len(channels.groups) > 1)}")


def activations_pruned(module: nn.Module, x: Tensor, y: Tensor) -> Found:
    """The kernels of activation pruning with everything kept: then gradients are torch's own."""
    way, net = PRUNED, Net(without_dropout(module))
    try:
        net.set_activation_pruning(ActivationPruning(1.0))
    except ValueError as error:
        return Found(way, False, str(error))
    return Found(way, not (why := _other(record.of_net(net, net.initial, x, y), recorded(without_dropout(module), x, y))), why)


def compared(way: str, check: Callable[[nn.Module, Tensor, Tensor], str], module: nn.Module, x: Tensor, y: Tensor) -> Found:
    """A check that gives what is wrong as a row."""
    return Found(way, not (why := check(module, x, y)), why)


def attempted(way: str, check: Callable[[], Found]) -> Found:
    """A row of a check that itself may fail, as a layer may inside of a kernel."""
    try:
        return check()
    except Exception as error:
        return Found(way, False, first_line(error))


def every(module: nn.Module, x: Tensor, y: Tensor) -> list[Found]:
    """All ways, the one that every run needs first."""
    checks: dict[str, Callable[[], Found]] = {
        ONE: lambda: compared(ONE, one_by_one, module, x, y),
        STACKED: lambda: compared(STACKED, stacked, module, x, y),
        SPARSE: lambda: sparse(module, x, y),
        GATED: lambda: gated(module, x, y),
        PRUNED: lambda: activations_pruned(module, x, y),
    }
    return [attempted(way, check) for way, check in checks.items()]
