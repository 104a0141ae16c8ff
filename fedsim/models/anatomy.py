"""What the ledger needs to know of a torch module, read off one forward pass.

Activations are counted by rules (float32, each storage once): convolution and linear save their input; batch norm its input and
two values per channel; group norm its input and two values per image and group; ReLU its output, ReLU6 its input; pooling its
input, max-pooling its int64 indices too; the mean over all positions, additions and reshaping nothing; cross-entropy the
log-probabilities and the label. Only modules are seen: a functional call inside of a user's own module adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsim.ledger import VALUE, Anatomy, Layer

BATCH = 2
LABEL = 8  # bytes of an int64
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool2d, nn.MaxPool2d)


def anatomy(module: nn.Module, shape: tuple[int, ...]) -> Anatomy:
    """The anatomy of `module` for images of `shape` (C, H, W), by two images of zeros; the module stays as it was.

    A module on the meta device is read without computing anything.
    """
    module = copy.deepcopy(module).train()  # a copy: training mode moves the running statistics
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    layers: dict[nn.Module, Layer] = {layer: _layer(name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)}
    seen = _Seen(layers)
    for layer in module.modules():
        layer.register_forward_hook(seen.after)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = module(torch.zeros(BATCH, *shape, device=device))
    weights = sum(layer.weights for layer in layers.values())
    activations = seen.saved + VALUE * logits[0].numel() + LABEL
    return Anatomy(
        layers=tuple(layers.values()),
        free=sum(value.numel() for value in module.parameters()) - weights,
        buffers=sum(value.numel() for value in module.buffers() if value.is_floating_point()),
        activations=activations,
        vectors=seen.vectors,
        transient=max(0, seen.highest - activations),
    )


def per_channel(module: nn.Module, shape: tuple[int, ...], graph: fx.Graph, owners: Mapping[str, str]) -> dict[str, int]:
    """Bytes saved for backward per image and channel, for each group: `owners` says whose channels a node of the `graph` hands on.

    The sum over groups, each times its channels, is the part of `anatomy`'s activations that gates make smaller.
    """
    module = copy.deepcopy(module).train()
    seen = _Seen({layer: _layer(name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)})
    for layer in module.modules():
        layer.register_forward_hook(seen.after)
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    walk = _Walk(fx.GraphModule(module, graph), owners)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        walk.run(torch.zeros(BATCH, *shape, device=device))
    found: dict[str, int] = {}
    for storage, saved in seen.shares:
        if storage in walk.owner:
            group, channels = walk.owner[storage]
            found[group] = found.get(group, 0) + saved // channels
    return found


class _Walk(fx.Interpreter):
    """Notes whose channels each storage holds."""

    def __init__(self, module: fx.GraphModule, owners: Mapping[str, str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.owners = owners
        self.owner: dict[int, tuple[str, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.name in self.owners:
            storage = result.untyped_storage()._cdata
            self.owner.setdefault(storage, (self.owners[n.name], result.shape[1]))
        return result


def _layer(name: str, layer: nn.Module) -> Layer:
    weight = layer.get_parameter("weight")
    return Layer(name, weight.numel(), 0, tuple(weight.shape), 0)


class _Seen:
    """What the hooks of one forward pass gather."""

    def __init__(self, layers: dict[nn.Module, Layer]) -> None:
        self.layers = layers
        self.storages: dict[int, Tensor] = {}  # the tensor is held, so that its storage's address stays its own
        self.shares: list[tuple[int, int]] = []  # a storage, and bytes per image that are saved of it or like it
        self.saved = 0  # bytes per image
        self.vectors = 0  # bytes per batch
        self.highest = 0  # bytes per image: what is saved up to a layer, and the gradients of its output and its input

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module in self.layers:
            self._use(module, output)
        for kinds, rule in RULES:
            if isinstance(module, kinds):
                rule(self, module, inputs[0], output)
                gradients = VALUE * (inputs[0].numel() + output.numel()) // BATCH
                self.highest = max(self.highest, self.saved + gradients)

    def save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = tensor
            self.add(tensor, storage.nbytes() // BATCH)

    def add(self, like: Tensor, bytes: int) -> None:
        self.shares.append((like.untyped_storage()._cdata, bytes))
        self.saved += bytes

    def _use(self, module: nn.Module, output: Tensor) -> None:
        """A layer that is used twice has the positions of both uses."""
        layer = self.layers[module]
        positions = layer.positions + output[0].numel() // layer.shape[0]
        self.layers[module] = replace(layer, positions=positions, flops=2 * layer.weights * positions)


def _input(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)


def _output(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(y)


def _relu6(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if module.inplace:  # a copy of what it overwrites
        seen.add(y, VALUE * y[0].numel())
    else:
        seen.save(x)


def _batch_norm(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    seen.vectors += 2 * VALUE * x.shape[1]


def _group_norm(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    seen.saved += 2 * VALUE * int(module.num_groups)  # type: ignore[arg-type]


def _indices(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.add(y, LABEL * y[0].numel())


def _adaptive(seen: _Seen, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if y.shape[-2:].numel() > 1:  # to one position it is a mean
        seen.save(x)


RULES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[_Seen, nn.Module, Tensor, Tensor], None]], ...] = (
    (WEIGHTED, _input),
    (BATCH_NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.ReLU,), _output),
    ((nn.ReLU6,), _relu6),
    (POOLS, _input),
    ((nn.MaxPool2d,), _indices),
    ((nn.AdaptiveAvgPool2d,), _adaptive),
)
