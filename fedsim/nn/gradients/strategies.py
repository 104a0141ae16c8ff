"""The ways to compute a gradient. `Net.gradient` takes the first one that fits the request.

CompactStrategy        a hard gate closes channels: the network of the open channels alone, and the gradient of its weights
PackedProgramStrategy  under `vmap`, a plain sequence of layers: one program for all clients of the pack
FuncStrategy           under `vmap`, every other network: torch.func
AutogradStrategy       one client: ordinary autograd; layers with a mask may run on their kept weights alone
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree
from fedsim.kernels.sparse.pattern import KeptPositions, Pattern
from fedsim.kernels.sparse.sgd import spread
from fedsim.nn import packed_program
from fedsim.nn.functional import FunctionalModule
from fedsim.nn.gradients.autograd import Differentiated, Forward, by_autograd, by_func
from fedsim.nn.gradients.compact import CompactGradient
from fedsim.nn.gradients.taps import TappedLayer
from fedsim.nn.loss import LossFunction, cross_entropy

if TYPE_CHECKING:
    from fedsim.core.types import Batch

TapCallback = Callable[[str, Tensor], Tree]  # of a layer's name and the dense gradient of its effective weight
GradientResult = tuple[Tensor, Tree, Tree, Tree]  # loss (), gradient, running statistics, taps
WRT = ("w", "gate")


@dataclass(frozen=True)
class GradientRequest:
    """The arguments of one `Net.gradient`."""

    tree: Tree
    batch: Batch
    wrt: tuple[str, ...]  # of WRT
    loss: LossFunction
    extra: Tree | None
    tap: TapCallback | None
    layers: Sequence[str]  # to tap
    compact: bool


def checked(wrt: str | tuple[str, ...] | None, tree: Tree) -> tuple[str, ...]:
    """`wrt` as a tuple; ValueError for a name that is none of WRT, or for a gate that the tree does not have."""
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt or ())
    if unknown := set(names) - set(WRT):
        raise ValueError(f"wrt = {wrt!r}: {unknown.pop()!r} is not one of {', '.join(WRT)}; None is for tapped layers alone")
    if "gate" in names and not (GATE in tree and tree[GATE].is_floating_point()):
        raise ValueError(f"wrt = {wrt!r}: the tree has no soft gate {GATE!r} to differentiate; a hard one has no gradient")
    return names


class GradientStrategy(Protocol):
    """One way to compute a gradient."""

    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool:
        """Whether this way gives what is asked for."""

    def run(self, net: FunctionalModule, request: GradientRequest) -> GradientResult:
        """Loss, gradient, running statistics, taps."""


class CompactStrategy:
    """On the network of the open channels, with respect to the part of each weight that it uses."""

    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool:
        if not request.compact or request.wrt != ("w",) or request.extra or request.layers:
            return False
        gate = request.tree.get(GATE)
        hard = gate is not None and gate.dtype == torch.bool
        whole = net.has_dynamic_gates or net.activation_pruning is not None or net.context.has_dropout
        return hard and not (net.pure or whole or net.has_masks(request.tree))

    def run(self, net: FunctionalModule, request: GradientRequest) -> GradientResult:
        tree, batch = request.tree, request.batch
        weights, kept = {key: tree[key] for key in net.weights}, net.channels.kept(tree[GATE])
        blocks = net.channels.blocks(weights, kept)

        def forward(leaves: Tree, _: list[Tree]) -> tuple[Tensor, Tree]:
            logits, buffers = net.forward_compact(small | leaves, tree, kept, batch.x, True, batch.real, None, blocks)
            return request.loss(logits, batch.y, batch.real), buffers

        small = weights | {key: block.cut(weights[key]) for key, block in blocks.items()}
        loss, gradient, _, buffers = by_autograd(forward, net.trained(small), [])
        return loss, CompactGradient(gradient, {key: block for key, block in blocks.items() if key not in net.frozen}), buffers, {}


class WholeStrategy(ABC):
    """Of whole weights: `differentiate` gives the gradients, then `extra` is added and masks are applied."""

    @abstractmethod
    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool: ...

    @abstractmethod
    def differentiate(self, net: FunctionalModule, request: GradientRequest, weights: Tree) -> GradientResult:
        """Of the `weights` in use; a layer on its kept weights alone has theirs (nnz,)."""

    def run(self, net: FunctionalModule, request: GradientRequest) -> GradientResult:
        tree, layers = request.tree, request.layers
        patterns = net.sparse(tree)
        positions = net.kept_positions(tree, {*patterns, *layers}) if "w" in request.wrt else {}
        sparse: dict[str, Pattern | KeptPositions] = {**patterns, **positions}
        with net.on_kept_weights(patterns, positions):
            weights = net.weights_in_use(tree, sparse)
            loss, gradient, buffers, taps = self.differentiate(net, request, weights)
        return loss, _completed(net, request, gradient, sparse), buffers, taps


class PackedProgramStrategy(WholeStrategy):
    """As one program of stacked layers, for all clients of a pack together."""

    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool:
        plain = request.wrt == ("w",) and request.loss is cross_entropy and GATE not in request.tree and not request.layers
        return net.pure and plain and net.program_for(request.batch.x.device) is not None

    def differentiate(self, net: FunctionalModule, request: GradientRequest, weights: Tree) -> GradientResult:
        program = net.program_for(request.batch.x.device)
        assert program is not None
        given = weights | net.masks_of_layers(request.tree)
        return *packed_program.gradient(program, given, request.batch, net.frozen), {}, {}


class FuncStrategy(WholeStrategy):
    """By torch.func, for calls under `vmap`."""

    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool:
        return net.pure

    def differentiate(self, net: FunctionalModule, request: GradientRequest, weights: Tree) -> GradientResult:
        return _differentiated(by_func, net, request, weights)


class AutogradStrategy(WholeStrategy):
    """By ordinary autograd, for one client."""

    def fits(self, net: FunctionalModule, request: GradientRequest) -> bool:
        return True

    def differentiate(self, net: FunctionalModule, request: GradientRequest, weights: Tree) -> GradientResult:
        differentiate = by_autograd
        if net.may_compute_again:
            differentiate = partial(by_autograd, backward=partial(_in_place_again, net, request, weights))
        return _differentiated(differentiate, net, request, weights)


STRATEGIES: tuple[GradientStrategy, ...] = (CompactStrategy(), PackedProgramStrategy(), FuncStrategy(), AutogradStrategy())


def _completed(net: FunctionalModule, request: GradientRequest, gradient: Tree, sparse: Mapping[str, Pattern | KeptPositions]) -> Tree:
    """The gradient in the shapes of the weights, with `extra`, masked. Those of sparse and of self-masked layers are masked already."""
    spread_out = {key: spread(kept, gradient[key]) for layer, kept in sparse.items() if (key := keys.weight(layer)) in gradient}
    gradient = gradient | spread_out
    extra = request.extra or {}
    if extra:
        gradient = {key: g + extra[key] if key in extra else g for key, g in gradient.items()}
    return net.masked(gradient, request.tree, (spread_out.keys() | net.self_masked) - extra.keys())


def _differentiated(
    differentiate: Callable[[Forward, Tree, list[Tree]], Differentiated], net: FunctionalModule, request: GradientRequest, weights: Tree
) -> GradientResult:
    tree, batch = request.tree, request.batch
    tapped = [_tapped_layer(net, tree, layer, request.tap, "w" in request.wrt) for layer in request.layers] if request.tap else []
    at = (net.trained(weights) if "w" in request.wrt else {}) | ({GATE: tree[GATE]} if "gate" in request.wrt else {})

    def forward(leaves: Tree, tap_inputs: list[Tree]) -> tuple[Tensor, Tree]:
        logits, buffers = net.forward({**weights, **leaves}, {**tree, **leaves}, batch.x, True, batch.real, None, tapped, tap_inputs)
        return net.objective(request.loss, logits, batch), buffers

    loss, gradient, tap_gradients, buffers = differentiate(forward, at, [layer.tap_inputs for layer in tapped])
    taps = {name: value for layer, found in zip(tapped, tap_gradients, strict=True) for name, value in layer.value(found).items()}
    return loss, gradient, buffers, taps


@contextmanager
def _in_place_again(net: FunctionalModule, request: GradientRequest, weights: Tree, leaves: Tree, buffers: Tree) -> Iterator[None]:
    """The values of the forward pass, for parts of it that the backward pass computes again (torch.utils.checkpoint).

    Norms in such a part move their statistics a second time, as torch's own do.
    """
    net.context.images = request.batch.x
    tree = {**request.tree, **leaves, **buffers}
    with net.with_values({**weights, **leaves}, tree, True, request.batch.real) as moved, net.context.computing_again():
        yield
    buffers |= moved


def _tapped_layer(net: FunctionalModule, tree: Tree, layer: str, tap: TapCallback, pass_on: bool) -> TappedLayer:
    key = keys.weight(layer)
    if key not in net.weights:
        names = ", ".join(keys.layer_of(key) for key in net.weights if key.endswith(".weight"))
        raise ValueError(f"no layer {layer!r} to tap; the net has {names}")
    callback = partial(tap, layer)
    return TappedLayer(key, callback, callback(torch.zeros_like(tree[key])), pass_on)
