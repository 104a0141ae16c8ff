"""Net: a torch module as a pure function of a tree, and the only place that differentiates the simulated network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedsim import descent, masks, norms, trace
from fedsim.autodiff import by_autograd, by_func
from fedsim.channels import Channels, filled, standardised_of
from fedsim.gates import GATES
from fedsim.models.anatomy import WEIGHTED, per_channel
from fedsim.models.layers import standardised
from fedsim.taps import Slots, TappedLayer, tapping, tied
from fedsim.trace import Group
from fedsim.tree import Tree, each, under

if TYPE_CHECKING:
    from fedsim.core import Batch

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Tap = Callable[[str, Tensor], Tree]
WRT = ("w", "gate")


def cross_entropy(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy over the real images; logits (B, classes), y (B,), real (B,) or None."""
    if real is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()


class Net:
    """A module without values: they come from the tree of each call.

    Keys: "w/NAME" for every parameter, "buf/NAME" for the running statistics of norms. `initial` holds the module's own values,
    `sizes` the weights of its conv and linear layers, in state_dict order: all layers but the first may be pruned (`maskable`).
    Net leaves the module it is given as it was.

    Where the tree has a gate, "gate/channels" (n,) over all its `channels`, it is multiplied in. A hard one (bool) runs physically
    smaller, under `vmap` masked: the same but for rounding. `kept`: what a cut net has left of the first one's channels.
    """

    def __init__(self, module: nn.Module, kept: Tree | None = None) -> None:
        self._call = norms.Call()
        self._given = copy.deepcopy(module).train()
        self.initial: Tree = {"w/" + name: value.detach() for name, value in self._given.named_parameters()}
        for name, value in self._given.named_buffers():
            if value.is_floating_point():
                self.initial["buf/" + name] = value.detach()
        self.module = copy.deepcopy(self._given)
        norms.swap(self.module, self._call)
        slots = self.module.named_modules(remove_duplicate=False)
        self._slots: Slots = [
            (layer._parameters, slot, f"{name}.{slot}".lstrip(".")) for name, layer in slots for slot in layer._parameters
        ]
        self._slots = tied([(where, slot, "w/" + name) for where, slot, name in self._slots if where[slot] is not None])
        self.weights = tuple(key for key in self.initial if key.startswith("w/"))
        weighted = [name for name, layer in self.module.named_modules() if isinstance(layer, (*WEIGHTED, norms.Standardised))]
        self.shapes = {name: tuple(self.initial[f"w/{name}.weight"].shape) for name in weighted if f"w/{name}.weight" in self.weights}
        self.sizes = {name: self.initial[f"w/{name}.weight"].numel() for name in self.shapes}
        self._mask_keys = {key: masks.key_of(key) for key in self.weights}
        self.kept: Tree = kept or {}
        self._cuts: list[Net] = []
        self.pure = False
        self._training = True
        self._empty()

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

    # ---- channels

    @cached_property
    def _traced(self) -> tuple[fx.Graph, tuple[Group, ...]]:
        return trace.found(self._given)

    @cached_property
    def _standardised(self) -> frozenset[str]:
        """Layers whose filters are."""
        return standardised_of(self._given)

    @cached_property
    def channels(self) -> Channels:
        """The channels that gates open and close; ValueError for a model without any."""
        return Channels(self._traced[1], self.shapes, self._standardised)

    @cached_property
    def _gated(self) -> fx.GraphModule:
        """The module with its gates, on the same layers; made while they are empty."""
        made, places = trace.gated(self.module, *self._traced, lambda group: norms.Gate(group, self._call))
        self._slots += [(where, slot, "w/" + name) for where, slot, name in places if f"w/{name}" in self.initial]
        return made

    def used(self, tree: Tree) -> dict[str, int]:
        """Weights in use of every layer that a mask, a hard gate or an earlier cut makes smaller, by layer."""
        gate, held = tree.get(GATES), under(tree, "mask/")
        if gate is not None and not gate.is_floating_point():
            kept = self.channels.kept(gate)
            whole, held = self.channels.used(self.channels.open(gate[None])[0]), self.channels.cut(held, kept)
        else:
            whole = self.channels.used(self.channels.widths) if self.kept else {}
        return whole | {key.removesuffix(".weight"): count for key, count in masks.ones(held).items()}

    def per_channel(self, shape: tuple[int, ...]) -> list[int]:
        """Bytes saved for backward per image of `shape` and open channel, for each group."""
        owners = {node: group.name for group in self.channels.groups for node in group.nodes}
        found = per_channel(self._given, shape, self._traced[0], owners)
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
        return self._cuts[0]

    def narrow(self, tree: Tree, kept: Tree, removed: bool = True) -> Tree:
        """The values of a tree for the cut net. Standardised filters go on counting what they lose, unless not `removed`."""
        return self.channels.cut(tree, kept) | (self.channels.lost(tree, kept) if removed else {})

    def folded(self, tree: Tree) -> Tree:
        """The tree with every standardised filter ready for use in the place of the stored one."""
        ready = {f"w/{name}.weight": standardised(tree[f"w/{name}.weight"], tree.get(f"buf/{name}.removed")) for name in self._standardised}
        return {key: ready.get(key, value) for key, value in tree.items()}

    def plain(self, tree: Tree) -> nn.Module:
        """The values of a tree as a torch module in evaluation mode, standardised filters as those of ordinary convolutions."""
        return filled(self._given, self.folded(tree))

    # ---- calls

    def _empty(self) -> None:
        for where, slot, _ in self._slots:
            where[slot] = None

    @contextmanager
    def _filled(self, weights: Tree, tree: Tree, train: bool, real: Tensor | None, momentum: float | None = None) -> Iterator[Tree]:
        call = self._call
        call.tree, call.train, call.real, call.momentum, call.pure, call.buffers = tree, train, real, momentum, self.pure, {}
        if train is not self._training:
            self.module.train(train)
            self._training = train
        try:
            for where, slot, key in self._slots:
                where[slot] = weights[key]
            yield call.buffers
        finally:
            self._empty()
            call.tree, call.real = {}, None

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
        gate = tree.get(GATES)
        if gate is None:
            with self._filled(weights, tree, train, real, momentum) as buffers, tapping(self.module, self._slots, tapped, probes):
                return self.module(x), buffers
        if gate.dtype == torch.bool and not self.pure and not tapped:
            return self._compact(weights, tree, x, train, real, momentum)
        gates, module = self.channels.split(gate), self._gated
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
        self, weights: Tree, tree: Tree, x: Tensor, train: bool, real: Tensor | None, momentum: float | None
    ) -> tuple[Tensor, Tree]:
        """The kept channels alone: the same layers, filled with what is cut from the stored weights."""
        kept = self.channels.kept(tree[GATES])
        small = self.channels.cut(self.folded(under(tree, "buf/") | weights), kept)
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

    def _masked(self, values: Tree, tree: Tree) -> Tree:
        """Every value whose mask stands in the tree, times that mask."""
        held = {key: tree[mask] for key, mask in self._mask_keys.items() if mask in tree}
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
        return self._forward(self.effective(tree), tree, x, train, real, momentum)

    def energy(self, tree: Tree, x: Tensor, real: Tensor | None = None, power: int = 2) -> Tensor:
        """(n,) sum over images and positions of every channel's |activation|^power, in evaluation mode."""
        module, self._call.energy, self._call.power = self._gated, {}, power
        try:
            with self._filled(self.effective(tree), tree, False, real):
                module(x)
            return torch.cat([self._call.energy[group.name] for group in self.channels.groups])
        finally:
            self._call.energy = None

    def gradient(
        self,
        tree: Tree,
        batch: Batch,
        wrt: str | tuple[str, ...] | None = "w",
        loss: Loss = cross_entropy,
        extra: Tree | None = None,
        tap: Tap | None = None,
        layers: Sequence[str] = (),
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """(mean loss, gradient, running statistics, taps) of one batch in training mode.

        wrt="w": the masked gradient of every weight, plus `extra` (masked too), under "w/"; "gate": that of the tree's soft gate,
        under its key, summed over all places where a channel is gated; ("w", "gate"): both; None: nothing but what is tapped.
        tap(layer, g) is called for each name in `layers` with the dense gradient g of its effective weight, as soon as it exists;
        what it returns is collected in taps. With wrt=None g is freed before the next layer's gradient is formed.
        """
        wanted = (wrt,) if isinstance(wrt, str) else wrt or ()
        if unknown := set(wanted) - set(WRT):
            raise ValueError(f"wrt = {wrt!r}: {unknown.pop()!r} is none of {', '.join(WRT)}; None differentiates the tapped layers alone")
        if "gate" in wanted and not (GATES in tree and tree[GATES].is_floating_point()):
            raise ValueError(f"wrt = {wrt!r}: the tree has no soft gate {GATES!r} to differentiate; a hard one has no gradient")
        value, dense, buffers, taps = self._differentiated(tree, batch, wanted, loss, tap, layers if tap else ())
        if extra:
            dense = {key: g + extra[key] if key in extra else g for key, g in dense.items()}
        return value, self._masked(dense, tree), buffers, taps

    def _differentiated(
        self, tree: Tree, batch: Batch, wanted: Sequence[str], loss: Loss, tap: Tap | None, layers: Sequence[str]
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """Loss, the dense gradient of what is `wanted`, running statistics, taps."""
        weights = self.effective(tree)
        tapped = [self._tapped_layer(weights, layer, tap, "w" in wanted) for layer in layers] if tap else []
        at = (weights if "w" in wanted else {}) | ({GATES: tree[GATES]} if "gate" in wanted else {})

        def forward(leaves: Tree, probes: list[Tree]) -> tuple[Tensor, Tree]:
            logits, buffers = self._forward({**weights, **leaves}, {**tree, **leaves}, batch.x, True, batch.real, None, tapped, probes)
            return loss(logits, batch.y, batch.real), buffers

        find = by_func if self.pure else by_autograd
        value, dense, seen, buffers = find(forward, at, [layer.probes for layer in tapped])
        taps = {name: value for layer, found in zip(tapped, seen, strict=True) for name, value in layer.value(found).items()}
        return value, dense, buffers, taps

    def _tapped_layer(self, weights: Tree, layer: str, tap: Tap, passed: bool) -> TappedLayer:
        key = f"w/{layer}.weight"
        if key not in weights:
            names = ", ".join(key[2:].removesuffix(".weight") for key in self.weights if key.endswith(".weight"))
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
            return descent.adam(state, gradient, lr, decay)
        return descent.sgd(state, gradient, lr, momentum, decay, self.pure)

    def hessian_vector(self, tree: Tree, batch: Batch, vector: Tree, loss: Loss = cross_entropy) -> Tree:
        """H · vector of the masked loss, for the keys of `vector`, by differentiating twice; running statistics are left alone."""
        if not self.pure:
            return self.under_vmap().hessian_vector(tree, batch, vector, loss)
        weights = self.effective(tree)

        def gradient(leaves: Tree) -> Tree:
            def forward(inner: Tree) -> Tensor:
                logits, _ = self._forward({**weights, **inner}, tree, batch.x, True, batch.real)
                return loss(logits, batch.y, batch.real)

            return torch.func.grad(forward)(leaves)

        back = torch.func.vjp(gradient, {key: weights[key] for key in vector})[1]
        return self._masked(back(self._masked(vector, tree))[0], tree)
