"""Calls of a torch module whose values come from a tree: whole, gated, compact (open channels alone), or on kept weights alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from fedsim.core import keys, masks
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, under
from fedsim.kernels.nsconv import normalised
from fedsim.kernels.sparse.cost_model import Cost, Patterns
from fedsim.kernels.sparse.pattern import Geometry, KeptPositions, Pattern
from fedsim.nn import batched_matmul, channel_groups, mixed_precision, packed_program, slots
from fedsim.nn.channel_groups import Group
from fedsim.nn.channels import Channels, halves_of, standardised_of
from fedsim.nn.gradients.taps import TappedLayer, tapping
from fedsim.nn.layers.gate_insertion import forward_order
from fedsim.nn.layers.input_gate import WEIGHTED, gates_of
from fedsim.nn.layers.nsconv import normalised_of
from fedsim.nn.layers.standardized_conv import standardised
from fedsim.nn.loss import LossFunction
from fedsim.nn.packed_program import PackedProgram
from fedsim.nn.runtime import activation_cache, replace
from fedsim.nn.runtime.call_context import CallContext
from fedsim.nn.runtime.gate import Gate

if TYPE_CHECKING:
    from fedsim.core.types import Batch


class FunctionalModule:
    """A module emptied of its values, and every way to call it with those of a tree. The module it is given stays as it was.

    original: the module as it was given, with its values
    module: a copy whose layers are the run-time layers of fedsim, and whose parameters are put in for each call
    initial: the original's values, under "w/" and "buf/"
    shapes: layer -> shape of its weight, of conv and linear layers in the order of the forward pass
    weights: keys of all parameters
    frozen: those with requires_grad = False, which no step changes
    context: what the run-time layers know of the call at hand
    not_traced: why a traced graph cannot stand for the module; empty where nothing is known against it
    pure: whether calls are made under a torch.func transform, where nothing may be overwritten
    """

    def __init__(self, module: nn.Module) -> None:
        self.context, self.not_traced = CallContext(), ""
        self.original = copy.deepcopy(module).train()
        self.initial: Tree = {keys.WEIGHTS + name: value.detach() for name, value in self.original.named_parameters()}
        self.initial |= {keys.BUFFERS + name: value.detach() for name, value in slots.averaged(self.original).items()}
        self.module = copy.deepcopy(self.original)
        geometries = replace.replace_layers(self.module, self.context)
        self._slots, self._buffer_slots = slots.parameters(self.module), slots.buffers(self.module, self.initial)
        uses = Counter(key for _, _, key in self._slots)
        self._patterns = Patterns({layer: way for layer, way in geometries.items() if uses[keys.weight(layer)] == 1}, {})
        weighted = [name for name, layer in self.module.named_modules() if isinstance(layer, (*WEIGHTED, *replace.WEIGHTED))]
        weighted = forward_order(self.original, [name for name in weighted if keys.weight(name) in self.initial])
        replace.keep_first_input(self.module, weighted)
        self.shapes = {name: tuple(self.initial[keys.weight(name)].shape) for name in weighted}
        self.weights = tuple(key for key in self.initial if key.startswith(keys.WEIGHTS))
        self.frozen = frozenset(keys.WEIGHTS + name for name, value in self.original.named_parameters() if not value.requires_grad)
        self._mask_keys = {key: keys.mask_of(key) for key in self.weights}
        self.normalised = normalised_of(self.original)
        self.self_masked = {keys.weight(name) for name in self.normalised}  # weights whose layers mask them, and their gradients
        self.activation_pruning: ActivationPruning | None = None
        self.compute_dtype: torch.dtype | None = None
        self._end_compute_dtype: Callable[[], None] = lambda: None
        self.pure = False
        self.program: PackedProgram | None = packed_program.program(self.original)
        self.packed_convolution = "grouped"
        self._matmul_program: PackedProgram | None = None
        self.dynamic_gates = tuple(gates_of(self.original))  # names of the input-dependent gates
        self.has_dynamic_gates = bool(self.dynamic_gates)
        self.may_compute_again = slots.may_compute_again(self.original)  # parts of the forward, in the backward pass
        self._empty()

    # ---- settings

    def set_sparse_costs(self, costs: Mapping[str, Cost]) -> None:
        """From now on layers run sparse where that costs less: layer -> Cost, of all that take part; empty: none does."""
        self._patterns = Patterns(self._patterns.geometries, costs)

    @property
    def geometries(self) -> Mapping[str, Geometry]:
        """The layers that can run sparse."""
        return self._patterns.geometries

    def set_activation_pruning(self, pruning: ActivationPruning | None) -> None:
        """From now on layers keep only this share of their inputs for the backward pass; None: all of them.

        Under a hard gate such a pass is masked, not compacted: closed channels count as the zeros that they are.
        ValueError for a model with layers whose inputs cannot be pruned.
        """
        if pruning is not None and (unfit := activation_cache.unfit(self.original)):
            raise ValueError(f"activations cannot be pruned: {'; '.join(unfit)}")
        self.activation_pruning = pruning
        self.program = packed_program.program(self.original, pruning=pruning)
        self.set_packed_convolution(self.packed_convolution)
        self.__dict__.pop("_weight_makers", None)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """From now on convolutions and matrix products are computed in this dtype, all else as before; None: all alike."""
        self._end_compute_dtype()
        self.compute_dtype = dtype
        self._end_compute_dtype = mixed_precision.lower(self.module, dtype) if dtype else lambda: None

    def set_packed_convolution(self, how: str) -> None:
        """From now on a pack's convolutions are "grouped" ones or, where the model is a plain sequence, one batched "matmul" each."""
        self.packed_convolution = how
        matmul = how == "matmul" and not self.activation_pruning
        self._matmul_program = batched_matmul.by_products(self.original, self.compute_dtype) if matmul else None

    def program_for(self, device: torch.device) -> PackedProgram | None:
        """The program of stacked layers that computes the gradients of a pack on this device; None where there is none."""
        if self._matmul_program is not None:
            return self._matmul_program
        return self.program if self.compute_dtype is None and device.type == "cpu" else None

    # ---- channels

    @cached_property
    def traced(self) -> tuple[fx.Graph, tuple[Group, ...]]:
        """The module's graph and its channel groups; ValueError where there are none, or the graph was seen to be another network."""
        if self.not_traced:
            raise ValueError(f"the model has no gates: {self.not_traced}")
        return channel_groups.find_groups(self.original)

    @cached_property
    def _standardised(self) -> frozenset[str]:
        """Layers whose filters are."""
        return standardised_of(self.original)

    @cached_property
    def channels(self) -> Channels:
        """The channels that gates open and close; ValueError for a model without any."""
        return Channels(self.traced[1], self.shapes, self._standardised, halves_of(self.original))

    @property
    def selected(self) -> list[int]:
        """round(d C_l), the most channels that a dynamic gate leaves open for an image, for every group."""
        gates = gates_of(self.original)
        return [gates[group.gate].keep or group.size if group.gate else group.size for group in self.channels.groups]

    @cached_property
    def gated_module(self) -> fx.GraphModule:
        """The module with static gates, on the same layers; made while they are empty."""
        made, places = channel_groups.with_gates(self.module, *self.traced, lambda group: Gate(group, self.context))
        for mine, kind in ((self._slots, keys.WEIGHTS), (self._buffer_slots, keys.BUFFERS)):
            mine += [(where, slot, kind + name) for where, slot, name in places if kind + name in self.initial]
        return made

    def folded(self, tree: Tree) -> Tree:
        """The tree with every weight as its layer uses it in the place of the stored one: masked, standardised or normalised."""
        tree = self._with_standardised(self.masked(tree, tree), tree)
        ready = {}
        for name, over in self.normalised.items():
            weight, gain, mask = (tree.get(key) for key in (keys.weight(name), keys.gain(name), keys.mask(name)))
            ready[keys.weight(name)] = normalised(cast(Tensor, weight), cast(Tensor, gain), mask, over)
        return tree | ready

    def _with_standardised(self, weights: Tree, tree: Tree) -> Tree:
        """The weights with every filter of standardised layers ready for use, under the masks of the tree."""
        ready = {}
        for name in self._standardised:
            ready[keys.weight(name)] = standardised(weights[keys.weight(name)], tree.get(keys.removed(name)), tree.get(keys.mask(name)))
        return {key: ready.get(key, value) for key, value in weights.items()}

    # ---- masks

    def trained(self, tree: Tree) -> Tree:
        """The tree without its frozen weights."""
        return {key: value for key, value in tree.items() if key not in self.frozen} if self.frozen else tree

    def has_masks(self, tree: Tree) -> bool:
        """Whether the tree has a mask of any weight."""
        return any(mask in tree for mask in self._mask_keys.values())

    def masked(self, values: Tree, tree: Tree, done: Container[str] = ()) -> Tree:
        """Every value whose mask stands in the tree, times that mask; those in `done` have it already."""
        held = {key: tree[mask] for key, mask in self._mask_keys.items() if mask in tree and key not in done}
        return {key: masks.times(value, held[key]) if key in held else value for key, value in values.items()} if held else values

    def effective(self, tree: Tree) -> Tree:
        """The weights as the layers use them: mask · w."""
        return self.masked({key: tree[key] for key in self.weights}, tree)

    def weights_in_use(self, tree: Tree, sparse: Mapping[str, Pattern | KeptPositions]) -> Tree:
        """The weights that layers get: mask · w; of `sparse` layers the kept values (nnz,); stored if a layer masks them itself."""
        kept = {keys.weight(layer): pattern for layer, pattern in sparse.items()}
        values = {key: kept[key].values(tree[key]) if key in kept else tree[key] for key in self.weights}
        return self.masked(values, tree, kept.keys() | self.self_masked)

    def masks_of_layers(self, tree: Tree) -> Tree:
        """The masks of the tree that layers apply by themselves."""
        return {mask: tree[mask] for name in self.normalised if (mask := keys.mask(name)) in tree}

    # ---- kept weights alone

    def sparse(self, tree: Tree) -> dict[str, Pattern]:
        """The layers that run on their kept weights alone, by sparse kernels."""
        if self.pure or GATE in tree or not self._patterns.costs:
            return {}
        return self._patterns.of(lambda layer: tree.get(keys.mask(layer)))

    def kept_positions(self, tree: Tree, left: Collection[str]) -> dict[str, KeptPositions]:
        """The layers that get their kept values alone (and return these values' gradients) on dense kernels; those in `left` do not.

        They are those that make their weight anew anyway, where activations are pruned.
        """
        if self.pure or GATE in tree or self.activation_pruning is None:
            return {}
        layers = [layer for layer in self._weight_makers if layer not in left and keys.mask(layer) in tree]
        return self._patterns.positions({layer: tree[keys.mask(layer)] for layer in layers})

    @cached_property
    def _weight_makers(self) -> tuple[str, ...]:
        """Layers that can: those that prune their inputs, but for standardised ones, and those whose weights others use."""
        able = [layer for layer in self.module.modules() if getattr(layer, "may_prune", False) and hasattr(layer, "key")]
        conv_only = self.activation_pruning is not None and self.activation_pruning.layers == "conv"
        uses = Counter(key for _, _, key in self._slots)
        names = [str(layer.key) for layer in able if not (conv_only and isinstance(layer, nn.Linear))]
        return tuple(name for name in names if uses[keys.weight(name)] == 1)

    @contextmanager
    def on_kept_weights(self, patterns: dict[str, Pattern], positions: dict[str, KeptPositions] | None = None) -> Iterator[None]:
        """Calls inside run the layers of `patterns` by sparse kernels and give those of `positions` their kept values."""
        self.context.patterns, self.context.kept_positions = patterns, positions or {}
        try:
            yield
        finally:
            self.context.patterns, self.context.kept_positions = {}, {}

    # ---- calls

    def _empty(self) -> None:
        for where, slot, _ in (*self._slots, *self._buffer_slots):
            where[slot] = None

    @contextmanager
    def with_values(self, weights: Tree, tree: Tree, train: bool, real: Tensor | None, momentum: float | None = None) -> Iterator[Tree]:
        """Calls inside use these weights; gives the tree that new running statistics and other changed buffers are put into."""
        context = self.context
        context.tree, context.train, context.real, context.momentum, context.pure, context.buffers = (
            tree,
            train,
            real,
            momentum,
            self.pure,
            {},
        )
        context.activation_pruning, context.caches, context.penalties = self.activation_pruning if train else None, [], []
        context.gate_values = self.channels.split(tree[GATE_VALUES]) if GATE_VALUES in tree else {}
        if self.module.training is not train:
            self.module.train(train)
        try:
            for where, slot, key in self._slots:
                where[slot] = weights[key]
            held = slots.put(self._buffer_slots, tree, self.initial, context.images if self.pure else None)
            yield context.buffers
            if train and held:
                context.buffers |= slots.taken(self._buffer_slots, held)
        finally:
            self._empty()
            context.tree, context.real, context.caches, context.gate_values, context.images = {}, None, [], {}, None

    def forward(
        self,
        weights: Tree,
        tree: Tree,
        x: Tensor,
        train: bool,
        real: Tensor | None,
        momentum: float | None = None,
        tapped: Sequence[TappedLayer] = (),
        tap_inputs: Sequence[Tree] = (),
    ) -> tuple[Tensor, Tree]:
        """Logits, and new running statistics."""
        gate, self.context.images = tree.get(GATE), x
        if gate is None:
            taps = tapping(self.module, self._slots, tapped, tap_inputs)
            with self.with_values(weights, tree, train, real, momentum) as buffers, taps:
                return self.module(x), buffers
        whole = train and (self.activation_pruning or self.context.has_dropout)
        if gate.dtype == torch.bool and not (self.pure or tapped or self.has_dynamic_gates or whole):
            return self.forward_compact(weights, tree, self.channels.kept(gate), x, train, real, momentum)
        gates, module = self.channels.split(gate), self.module if self.has_dynamic_gates else self.gated_module
        taps = tapping(self.module, self._slots, tapped, tap_inputs)
        with self.with_values(weights, tree, train, real, momentum) as buffers, taps, self._with_gates(gates):
            logits = module(x)
        return logits, self.channels.stayed(buffers, tree, gates) if gate.dtype == torch.bool else buffers

    @contextmanager
    def _with_gates(self, gates: Tree) -> Iterator[None]:
        """Gates multiply; norms look through hard ones."""
        hard = next(iter(gates.values())).dtype == torch.bool
        self.context.gates = gates
        self.context.norm_gates = {norm: gates[group] for norm, group in self.channels.norms.items() if hard}
        try:
            yield
        finally:
            self.context.gates, self.context.norm_gates = {}, {}

    def forward_compact(
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
        """`forward` of the kept channels alone: the same layers with weights cut from the stored ones; those in `cut` are cut already.

        Normalised filters are not among those that are cut; their layers make them ready under their masks.
        """
        ready = self._with_standardised(under(tree, keys.BUFFERS) | weights, tree) | self.masks_of_layers(tree)
        small = ready | self.channels.cut({key: value for key, value in ready.items() if key not in cut}, kept)
        with self.with_values(small, small, train, real, momentum) as buffers, self._with_compact_layers(kept):
            logits = self.module(x)
        return logits, self.channels.spread(buffers, tree, kept)

    @contextmanager
    def _with_compact_layers(self, kept: Tree) -> Iterator[None]:
        """Depth-wise convolutions have so many channels, and standardised filters are ready for use."""
        layers: dict[Any, str] = {self.module.get_submodule(name): group for name, group in self.channels.depthwise.items()}
        before = {layer: layer.groups for layer in layers}
        self.context.compact = True
        try:
            for layer, group in layers.items():
                layer.groups = len(kept[group])
            yield
        finally:
            self.context.compact = False
            for layer, groups in before.items():
                layer.groups = groups

    def objective(self, loss: LossFunction, logits: Tensor, batch: Batch) -> Tensor:
        """The loss, and the penalties of the dynamic gates in the call just made."""
        penalties, self.context.penalties = self.context.penalties, []
        return sum(penalties, start=loss(logits, batch.y, batch.real))
