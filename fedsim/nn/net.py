"""Net: a torch module as a pure function of a tree, and the only place that differentiates the simulated network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys, masks
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, each, under
from fedsim.kernels.sparse.pattern import KeptPositions, Pattern
from fedsim.kernels.sparse.sgd import spread
from fedsim.nn import optim, packed_program
from fedsim.nn.autograd import by_autograd, by_func
from fedsim.nn.channels import filled
from fedsim.nn.compact_gradient import Narrow
from fedsim.nn.functional import FunctionalModule
from fedsim.nn.gradient_taps import TappedLayer
from fedsim.nn.profiler import per_channel

if TYPE_CHECKING:
    from fedsim.core.types import Batch


Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Tap = Callable[[str, Tensor], Tree]
WRT = ("w", "gate")


def cross_entropy(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy over the real images; logits (B, classes), y (B,), real (B,) or None."""
    if real is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()


class Net(FunctionalModule):
    """A module without values: they come from the tree of each call.

    Keys: "w/NAME" for every parameter, "buf/NAME" for the running statistics of norms. `initial` holds the module's own values,
    `sizes` the weights of its conv and linear layers, in state_dict order: all layers but the first may be pruned (`maskable`).
    Net leaves the module it is given as it was.

    Where the tree has a gate, "gate/channels" (n,) over all its `channels`, it is multiplied in. A hard one (bool) runs physically
    smaller, under `vmap` masked: the same but for rounding. `kept`: what a cut net has left of the first one's channels.

    Where the tree has masks and `use` has told what layers cost, those that keep few weights run on these alone.
    """

    def __init__(self, module: nn.Module, kept: Tree | None = None) -> None:
        super().__init__(module)
        self.weights = tuple(key for key in self.initial if key.startswith(keys.WEIGHTS))
        self.sizes = {name: self.initial[keys.weight(name)].numel() for name in self.shapes}
        self._mask_keys = {key: keys.mask_of(key) for key in self.weights}
        self._masking = {keys.weight(name) for name in self.normalised}  # their layers mask them, and their gradients
        self.kept: Tree = kept or {}
        self._cuts: list[Net] = []

    @property
    def maskable(self) -> tuple[str, ...]:
        """The conv and linear layers that methods prune: all but the first."""
        return tuple(self.sizes)[1:]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Net:
        """The same net with its initial values and constants on another device."""
        moved = copy.copy(self)
        moved.initial = each(lambda value: value.to(device, dtype), self.initial)
        moved._cuts = []
        moved.module.to(device, dtype)
        return moved

    def under_vmap(self) -> Net:
        """The same net for calls under a torch.func transform: nothing is overwritten, gradients come from torch.func."""
        twin = copy.copy(self)
        twin.pure = True
        return twin

    def whole(self) -> Net:
        """The same net whose layers keep their whole inputs for the backward pass."""
        twin = copy.copy(self)
        twin.keep, twin._program = None, packed_program.program(self._given)
        return twin

    # ---- channels

    def used(self, tree: Tree) -> dict[str, int]:
        """Weights in use of every layer that a mask, a hard gate or an earlier cut makes smaller, by layer."""
        gate, held = tree.get(GATE), under(tree, keys.MASKS)
        if gate is not None and not gate.is_floating_point():
            kept = self.channels.kept(gate)
            whole, held = self.channels.used(self.channels.open(gate[None])[0]), self.channels.cut(held, kept)
        else:
            whole = self.channels.used(self.channels.widths) if self.kept else {}
        gone = {group.gate: 0 for group in self.channels.groups} if GATE_VALUES in tree else {}
        return whole | {key.removesuffix(".weight"): count for key, count in masks.ones(held).items()} | gone

    def per_channel(self, shape: tuple[int, ...]) -> list[int]:
        """Bytes saved for backward per image of `shape` and open channel, for each group."""
        owners = {node: group.name for group in self.channels.groups for node in group.nodes}
        found = per_channel(self._given, shape, self._traced[0], owners, self.keep)
        return [found[group.name] for group in self.channels.groups]

    def cut(self, kept: Tree) -> Net:
        """A physically smaller net of the kept channels (group -> positions, of this net's), its initial values cut as well.

        Asked again for the same channels it gives the same net.
        """
        self.channels.kept(self.channels.gate(kept))  # at least one in every group
        kept = {name: index.cpu() for name, index in kept.items()}
        whole = {name: self.kept[name][index] if self.kept else index for name, index in kept.items()}
        for small in self._cuts:
            if all(torch.equal(small.kept[name], index) for name, index in whole.items()):
                return small
        like = next(iter(self.initial.values()))
        self._cuts[:] = [Net(self.channels.narrowed(self._given, kept), whole).to(like.device, like.dtype)]
        self._cuts[0].set_compute_dtype(self.low)
        self._cuts[0].set_packed_convolution(self.packed_convolution)
        self._cuts[0].set_activation_pruning(self.keep)
        return self._cuts[0]

    def narrow(self, tree: Tree, kept: Tree, removed: bool = True) -> Tree:
        """The values of a tree for the cut net. Standardised filters go on counting what they lose, unless not `removed`."""
        return self.channels.cut(tree, kept) | (self.channels.lost(tree, kept) if removed else {})

    def plain(self, tree: Tree) -> nn.Module:
        """The values of a tree as a torch module in evaluation mode, standardised filters as those of ordinary convolutions."""
        return filled(self._given, self.folded(tree))

    # ---- calls

    def _narrowed(self, tree: Tree, batch: Batch, loss: Loss) -> tuple[Tensor, Narrow, Tree, Tree]:
        """`gradient` under a hard gate, with respect to what is cut from the stored weights."""
        weights, kept = {key: tree[key] for key in self.weights}, self.channels.kept(tree[GATE])
        blocks = self.channels.blocks(weights, kept)

        def forward(leaves: Tree, _: list[Tree]) -> tuple[Tensor, Tree]:
            logits, buffers = self._compact(leaves, tree, kept, batch.x, True, batch.real, None, blocks)
            return loss(logits, batch.y, batch.real), buffers

        leaves = weights | {key: block.cut(weights[key]) for key, block in blocks.items()}
        value, found, _, buffers = by_autograd(forward, leaves, [])
        return value, Narrow(found, blocks), buffers, {}

    def _narrows(self, tree: Tree) -> bool:
        """Whether the tree's gate leaves a smaller network without masks."""
        gate = tree.get(GATE)
        return (
            gate is not None
            and gate.dtype == torch.bool
            and not (self.pure or self.has_dynamic_gates)
            and self.keep is None
            and not any(mask in tree for mask in self._mask_keys.values())
        )

    def _in_use(self, tree: Tree, patterns: Mapping[str, Pattern | KeptPositions]) -> Tree:
        """The weights that layers are given: effective; with a pattern the kept values (nnz,); stored, where a layer masks them itself."""
        kept = {keys.weight(layer): pattern for layer, pattern in patterns.items()}
        values = {key: kept[key].values(tree[key]) if key in kept else tree[key] for key in self.weights}
        return self._masked(values, tree, kept.keys() | self._masking)

    def _masked(self, values: Tree, tree: Tree, done: Container[str] = ()) -> Tree:
        """Every value whose mask stands in the tree, times that mask; those in `done` have it already."""
        held = {key: tree[mask] for key, mask in self._mask_keys.items() if mask in tree and key not in done}
        return {key: value * held[key] if key in held else value for key, value in values.items()} if held else values

    def effective(self, tree: Tree) -> Tree:
        """The weights as the layers use them: mask · w."""
        return self._masked({key: tree[key] for key in self.weights}, tree)

    def __call__(
        self, tree: Tree, x: Tensor, train: bool = False, real: Tensor | None = None, momentum: float | None = None
    ) -> tuple[Tensor, Tree]:
        """(logits (B, classes), new running statistics) of x (B, C, H, W); the tree stays as it is.

        momentum: of the running statistics, in place of each norm's own.
        """
        patterns = self.sparse(tree)
        with self._innermost(patterns):
            return self._forward(self._in_use(tree, patterns), tree, x, train, real, momentum)

    def energy(self, tree: Tree, x: Tensor, real: Tensor | None = None, power: int = 2) -> Tensor:
        """(n,) sum over images and positions of every channel's |activation|^power, in evaluation mode."""
        module, self._call.energy, self._call.power = self._gated, {}, power
        try:
            with self._filled(self.effective(tree), tree, False, real):
                module(x)
            return torch.cat([self._call.energy[group.name] for group in self.channels.groups])
        finally:
            self._call.energy = None

    def saliency(self, tree: Tree, x: Tensor) -> Tensor:
        """(B, n) what the gates of every image are, in evaluation mode, of a net whose gates see it."""
        self._call.saliency = {}
        try:
            self(tree, x)
            return torch.cat([self._call.saliency[group.name] for group in self.channels.groups], -1)
        finally:
            self._call.saliency = None

    def _objective(self, loss: Loss, logits: Tensor, batch: Batch) -> Tensor:
        """The loss, and what the gates of the call just made add to it."""
        penalties, self._call.penalties = self._call.penalties, []
        return sum(penalties, start=loss(logits, batch.y, batch.real))

    def gradient(
        self,
        tree: Tree,
        batch: Batch,
        wrt: str | tuple[str, ...] | None = "w",
        loss: Loss = cross_entropy,
        extra: Tree | None = None,
        tap: Tap | None = None,
        layers: Sequence[str] = (),
        narrow: bool = False,
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """(mean loss, gradient, running statistics, taps) of one batch in training mode.

        wrt="w": the masked gradient of every weight, plus `extra` (masked too), under "w/"; "gate": that of the tree's soft gate,
        under its key, summed over all places where a channel is gated; ("w", "gate"): both; None: nothing but what is tapped.
        tap(layer, g) is called for each name in `layers` with the dense gradient g of its effective weight, as soon as it exists;
        what it returns is collected in taps. With wrt=None g is freed before the next layer's gradient is formed.
        narrow: under a hard gate the gradient may be a Narrow one, for `descend` alone.
        """
        wanted = (wrt,) if isinstance(wrt, str) else wrt or ()
        if unknown := set(wanted) - set(WRT):
            raise ValueError(f"wrt = {wrt!r}: {unknown.pop()!r} is none of {', '.join(WRT)}; None differentiates the tapped layers alone")
        if "gate" in wanted and not (GATE in tree and tree[GATE].is_floating_point()):
            raise ValueError(f"wrt = {wrt!r}: the tree has no soft gate {GATE!r} to differentiate; a hard one has no gradient")
        layers = layers if tap else ()
        if narrow and wanted == ("w",) and not (extra or layers) and self._narrows(tree):
            return self._narrowed(tree, batch, loss)
        patterns = self.sparse(tree, layers)
        thin = self.thin(tree, {*patterns, *layers}) if "w" in wanted else {}
        alone = patterns | thin
        with self._innermost(patterns, thin):
            value, dense, buffers, taps = self._differentiated(tree, batch, wanted, loss, tap, layers, alone)
        done = {key: kept for layer, kept in alone.items() if (key := keys.weight(layer)) in dense}
        dense |= {key: spread(pattern, dense[key]) for key, pattern in done.items()}
        if extra:
            dense = {key: g + extra[key] if key in extra else g for key, g in dense.items()}
        return value, self._masked(dense, tree, (done.keys() | self._masking) - (extra or {}).keys()), buffers, taps

    def _differentiated(
        self,
        tree: Tree,
        batch: Batch,
        wanted: Sequence[str],
        loss: Loss,
        tap: Tap | None,
        layers: Sequence[str],
        patterns: Mapping[str, Pattern | KeptPositions],
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """Loss, the gradient of what is `wanted` (dense, but for layers with a pattern), running statistics, taps."""
        weights = self._in_use(tree, patterns)
        if self._stacks(tree, batch, wanted, loss) and not layers:
            held = {key: tree[key] for mask in self._masking if (key := keys.mask_of(mask)) in tree}
            return (
                *packed_program.gradient(cast(packed_program.PackedProgram, self._product or self._program), weights | held, batch),
                {},
                {},
            )
        tapped = [self._tapped_layer(weights, layer, tap, "w" in wanted) for layer in layers] if tap else []
        at = (weights if "w" in wanted else {}) | ({GATE: tree[GATE]} if "gate" in wanted else {})

        def forward(leaves: Tree, probes: list[Tree]) -> tuple[Tensor, Tree]:
            logits, buffers = self._forward({**weights, **leaves}, {**tree, **leaves}, batch.x, True, batch.real, None, tapped, probes)
            return self._objective(loss, logits, batch), buffers

        find = by_func if self.pure else by_autograd
        value, dense, seen, buffers = find(forward, at, [layer.probes for layer in tapped])
        taps = {name: value for layer, found in zip(tapped, seen, strict=True) for name, value in layer.value(found).items()}
        return value, dense, buffers, taps

    def _stacks(self, tree: Tree, batch: Batch, wanted: Sequence[str], loss: Loss) -> bool:
        """Whether a pack's gradients are those of one program of stacked layers."""
        plain = tuple(wanted) == ("w",) and loss is cross_entropy and GATE not in tree
        grouped = self._program is not None and self.low is None and batch.x.device.type == "cpu"
        return self.pure and plain and (grouped or self._product is not None)

    def _tapped_layer(self, weights: Tree, layer: str, tap: Tap, passed: bool) -> TappedLayer:
        key = keys.weight(layer)
        if key not in weights:
            names = ", ".join(keys.layer_of(key) for key in self.weights if key.endswith(".weight"))
            raise ValueError(f"no layer {layer!r} to tap; the net has {names}")
        see = partial(tap, layer)
        return TappedLayer(key, see, see(torch.zeros_like(weights[key])), passed)

    def descend(
        self, state: Tree, gradient: Tree, lr: float | Tensor, momentum: float = 0.0, decay: float = 0.0, optimiser: str = "sgd"
    ) -> Tree:
        """`state` after one step of torch.optim.SGD or Adam along the (masked) `gradient`; overwrites "w/" and "opt/" in it.

        Pruned weights stay exactly 0: their gradient is 0, and so are the weight that decays and the momentum that moves.
        """
        if optimiser == "adam":
            gradient = gradient.whole(state) if isinstance(gradient, Narrow) else gradient
            return optim.adam(state, gradient, lr, decay)
        return optim.sgd(state, gradient, lr, momentum, decay, self.pure)

    def hessian_vector(self, tree: Tree, batch: Batch, vector: Tree, loss: Loss = cross_entropy) -> Tree:
        """H · vector of the masked loss, for the keys of `vector`, by differentiating twice; running statistics are left alone."""
        if not self.pure or self.keep is not None:
            return self.whole().under_vmap().hessian_vector(tree, batch, vector, loss)
        weights = self._in_use(tree, {})

        def gradient(leaves: Tree) -> Tree:
            def forward(inner: Tree) -> Tensor:
                logits, _ = self._forward({**weights, **inner}, tree, batch.x, True, batch.real)
                return self._objective(loss, logits, batch)

            return torch.func.grad(forward)(leaves)

        back = torch.func.vjp(gradient, {key: weights[key] for key in vector})[1]
        return self._masked(back(self._masked(vector, tree))[0], tree)
