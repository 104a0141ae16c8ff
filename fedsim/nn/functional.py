"""Calls of a torch module whose values come from a tree: whole, gated, cut to the kept channels, or on the kept weights alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fedsim.core import keys
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, under
from fedsim.kernels.nsconv import normalised
from fedsim.kernels.sparse.cost_model import Cost, Patterns
from fedsim.kernels.sparse.pattern import Geometry, KeptPositions, Pattern
from fedsim.nn import batched_matmul, channel_groups, mixed_precision, packed_program
from fedsim.nn.channel_groups import Group
from fedsim.nn.channels import Channels, halves_of, standardised_of
from fedsim.nn.gradient_taps import ParameterSlot, TappedLayer, tapping, tied
from fedsim.nn.layers.input_gate import WEIGHTED, gates_of
from fedsim.nn.layers.nsconv import normalised_of
from fedsim.nn.layers.standardized_conv import standardised
from fedsim.nn.runtime import activation_cache, call_context, gate, replace


class FunctionalModule:
    """A module emptied of its values, and every way to call it with those of a tree. The module it is given stays as it was.

    `initial` holds the module's own values, under "w/" and "buf/"; `shapes` the weights' of its conv and linear layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._call = call_context.CallContext()
        self._given = copy.deepcopy(module).train()
        self.initial: Tree = {keys.WEIGHTS + name: value.detach() for name, value in self._given.named_parameters()}
        for name, value in self._given.named_buffers():
            if value.is_floating_point():
                self.initial[keys.BUFFERS + name] = value.detach()
        self.module = copy.deepcopy(self._given)
        replace.replace_norms_and_gates(self.module, self._call)
        geometries = replace.replace_convs_and_activations(self.module, self._call)
        next((layer for layer in self.module.modules() if hasattr(layer, "prunes")), self.module).prunes = False  # type: ignore[assignment]
        slots = self.module.named_modules(remove_duplicate=False)
        self._slots: ParameterSlot = [
            (layer._parameters, slot, f"{name}.{slot}".lstrip(".")) for name, layer in slots for slot in layer._parameters
        ]
        self._slots = tied([(where, slot, keys.WEIGHTS + name) for where, slot, name in self._slots if where[slot] is not None])
        uses = Counter(key for _, _, key in self._slots)
        self._patterns = Patterns({layer: way for layer, way in geometries.items() if uses[keys.weight(layer)] == 1}, {})
        weighted = [name for name, layer in self.module.named_modules() if isinstance(layer, (*WEIGHTED, *replace.WEIGHTED))]
        self.shapes = {name: tuple(self.initial[keys.weight(name)].shape) for name in weighted if keys.weight(name) in self.initial}
        self.normalised = normalised_of(self._given)
        self.keep: ActivationPruning | None = None
        self.low: torch.dtype | None = None
        self._raise: Callable[[], None] = lambda: None
        self.pure = False
        self._program = packed_program.program(self._given)
        self.packed_convolution = "grouped"
        self._product: packed_program.PackedProgram | None = None
        self._training = True
        self.dynamic_gates = tuple(gates_of(self._given))  # gates that see the image
        self.has_dynamic_gates = bool(self.dynamic_gates)
        self._empty()

    def set_sparse_costs(self, costs: Mapping[str, Cost]) -> None:
        """From now on layers run sparse where that costs less: layer -> Cost, of all that take part; empty: none does."""
        self._patterns = Patterns(self._patterns.geometries, costs)

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        """The layers that can run sparse."""
        return self._patterns.geometries

    def set_activation_pruning(self, keep: ActivationPruning | None) -> None:
        """From now on layers keep so much of their inputs for a backward pass; None: all of it.

        Under a hard gate such a pass is masked, not compacted: closed channels count as the zeros that they are.
        ValueError for a model with layers that cannot.
        """
        if keep is not None and (unfit := activation_cache.unfit(self._given)):
            raise ValueError(f"activations cannot be pruned: {'; '.join(unfit)}")
        self.keep = keep
        self._program = packed_program.program(self._given, keep=keep)
        self.set_packed_convolution(self.packed_convolution)
        self.__dict__.pop("_remaking", None)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """From now on convolutions and products are computed in this dtype, all else as before; None: all alike."""
        self._raise()
        self.low, self._raise = dtype, mixed_precision.lower(self.module, dtype) if dtype else lambda: None

    def set_packed_convolution(self, how: str) -> None:
        """From now on a pack's convolutions are "grouped" ones or, where the model is a plain sequence, one batched "matmul" each."""
        self.packed_convolution, self._product = (
            how,
            batched_matmul.by_products(self._given, self.low) if how == "matmul" and not self.keep else None,
        )

    # ---- channels

    @cached_property
    def _traced(self) -> tuple[fx.Graph, tuple[Group, ...]]:
        return channel_groups.found(self._given)

    @cached_property
    def _standardised(self) -> frozenset[str]:
        """Layers whose filters are."""
        return standardised_of(self._given)

    @cached_property
    def channels(self) -> Channels:
        """The channels that gates open and close; ValueError for a model without any."""
        return Channels(self._traced[1], self.shapes, self._standardised, halves_of(self._given))

    @property
    def selected(self) -> list[int]:
        """round(d C_l), the most channels of every group that gates by the image leave open."""
        found = gates_of(self._given)
        return [found[group.gate].keep or group.size if group.gate else group.size for group in self.channels.groups]

    @cached_property
    def _gated(self) -> fx.GraphModule:
        """The module with its gates, on the same layers; made while they are empty."""
        made, places = channel_groups.gated(self.module, *self._traced, lambda group: gate.Gate(group, self._call))
        self._slots += [(where, slot, keys.WEIGHTS + name) for where, slot, name in places if keys.WEIGHTS + name in self.initial]
        return made

    def folded(self, tree: Tree) -> Tree:
        """The tree with every standardised or normalised filter ready for use in the place of the stored one."""
        tree = self._standard(tree)
        ready = {}
        for name, over in self.normalised.items():
            weight, gain, mask = (tree.get(key) for key in (keys.weight(name), keys.gain(name), keys.mask(name)))
            ready[keys.weight(name)] = normalised(cast(Tensor, weight), cast(Tensor, gain), mask, over)
        return tree | ready

    def _standard(self, tree: Tree) -> Tree:
        """With every standardised one ready."""
        ready = {keys.weight(name): standardised(tree[keys.weight(name)], tree.get(keys.removed(name))) for name in self._standardised}
        return {key: ready.get(key, value) for key, value in tree.items()}

    # ---- calls

    def _empty(self) -> None:
        for where, slot, _ in self._slots:
            where[slot] = None

    @contextmanager
    def _filled(self, weights: Tree, tree: Tree, train: bool, real: Tensor | None, momentum: float | None = None) -> Iterator[Tree]:
        call = self._call
        call.tree, call.train, call.real, call.momentum, call.pure, call.buffers = tree, train, real, momentum, self.pure, {}
        call.keep, call.caches, call.penalties = self.keep if train else None, [], []
        call.values = self.channels.split(tree[GATE_VALUES]) if GATE_VALUES in tree else {}
        if train is not self._training:
            self.module.train(train)
            self._training = train
        try:
            for where, slot, key in self._slots:
                where[slot] = weights[key]
            yield call.buffers
        finally:
            self._empty()
            call.tree, call.real, call.caches, call.values, call.images = {}, None, [], {}, None

    def _forward(
        self,
        weights: Tree,
        tree: Tree,
        x: Tensor,
        train: bool,
        real: Tensor | None,
        momentum: float | None = None,
        tapped: Sequence[TappedLayer] = (),
        probes: Sequence[Tree] = (),
    ) -> tuple[Tensor, Tree]:
        """Logits, and new running statistics."""
        gate, self._call.images = tree.get(GATE), x
        if gate is None:
            with self._filled(weights, tree, train, real, momentum) as buffers, tapping(self.module, self._slots, tapped, probes):
                return self.module(x), buffers
        if gate.dtype == torch.bool and not (self.pure or tapped or self.has_dynamic_gates or (train and self.keep)):
            return self._compact(weights, tree, self.channels.kept(gate), x, train, real, momentum)
        gates, module = self.channels.split(gate), self.module if self.has_dynamic_gates else self._gated
        taps = tapping(self.module, self._slots, tapped, probes)
        with self._filled(weights, tree, train, real, momentum) as buffers, taps, self._gates(gates):
            logits = module(x)
        return logits, self.channels.stayed(buffers, tree, gates) if gate.dtype == torch.bool else buffers

    @contextmanager
    def _gates(self, gates: Tree) -> Iterator[None]:
        """Gates multiply; norms look through hard ones."""
        hard = next(iter(gates.values())).dtype == torch.bool
        self._call.gates, self._call.kept = gates, {norm: gates[group] for norm, group in self.channels.norms.items() if hard}
        try:
            yield
        finally:
            self._call.gates, self._call.kept = {}, {}

    def _compact(
        self,
        weights: Tree,
        tree: Tree,
        kept: Tree,
        x: Tensor,
        train: bool,
        real: Tensor | None,
        momentum: float | None,
        cut: Container[str] = (),
    ) -> tuple[Tensor, Tree]:
        """The kept channels alone: the same layers, filled with what is cut from the stored weights; those in `cut` are already.

        Normalised filters are not among those that are cut; their layers make them ready under their masks.
        """
        ready = self._standard(under(tree, keys.BUFFERS) | weights)
        ready |= {mask: tree[mask] for name in self.normalised if (mask := keys.mask(name)) in tree}
        small = ready | self.channels.cut({key: value for key, value in ready.items() if key not in cut}, kept)
        with self._filled(small, small, train, real, momentum) as buffers, self._thin(kept):
            logits = self.module(x)
        return logits, self.channels.spread(buffers, tree, kept)

    @contextmanager
    def _thin(self, kept: Tree) -> Iterator[None]:
        """Depth-wise convolutions of so many channels, and standardised filters that are so already."""
        layers: dict[Any, str] = {self.module.get_submodule(name): group for name, group in self.channels.depthwise.items()}
        before = {layer: layer.groups for layer in layers}
        self._call.cut = True
        try:
            for layer, group in layers.items():
                layer.groups = len(kept[group])
            yield
        finally:
            self._call.cut = False
            for layer, groups in before.items():
                layer.groups = groups

    def sparse(self, tree: Tree, left: Sequence[str] = ()) -> dict[str, Pattern]:
        """The layers that run on their kept weights alone; those in `left` do not."""
        if self.pure or GATE in tree or not self._patterns.costs:
            return {}
        return self._patterns.of(lambda layer: tree.get(keys.mask(layer)), frozenset(left))

    def thin(self, tree: Tree, left: Collection[str]) -> dict[str, KeptPositions]:
        """The layers that are given their kept values alone, and hand back those values' gradients, on dense kernels; not those in `left`.

        They are those that make their weight anew anyway, where activations are pruned.
        """
        if self.pure or GATE in tree or self.keep is None:
            return {}
        layers = [layer for layer in self._remaking if layer not in left and keys.mask(layer) in tree]
        return self._patterns.thin({layer: tree[keys.mask(layer)] for layer in layers})

    @cached_property
    def _remaking(self) -> tuple[str, ...]:
        """Layers that can: those that prune their inputs, but for standardised ones, and those whose weights others use."""
        able = [layer for layer in self.module.modules() if getattr(layer, "prunes", False) and hasattr(layer, "key")]
        conv_only = self.keep is not None and self.keep.layers == "conv"
        uses = Counter(key for _, _, key in self._slots)
        names = [str(layer.key) for layer in able if not (conv_only and isinstance(layer, nn.Linear))]
        return tuple(name for name in names if uses[keys.weight(name)] == 1)

    @contextmanager
    def _innermost(self, patterns: dict[str, Pattern], thin: dict[str, KeptPositions] | None = None) -> Iterator[None]:
        self._call.patterns, self._call.thin = patterns, thin or {}
        try:
            yield
        finally:
            self._call.patterns, self._call.thin = {}, {}
