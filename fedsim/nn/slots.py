"""Where the values of a tree stand in a module: its parameters, and its buffers, which its forward may change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.nn.gradients.taps import ParameterSlot, tied


def averaged(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that clients hold, train and average: finite floating-point ones, and single whole numbers and truth values.

    torch's counts of batches are not among them: nothing reads them. All others are constants.
    """
    own = {f"{name}." for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._NormBase) or _of_fedsim(layer)}
    return {name: value for name, value in module.named_buffers() if _is_averaged(value, name.rpartition(".")[0] + "." in own)}


def _of_fedsim(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("fedsim.")


def _is_averaged(value: Tensor, known: bool) -> bool:
    if value.is_floating_point():
        return value.is_meta or bool(value.isfinite().all())
    return value.numel() == 1 and not (known or value.is_complex())


def may_compute_again(module: nn.Module) -> bool:
    """Whether torch.utils.checkpoint may stand in a forward: in one that is neither torch's nor fedsim's, or in a traced graph."""
    for layer in module.modules():
        if isinstance(layer, fx.GraphModule):
            targets = (node.target for node in layer.graph.nodes if node.op == "call_function")
            if any("checkpoint" in getattr(target, "__module__", "") for target in targets):
                return True
        elif not type(layer).__module__.startswith(("torch.nn.", "fedsim.")):
            return True
    return False


def parameters(module: nn.Module) -> ParameterSlot:
    """Where every parameter of the module stands, with its key in the tree."""
    return _slots(module, "_parameters", keys.WEIGHTS)


def buffers(module: nn.Module, initial: Mapping[str, Tensor]) -> ParameterSlot:
    """Where every buffer stands whose key is in `initial`: those that no layer of fedsim reads from the tree by itself."""
    return [(where, slot, key) for where, slot, key in _slots(module, "_buffers", keys.BUFFERS) if key in initial]


def _slots(module: nn.Module, kind: str, prefix: str) -> ParameterSlot:
    layers = module.named_modules(remove_duplicate=False)
    found = [
        (getattr(layer, kind), slot, f"{prefix}{f'{name}.{slot}'.lstrip('.')}") for name, layer in layers for slot in getattr(layer, kind)
    ]
    return tied([(where, slot, key) for where, slot, key in found if where[slot] is not None])


def put(slots: ParameterSlot, tree: Tree, initial: Tree, images: Tensor | None) -> Tree:
    """Copies of the tree's buffers, put into the module, so that its forward may change them.

    images: of a client that is one row of a pack. A copy that forward changes must have a row for each client before it does.
    """
    copies: Tree = {}
    row = None if images is None or not slots else torch.zeros_like(images.flatten()[0], dtype=torch.bool)
    for where, slot, key in slots:
        if key not in copies:
            value = tree.get(key, initial[key])
            copies[key] = value.clone() if row is None else torch.where(row, value, value)
        where[slot] = copies[key]
    return copies


def taken(slots: ParameterSlot, before: Tree) -> Tree:
    """The buffers as the forward has left them; ValueError for one that is not the same kind of tensor any more."""
    found: Tree = {}
    for where, slot, key in slots:
        if key not in found or where[slot] is not before[key]:
            found[key] = where[slot]
    for key, value in found.items():
        if fault := unlike(value, before[key]):
            raise ValueError(f"the buffer {keys.name_of(key)} {fault}")
    return {key: value.detach() for key, value in found.items()}


def unlike(after: Tensor | None, before: Tensor) -> str:
    """How a buffer differs from the one before in more than its values; empty where it does not."""
    if after is None:
        return "is None after a forward; clients can only average what all of them hold"
    mine, its = (f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in (before, after))
    return "" if mine == its else f"is {mine} before a forward and {its} after it; it should keep its shape and dtype"
