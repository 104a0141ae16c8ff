"""Two training steps and an evaluation of a model as a record of named tensors: of the plain torch module, and of a `Net`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.core.types import Batch

if TYPE_CHECKING:
    from fedsim.nn.net import Net

Record = dict[str, Tensor]  # what it is, in words -> its value

FIRST, SECOND, LAST = "the logits in training", "the logits of the second training step", "the logits in evaluation"
LOGITS = (FIRST, SECOND, LAST)
RATE = 1e-2  # of the step between, over the norm of the gradient
CLOSE = 2e-3  # of a tensor's largest value: more than float32 and another order of sums make
FAINT = 1e-2  # of the largest gradient: differences below CLOSE times this are rounding


def of_module(module: nn.Module, x: Tensor, y: Tensor, masks: Tree | None = None) -> Record:
    """By torch alone, on a copy. masks: "mask/NAME" of weights that are pruned."""
    module = copy.deepcopy(module).train()
    masks = masks or {}
    pruned = {name: masks[key] for name, _ in module.named_parameters() if (key := keys.mask_of(keys.WEIGHTS + name)) in masks}
    with torch.no_grad():
        for name, mask in pruned.items():
            module.get_parameter(name).mul_(mask)
    logits, gradient = _step(module, x, y, pruned)
    record = {FIRST: logits} | {_of(name): value for name, value in gradient.items()} | _buffers(module)
    rate = RATE / _norm(gradient)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.sub_(rate * gradient[name])
    record[SECOND] = _step(module, x, y, pruned)[0]
    with torch.no_grad():
        record[LAST] = module.eval()(x).clone()
    return record


def _step(module: nn.Module, x: Tensor, y: Tensor, pruned: Tree) -> tuple[Tensor, Tree]:
    """Logits and the gradient of every parameter, 0 where it is not trained."""
    module.zero_grad(set_to_none=True)
    with torch.enable_grad():
        logits = module(x.clone())
        F.cross_entropy(logits, y).backward()
    given = {name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in module.named_parameters()}
    return logits.detach().clone(), {name: value * pruned[name] if name in pruned else value for name, value in given.items()}


def _norm(gradient: Tree) -> Tensor:
    return torch.stack([value.square().sum() for value in gradient.values()]).sum().sqrt() + 1e-12


def _of(name: str) -> str:
    return f"the gradient of {name}"


def _buffers(module: nn.Module) -> Record:
    """All but the counts of batches, which nothing reads."""
    held = {name: value for name, value in module.named_buffers() if not name.endswith("num_batches_tracked")}
    return {_after(name): value.detach().clone() for name, value in held.items()}


def _after(name: str) -> str:
    return f"the buffer {name} after a training step"


def of_net(net: Net, tree: Tree, x: Tensor, y: Tensor, real: Tensor | None = None, key: Tensor | None = None) -> Record:
    """By `Net`, from the values of a tree; for calls under `vmap` too. key: () int64, by which dropout draws."""
    steps = [Batch(x, y, real, torch.tensor(t), torch.tensor(2), key=key) for t in range(2)]
    logits, found = net(tree, x, True, real, draws=steps[0])
    gradient, buffers = net.gradient(tree, steps[0])[1:3]
    named = {keys.name_of(key): gradient[key] if key in gradient else torch.zeros_like(tree[key]) for key in net.weights}
    before = {_after(name): _untracked(net, tree, name) for name, _ in net.original.named_buffers()}
    after = {_after(keys.name_of(key)): value for key, value in (found | buffers).items() if key.startswith(keys.BUFFERS)}
    record = {FIRST: logits} | {_of(name): value for name, value in named.items()} | before | after
    rate = RATE / _norm(named)
    moved = tree | found | buffers | {key: tree[key] - rate * named[keys.name_of(key)] for key in net.weights}
    record[SECOND] = net(moved, x, True, real, draws=steps[1])[0]
    further = net.gradient(moved, steps[1])[2]
    record[LAST] = net(moved | further, x, False, real)[0]
    return record


def _untracked(net: Net, tree: Tree, name: str) -> Tensor:
    return tree.get(keys.BUFFERS + name, net.original.get_buffer(name))


def differences(mine: Record, right: Record) -> list[str]:
    """What of `right` is otherwise in `mine`, the first things first."""
    largest = max((float(value.abs().max()) for name, value in right.items() if name.startswith(_of("")) and value.numel()), default=0.0)
    return [name for name, value in right.items() if name not in mine or unlike(mine[name], value, FAINT * largest)]


def unlike(mine: Tensor, right: Tensor, least: float = 0.0) -> bool:
    """Whether two values differ by more than rounding; `least`: a size below which differences are counted as of it."""
    if mine.shape != right.shape:
        return True
    if not right.numel():
        return False
    mine, right = mine.detach().to(torch.float64), right.detach().to(torch.float64)
    scale = max(float(right.nan_to_num(posinf=0.0, neginf=0.0).abs().max()), least, 1e-6)
    return not bool(((mine == right) | ((mine - right).abs() <= CLOSE * scale)).all())
