"""The model profile: layers, FLOPs and saved bytes of a torch module, as the ledger needs them, from one forward pass.

Activations are counted by rules (float32, each storage once): convolution and linear save their input; batch norm its input and
two values per channel; group norm its input and two values per image and group; ReLU its output, ReLU6 its input; pooling its
input, max-pooling its int64 indices too; the mean over all positions, additions and reshaping nothing; cross-entropy the
log-probabilities and the label. Where inputs are pruned, layers save a cache, ReLUs a bit an entry, max-pooling a byte a result and
average pooling nothing. A dynamic gate saves what it multiplies and a few values a channel. Only modules are seen: a
functional call inside of a user's own module adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsim.core.activation_pruning import ActivationPruning, bits
from fedsim.costs.profile import VALUE_BYTES, BackwardMoment, LayerProfile, ModelProfile
from fedsim.nn.layers.input_gate import CONVOLUTIONS, WEIGHTED, InputGate
from fedsim.nn.layers.nsconv import ScaledReLU, normalised_of

BATCH = 2
LABEL = 8  # bytes of an int64
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool2d, nn.MaxPool2d)


def profile(module: nn.Module, shape: tuple[int, ...], keep: ActivationPruning | None = None) -> ModelProfile:
    """The profile of `module` for images of `shape` (C, H, W), from a forward pass of two images of zeros; the module stays as it was.

    keep: how Net prunes the inputs of its layers; None: not at all. For a module on the meta device nothing is computed.
    """
    module = copy.deepcopy(module).train()  # a copy: training mode moves the running statistics
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    layers: dict[nn.Module, LayerProfile] = {
        layer: _layer(name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)
    }
    seen = _SavedTensors(layers, keep)
    for layer in module.modules():
        layer.register_forward_hook(seen.after)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = module(torch.zeros(BATCH, *shape, device=device))
    weights = sum(layer.weights for layer in layers.values())
    tail = VALUE_BYTES * logits[0].numel() + LABEL
    return ModelProfile(
        layers=tuple(layers.values()),
        free=sum(value.numel() for value in module.parameters()) - weights,
        buffers=sum(value.numel() for value in module.buffers() if value.is_floating_point()),
        activations=seen.saved + tail,
        vectors=seen.vectors,
        keep=keep,
        caches=tuple(seen.caches),
        signs=tuple(seen.signs),
        normalised=frozenset(normalised_of(module)),
        moments=tuple(replace(moment, activations=moment.activations + tail) for moment in seen.moments),
    )


def per_channel(
    module: nn.Module, shape: tuple[int, ...], graph: fx.Graph, owners: Mapping[str, str], keep: ActivationPruning | None = None
) -> dict[str, int]:
    """Bytes saved for backward per image and channel, for each group: `owners` maps a node of the `graph` to the group of its channels.

    The sum over groups, each times its channels, is the part of the profile's activations that gates make smaller.
    """
    module = copy.deepcopy(module).train()
    seen = _SavedTensors({layer: _layer(name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)}, keep)
    for layer in module.modules():
        layer.register_forward_hook(seen.after)
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    walk = _OwnerWalk(fx.GraphModule(module, graph), owners)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        walk.run(torch.zeros(BATCH, *shape, device=device))
    found: dict[str, int] = {}
    for storage, saved in seen.shares:
        if storage in walk.owner:
            group, channels = walk.owner[storage]
            found[group] = found.get(group, 0) + saved // channels
    return found


class _OwnerWalk(fx.Interpreter):
    """Runs the graph and notes, for each storage, the group and the number of its channels."""

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


def _layer(name: str, layer: nn.Module) -> LayerProfile:
    weight = layer.get_parameter("weight")
    return LayerProfile(name, weight.numel(), 0, tuple(weight.shape), 0)


class _SavedTensors:
    """What the layers of one forward pass save for the backward pass; its hooks fill it."""

    def __init__(self, layers: dict[nn.Module, LayerProfile], keep: ActivationPruning | None = None) -> None:
        self.layers, self.keep = layers, keep
        self.first = next(iter(layers), None)
        self.storages: dict[int, Tensor] = {}  # the tensor is held, so that its storage's address stays its own
        self.shares: list[tuple[int, int]] = []  # a storage, and bytes per image that are saved of it or like it
        self.saved = 0  # bytes per image
        self.overcounted = 0  # of them, bytes that the rules count and the kernels of fedsim do not need
        self.vectors = 0  # bytes per batch
        self.caches: list[int] = []  # entries per image
        self.signs: list[int] = []
        self.pruned: dict[object, Tensor] = {}
        self.moments: list[BackwardMoment] = []

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module in self.layers:
            self._use(module, output)
        for kinds, rule in PRUNING_RULES if self.keep else RULES:
            if isinstance(module, kinds):
                rule(self, module, inputs[0], output)
        if any(isinstance(module, kinds) for kinds, _ in RULES):
            self._note_moment(module, inputs[0], output, _view(inputs[0]) in self.pruned)

    def _note_moment(self, module: nn.Module, x: Tensor, y: Tensor, restored: bool) -> None:
        """Notes the memory of the backward pass at this module: gradients of its output and its input, and its restored input.

        Besides, torch's convolutions copy both into blocks of channels and back, and its batch norm makes one more tensor.
        """
        weight = module._parameters.get("weight")
        own = sum(value.numel() for value in module.parameters(recurse=False))
        held = weight.numel() if module in self.layers and weight is not None else 0
        copies = isinstance(module, CONVOLUTIONS)
        inputs = 1 + (restored and held > 0) + (copies or isinstance(module, BATCH_NORMS))
        beside = VALUE_BYTES * (inputs * x.numel() + (1 + copies) * y.numel()) // BATCH
        name = self.layers[module].name if module in self.layers else ""
        self.moments.append(BackwardMoment(self.saved - self.overcounted, len(self.caches), len(self.signs), beside, name, own - held))

    def save(self, tensor: Tensor) -> None:
        if not _known(self.storages, tensor):
            self.storages[tensor.untyped_storage()._cdata] = tensor
            self.add(tensor, tensor.untyped_storage().nbytes() // BATCH)

    def prune(self, tensor: Tensor) -> None:
        """A cache for all layers that read this tensor."""
        if _view(tensor) not in self.pruned:
            self.pruned[_view(tensor)] = tensor
            entries = tensor[0].numel()
            self.caches.append(entries)
            assert self.keep is not None
            self.shares.append((tensor.untyped_storage()._cdata, self.keep.bytes(entries)))

    def sign(self, tensor: Tensor) -> None:
        self.signs.append(tensor[0].numel())
        self.shares.append((tensor.untyped_storage()._cdata, bits(tensor[0].numel())))

    def add(self, like: Tensor, bytes: int) -> None:
        self.shares.append((like.untyped_storage()._cdata, bytes))
        self.saved += bytes

    def _use(self, module: nn.Module, output: Tensor) -> None:
        """A layer that is used twice has the positions of both uses."""
        layer = self.layers[module]
        positions = layer.positions + (1 if isinstance(module, InputGate) else output[0].numel() // layer.shape[0])
        self.layers[module] = replace(layer, positions=positions, flops=2 * layer.weights * positions)


def _known(tensors: dict[int, Tensor], tensor: Tensor) -> bool:
    return tensor.untyped_storage()._cdata in tensors


def _view(tensor: Tensor) -> object:
    """Identifies a tensor among the views of its storage."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _input(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)


def _gate(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """It saves what it multiplies, its pooled input, and its values before and after the largest are chosen."""
    seen.add(y, VALUE_BYTES * (y[0].numel() + x.shape[1] + 3 * y.shape[1]))


def _output(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(y)


def _relu6(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if module.inplace:  # a copy of what it overwrites
        seen.add(y, VALUE_BYTES * y[0].numel())
    else:
        seen.save(x)


def _batch_norm(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    seen.vectors += 2 * VALUE_BYTES * x.shape[1]


def _group_norm(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    seen.saved += 2 * VALUE_BYTES * int(module.num_groups)  # type: ignore[arg-type]


def _indices(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.add(y, LABEL * y[0].numel())
    if (module.kernel_size, module.stride, module.padding) in ((2, 2, 0), ((2, 2), (2, 2), (0, 0))):  # Net's own kernel keeps a byte
        seen.overcounted += (LABEL - 1) * y[0].numel()


def _adaptive(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if y.shape[-2:].numel() > 1:  # to one position it is a mean
        seen.save(x)


def _cached(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    assert seen.keep is not None
    if module is seen.first or (isinstance(module, nn.Linear) and seen.keep.layers == "conv"):
        seen.save(x)
    else:
        seen.prune(x)


def _signs(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.sign(y)


def _places(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if module.return_indices or module.dilation not in (1, (1, 1)):
        _input(seen, module, x, y)
        _indices(seen, module, x, y)
        return
    kernel = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
    seen.add(y, (1 if prod(kernel) <= 256 else VALUE_BYTES) * y[0].numel())


Rules = tuple[tuple[tuple[type[nn.Module], ...], Callable[[_SavedTensors, nn.Module, Tensor, Tensor], None]], ...]
RULES: Rules = (
    ((*CONVOLUTIONS, nn.Linear), _input),
    ((InputGate,), _gate),
    (BATCH_NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.ReLU, ScaledReLU), _output),
    ((nn.ReLU6,), _relu6),
    (POOLS, _input),
    ((nn.MaxPool2d,), _indices),
    ((nn.AdaptiveAvgPool2d,), _adaptive),
)
PRUNING_RULES: Rules = (  # under activation pruning
    ((*CONVOLUTIONS, nn.Linear), _cached),
    (BATCH_NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.ReLU, nn.ReLU6, ScaledReLU), _signs),
    ((nn.MaxPool2d,), _places),
    ((nn.AdaptiveAvgPool2d,), _adaptive),
)
