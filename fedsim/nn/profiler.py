"""The model profile: layers, FLOPs and saved bytes of a torch module, as the ledger needs them, from forward passes.

Activations are what autograd saves for the backward pass, each storage once (`torch.autograd.graph.saved_tensors_hooks`), functional
calls included. A pass of two images and one of three differ by what one image needs; parameters, and what is computed of them alone,
cancel out. For the loss the log-probabilities and the label are added.

Rules replace the hooks in two places. A dynamic gate counts as what it multiplies and a few values a channel. Under activation
pruning, which only `Net` carries out, convolutions and linear layers save a cache, ReLUs a bit an entry, max-pooling a byte a result,
average pooling nothing, norms their input and statistics, and dropout a factor for each entry or channel; there only modules are
seen, no functional calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from fedsim.core.activation_pruning import ActivationPruning, bits
from fedsim.costs.profile import VALUE_BYTES, BackwardMoment, LayerProfile, ModelProfile
from fedsim.nn.layers.gate_insertion import forward_order
from fedsim.nn.layers.input_gate import CONVOLUTIONS, WEIGHTED, InputGate
from fedsim.nn.layers.nsconv import ScaledReLU, normalised_of
from fedsim.nn.slots import averaged

BATCH = 2  # images of a pass; a second pass has one more
LABEL = 8  # bytes of an int64
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
MOMENTS = (*WEIGHTED, *BATCH_NORMS, nn.GroupNorm, nn.ReLU, nn.ReLU6, ScaledReLU, *POOLS)  # where the backward pass is looked at


def profile(module: nn.Module, shape: tuple[int, ...], keep: ActivationPruning | None = None) -> ModelProfile:
    """The profile of `module` for one image, from forward passes of zeros in training mode; the module stays as it was.

    Args:
        module: any module that takes images (B, *shape) and gives logits (B, classes). On the meta device nothing is computed.
        shape: (C, H, W) of one image.
        keep: how Net prunes the inputs of the module's layers; None: not at all.

    Returns:
        The ModelProfile: counts of weights, FLOPs per image, and bytes (of float32) per image or per batch.

    >>> found = profile(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), (1, 4, 4))
    >>> [(layer.name, layer.weights, layer.positions, layer.flops) for layer in found.layers]
    [('0', 36, 4, 288), ('3', 48, 1, 96)]
    >>> found.activations == 4 * (1 * 4 * 4) + 4 * (4 * 2 * 2) + 4 * 3 + 8  # image, ReLU, log-probabilities, label
    True
    """
    module = _training_copy(module)
    seen, more = (_SavedTensors(module, keep, batch) for batch in (BATCH, BATCH + 1))
    logits = _pass(module, seen, module, shape, BATCH)
    _pass(module, more, module, shape, BATCH + 1)
    weights = sum(layer.weights for layer in seen.layers.values())
    tail = VALUE_BYTES * logits[0].numel() + LABEL
    image = more.packed - seen.packed
    return ModelProfile(
        layers=tuple(seen.layers.values()),
        free=sum(value.numel() for value in module.parameters()) - weights,
        buffers=sum(value.numel() for value in averaged(module).values()),
        activations=seen.saved + image + tail,
        vectors=seen.vectors,
        keep=keep,
        caches=tuple(seen.caches),
        signs=tuple(seen.signs),
        normalised=frozenset(normalised_of(module)),
        moments=tuple(
            replace(moment, activations=moment.activations + packed + tail)
            for moment, packed in zip(seen.moments, _per_image(seen, more, image), strict=True)
        ),
    )


def _per_image(seen: _SavedTensors, more: _SavedTensors, image: int) -> list[int]:
    """Bytes per image packed up to each moment; all of them where a forward runs its layers once for each image."""
    if len(seen.packed_at) != len(more.packed_at):
        return [image] * len(seen.packed_at)
    return [after - before for before, after in zip(seen.packed_at, more.packed_at, strict=True)]


def per_channel(
    module: nn.Module, shape: tuple[int, ...], graph: fx.Graph, owners: Mapping[str, str], keep: ActivationPruning | None = None
) -> dict[str, int]:
    """Bytes saved for the backward pass per image and channel, for each group of channels.

    The sum over groups, each times its channels, is the part of the profile's activations that gates make smaller.

    Args:
        module, shape, keep: as in `profile`.
        graph: of the module, by torch.fx.
        owners: a node of the graph -> the group whose channels it gives.
    """
    module = _training_copy(module)
    few, more = (_OwnerWalk(module, graph, owners, shape, keep, batch) for batch in (BATCH, BATCH + 1))
    found = {group: (more.packed[group] - few.packed[group]) // channels for group, channels in few.channels.items()}
    for storage, saved in few.seen.shares:
        if group := few.owner.get(storage):
            found[group] += saved // few.channels[group]
    return found


def _training_copy(module: nn.Module) -> nn.Module:
    """A copy, because training mode moves the running statistics; all its parameters are trained."""
    return copy.deepcopy(module).train().requires_grad_(True)


def _pass(module: nn.Module, seen: _SavedTensors, run: Callable[[Tensor], Any], shape: tuple[int, ...], batch: int) -> Any:
    """What `run` gives for images of zeros; `seen` notes what is saved for the backward pass."""
    handles = [layer.register_forward_hook(seen.after, with_kwargs=True) for layer in module.modules()]
    handles += [layer.register_forward_pre_hook(seen.before) for layer in module.modules() if isinstance(layer, InputGate)]
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    counted = saved_tensors_hooks(seen.pack, lambda saved: saved)
    with torch.set_grad_enabled(seen.keep is None), torch.random.fork_rng(devices=[]), counted:
        result = run(torch.zeros(batch, *shape, device=device))
    for handle in handles:
        handle.remove()
    return result


class _OwnerWalk(fx.Interpreter):
    """Runs the graph, and finds for each group the bytes that are saved of its channels."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        owners: Mapping[str, str],
        shape: tuple[int, ...],
        keep: ActivationPruning | None,
        batch: int,
    ) -> None:
        super().__init__(fx.GraphModule(module, graph), garbage_collect_values=False)
        self.owners = owners
        self.seen = _SavedTensors(module, keep, batch)
        self.results: set[int] = set()  # storages of all nodes
        self.owner: dict[int, str] = {}  # storage -> group
        self.channels: dict[str, int] = {}
        _pass(module, self.seen, self.run, shape, batch)
        self.packed = dict.fromkeys(self.channels, 0)  # group -> bytes of the batch
        for storage, tensor in self.seen.storages.items():
            if storage in self.owner and self.seen.keep is None:
                self.packed[self.owner[storage]] += tensor.untyped_storage().nbytes()

    def run_node(self, n: fx.Node) -> Any:
        before = len(self.seen.storages)
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.results.add(_storage(result))
            if n.name in self.owners:
                self._own(self.owners[n.name], result, list(self.seen.storages.values())[before:])
        return result

    def _own(self, group: str, result: Tensor, packed: list[Tensor]) -> None:
        """The group owns the result, and what only the backward pass reads of its channels: indices of a pool, copies."""
        channels = self.channels.setdefault(group, result.shape[1])
        self.owner.setdefault(_storage(result), group)
        for tensor in packed:
            if _storage(tensor) not in self.results and tensor.shape[1:2] == (channels,):
                self.owner.setdefault(_storage(tensor), group)


def _layer(name: str, layer: nn.Module) -> LayerProfile:
    weight = layer.get_parameter("weight")
    return LayerProfile(name, weight.numel(), 0, tuple(weight.shape), 0)


class _SavedTensors:
    """What one forward pass saves for the backward pass; its hooks fill it."""

    def __init__(self, module: nn.Module, keep: ActivationPruning | None, batch: int) -> None:
        weighted = {name: layer for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)}
        first: dict[int, nn.Module] = {}
        self.owner = {layer: first.setdefault(id(layer.weight), layer) for layer in weighted.values()}  # the first layer with its weight
        order = forward_order(module, [name for name, layer in weighted.items() if self.owner[layer] is layer])
        self.layers: dict[nn.Module, LayerProfile] = {weighted[name]: _layer(name, weighted[name]) for name in order}
        self.keep, self.batch = keep, batch
        self.first = next(iter(self.layers), None)
        self.storages: dict[int, Tensor] = {}  # the tensor is held, so that its storage's address stays its own
        self.packed = 0  # bytes of the batch that autograd saves, and of tensors that belong to no image
        self.packed_at: list[int] = []  # of them, up to each moment
        self.in_gate = False
        self.shares: list[tuple[int, int]] = []  # by the rules: a storage, and bytes per image that are saved of it or like it
        self.saved = 0  # bytes per image, by the rules
        self.overcounted = 0  # bytes per image that torch saves and the kernels of fedsim do not need
        self.vectors = 0  # bytes per batch
        self.caches: list[int] = []  # entries per image
        self.signs: list[int] = []
        self.pruned: dict[object, Tensor] = {}
        self.moments: list[BackwardMoment] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd for each tensor that it saves."""
        if not self.in_gate and _storage(tensor) not in self.storages:
            self.storages[_storage(tensor)] = tensor
            self.packed += tensor.untyped_storage().nbytes()
        return tensor

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.in_gate = True

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        inputs = inputs or tuple(named.values())  # a model may call its layers by keyword
        if module in self.owner:
            self._use(self.owner[module], output)
        for kinds, rule in PRUNING_RULES if self.keep else RULES:
            if isinstance(module, kinds):
                rule(self, module, inputs[0], output)
        if isinstance(module, MOMENTS):
            self._note_moment(module, inputs[0], output, _view(inputs[0]) in self.pruned)

    def _note_moment(self, module: nn.Module, x: Tensor, y: Tensor, restored: bool) -> None:
        """Notes the memory of the backward pass at this module: gradients of its output and its input, and its restored input.

        Besides, torch's convolutions copy both into blocks of channels and back, and its batch norm makes one more tensor.
        """
        weight = module._parameters.get("weight")
        own = sum(value.numel() for value in module.parameters(recurse=False))
        held = weight.numel() if module in self.owner and weight is not None else 0
        copies = isinstance(module, CONVOLUTIONS)
        inputs = 1 + (restored and held > 0) + (copies or isinstance(module, BATCH_NORMS))
        beside = VALUE_BYTES * (inputs * x.numel() + (1 + copies) * y.numel()) // self.batch
        name = self.layers[self.owner[module]].name if module in self.owner else ""
        self.packed_at.append(self.packed)
        self.moments.append(BackwardMoment(self.saved - self.overcounted, len(self.caches), len(self.signs), beside, name, own - held))

    def save(self, tensor: Tensor) -> None:
        if _storage(tensor) not in self.storages:
            self.storages[_storage(tensor)] = tensor
            self.add(tensor, tensor.untyped_storage().nbytes() // self.batch)

    def prune(self, tensor: Tensor) -> None:
        """A cache for all layers that read this tensor."""
        if _view(tensor) not in self.pruned:
            self.pruned[_view(tensor)] = tensor
            entries = tensor[0].numel()
            self.caches.append(entries)
            assert self.keep is not None
            self.shares.append((_storage(tensor), self.keep.bytes(entries)))

    def sign(self, tensor: Tensor) -> None:
        self.signs.append(tensor[0].numel())
        self.shares.append((_storage(tensor), bits(tensor[0].numel())))

    def add(self, like: Tensor, bytes: int) -> None:
        self.shares.append((_storage(like), bytes))
        self.saved += bytes

    def _use(self, module: nn.Module, output: Tensor) -> None:
        """A layer that is used twice, or whose weight another one uses too, has the positions of both uses."""
        layer = self.layers[module]
        positions = layer.positions + (1 if isinstance(module, InputGate) else output[0].numel() // layer.shape[0])
        self.layers[module] = replace(layer, positions=positions, flops=2 * layer.weights * positions)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: Tensor) -> object:
    """Identifies a tensor among the views of its storage."""
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _gate(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """A gate saves what it multiplies, its pooled input, and its values before and after the largest are chosen."""
    seen.in_gate = False
    seen.add(y, VALUE_BYTES * (y[0].numel() + x.shape[1] + 3 * y.shape[1]))


def _channel_statistics(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.vectors += 2 * VALUE_BYTES * x.shape[1]


def _batch_norm(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    _channel_statistics(seen, module, x, y)


def _group_norm(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    seen.save(x)
    seen.saved += 2 * VALUE_BYTES * int(module.num_groups)  # type: ignore[arg-type]


def _halving(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """The kernel of fedsim for 2x2 windows keeps a byte an entry in the place of torch's int64."""
    if (module.kernel_size, module.stride, module.padding) in ((2, 2, 0), ((2, 2), (2, 2), (0, 0))):
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


def _of_entries(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Dropout keeps by what each entry is multiplied."""
    if module.p:
        seen.add(y, VALUE_BYTES * y[0].numel())


def _of_channels(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if module.p:
        seen.add(y, VALUE_BYTES * y.shape[1])


def _places(seen: _SavedTensors, module: nn.Module, x: Tensor, y: Tensor) -> None:
    if module.return_indices or module.dilation not in (1, (1, 1)):
        seen.save(x)
        seen.add(y, LABEL * y[0].numel())
        _halving(seen, module, x, y)
        return
    kernel = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
    seen.add(y, (1 if prod(kernel) <= 256 else VALUE_BYTES) * y[0].numel())


Rules = tuple[tuple[tuple[type[nn.Module], ...], Callable[[_SavedTensors, nn.Module, Tensor, Tensor], None]], ...]
RULES: Rules = ((BATCH_NORMS, _channel_statistics), ((nn.MaxPool2d,), _halving), ((InputGate,), _gate))
PRUNING_RULES: Rules = (  # under activation pruning
    ((*CONVOLUTIONS, nn.Linear), _cached),
    (BATCH_NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.ReLU, nn.ReLU6, ScaledReLU), _signs),
    ((nn.MaxPool2d,), _places),
    ((nn.AdaptiveAvgPool2d,), _adaptive),
    ((nn.Dropout, nn.AlphaDropout), _of_entries),
    ((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout), _of_channels),
)
