"""Net: a torch module as a pure function of a tree, and the only place that differentiates the simulated network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import descent, masks, norms
from fedsim.models.anatomy import WEIGHTED
from fedsim.tree import Tree, each

if TYPE_CHECKING:
    from fedsim.core import Batch

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Tap = Callable[[str, Tensor], Tree]
Forward = Callable[[Tree, list[Tree]], tuple[Tensor, Tree]]  # of leaves and probes: loss, running statistics
Found = tuple[Tensor, Tree, list[Tree], Tree]  # loss, gradients of leaves, of probes, running statistics


def cross_entropy(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy over the real images; logits (B, classes), y (B,), real (B,) or None."""
    if real is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()


class _HandOver(torch.autograd.Function):
    """The identity. In backward the dense gradient is handed to `tap` as soon as it exists, and passed on only if it is wanted.

    What the tap returns is the gradient of its probes: so it comes back as a value of the call, under `vmap` too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, tap: Callable[[Tensor], Tree], wanted: bool, *probes: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.tap, ctx.wanted, *probes = inputs
        ctx.dtypes = [probe.dtype for probe in probes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.tap(gradient.detach())
        values = [value.to(dtype) for value, dtype in zip(found.values(), ctx.dtypes, strict=True)]
        return gradient if ctx.wanted else None, None, None, *values


@dataclass
class _TappedLayer:
    """A layer whose dense gradient is looked at while it exists."""

    key: str  # of its weight
    see: Callable[[Tensor], Tree]
    like: Tree  # what `see` returns
    passed: bool  # whether the gradient is wanted besides

    @property
    def probes(self) -> Tree:
        """Zeros whose gradients are what `see` returns; a float64 holds every position exactly."""
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.like.items()}

    def value(self, gradients: Tree) -> Tree:
        return {name: gradients[name].to(value.dtype) for name, value in self.like.items()}


class Net:
    """A module without values: they come from the tree of each call.

    Keys: "w/NAME" for every parameter, "buf/NAME" for the running statistics of norms. `initial` holds the module's own values,
    `sizes` the weights of its conv and linear layers, in state_dict order: all layers but the first may be pruned (`maskable`).
    Net leaves the module it is given as it was.
    """

    def __init__(self, module: nn.Module) -> None:
        self._call = norms.Call()
        self.module = copy.deepcopy(module).train()
        self.initial: Tree = {"w/" + name: value.detach().clone() for name, value in self.module.named_parameters()}
        for name, value in self.module.named_buffers():
            if value.is_floating_point():
                self.initial["buf/" + name] = value.detach().clone()
        norms.swap(self.module, self._call)
        slots = self.module.named_modules(remove_duplicate=False)
        self._slots = [(layer._parameters, slot, f"{name}.{slot}".lstrip(".")) for name, layer in slots for slot in layer._parameters]
        self._slots = [(where, slot, "w/" + name) for where, slot, name in self._slots if where[slot] is not None]
        self._tie()
        self.weights = tuple(key for key in self.initial if key.startswith("w/"))
        weighted = [name for name, layer in self.module.named_modules() if isinstance(layer, WEIGHTED)]
        self.sizes = {name: self.initial[f"w/{name}.weight"].numel() for name in weighted if f"w/{name}.weight" in self.weights}
        self._mask_keys = {key: masks.key_of(key) for key in self.weights}
        self.pure = False
        self._training = True
        self._empty()

    def _tie(self) -> None:
        """A parameter that stands at two places has one key."""
        first: dict[int, str] = {}
        for where, slot, key in self._slots:
            first.setdefault(id(where[slot]), key)
        self._slots = [(where, slot, first[id(where[slot])]) for where, slot, key in self._slots]

    @property
    def maskable(self) -> tuple[str, ...]:
        """The conv and linear layers that methods prune: all but the first."""
        return tuple(self.sizes)[1:]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Net:
        """The same net with its initial values and constants on another device."""
        moved = copy.copy(self)
        moved.initial = each(lambda value: value.to(device, dtype), self.initial)
        moved.module.to(device, dtype)
        return moved

    def under_vmap(self) -> Net:
        """The same net for calls under a torch.func transform: nothing is overwritten, gradients come from torch.func."""
        twin = copy.copy(self)
        twin.pure = True
        return twin

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
        with self._filled(self.effective(tree), tree, train, real, momentum) as buffers:
            return self.module(x), buffers

    def gradient(
        self,
        tree: Tree,
        batch: Batch,
        wrt: str | None = "w",
        loss: Loss = cross_entropy,
        extra: Tree | None = None,
        tap: Tap | None = None,
        layers: Sequence[str] = (),
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """(mean loss, gradient, running statistics, taps) of one batch in training mode.

        wrt="w": the masked gradient of every weight, plus `extra` (masked too), under "w/"; None: nothing but what is tapped.
        tap(layer, g) is called for each name in `layers` with the dense gradient g of its effective weight, as soon as it exists;
        what it returns is collected in taps. With wrt=None g is freed before the next layer's gradient is formed.
        """
        if wrt not in ("w", None):
            raise ValueError(f"wrt = {wrt!r}: this net has no gates; differentiate 'w', or None for the tapped layers alone")
        value, dense, buffers, taps = self._differentiated(tree, batch, wrt == "w", loss, tap, layers if tap else ())
        if extra:
            dense = {key: g + extra[key] if key in extra else g for key, g in dense.items()}
        return value, self._masked(dense, tree), buffers, taps

    def _differentiated(
        self, tree: Tree, batch: Batch, wanted: bool, loss: Loss, tap: Tap | None, layers: Sequence[str]
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """Loss, the dense gradient of every weight where it is `wanted`, running statistics, taps."""
        weights = self.effective(tree)
        tapped = [self._tapped_layer(weights, layer, tap, wanted) for layer in layers] if tap else []

        def forward(leaves: Tree, probes: list[Tree]) -> tuple[Tensor, Tree]:
            with self._filled({**weights, **leaves}, tree, True, batch.real) as buffers, self._tapping(tapped, probes):
                return loss(self.module(batch.x), batch.y, batch.real), buffers

        find = _by_func if self.pure else _by_autograd
        value, dense, seen, buffers = find(forward, weights if wanted else {}, [layer.probes for layer in tapped])
        taps = {name: value for layer, found in zip(tapped, seen, strict=True) for name, value in layer.value(found).items()}
        return value, dense, buffers, taps

    def _tapped_layer(self, weights: Tree, layer: str, tap: Tap, passed: bool) -> _TappedLayer:
        key = f"w/{layer}.weight"
        if key not in weights:
            names = ", ".join(key[2:].removesuffix(".weight") for key in self.weights if key.endswith(".weight"))
            raise ValueError(f"no layer {layer!r} to tap; the net has {names}")
        see = partial(tap, layer)
        return _TappedLayer(key, see, see(torch.zeros_like(weights[key])), passed)

    @contextmanager
    def _tapping(self, taps: list[_TappedLayer], probes: list[Tree]) -> Iterator[None]:
        """Wraps each tapped weight where it is first used.

        Autograd runs what was made last first: wrapped any earlier, the dense gradients would wait for each other.
        """
        waiting = {tap.key: (tap, held) for tap, held in zip(taps, probes, strict=True)}

        def wrap(key: str, *_: Any) -> None:
            if key not in waiting:
                return
            tap, held = waiting.pop(key)
            places = [(where, slot) for where, slot, name in self._slots if name == key]
            wrapped = _HandOver.apply(places[0][0][places[0][1]], tap.see, tap.passed, *held.values())
            for where, slot in places:
                where[slot] = wrapped

        hooks = [layer.register_forward_pre_hook(partial(wrap, tap.key)) for tap in taps for layer in self._users(tap.key)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if waiting:
            name = next(iter(waiting))[2:].removesuffix(".weight")
            raise ValueError(f"layer {name!r} cannot be tapped: the model uses its weight without calling the layer")

    def _users(self, key: str) -> list[nn.Module]:
        """The layers that hold the weight."""
        places = [where for where, _, name in self._slots if name == key]
        return [layer for layer in self.module.modules() if any(layer._parameters is where for where in places)]

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
        weights = self.effective(tree)

        def gradient(leaves: Tree) -> Tree:
            def forward(inner: Tree) -> Tensor:
                with self._filled({**weights, **inner}, tree, True, batch.real):
                    return loss(self.module(batch.x), batch.y, batch.real)

            return torch.func.grad(forward)(leaves)

        pure, self.pure = self.pure, True
        try:
            at = {key: weights[key] for key in vector}
            back = torch.func.vjp(gradient, at)[1]
            return self._masked(back(self._masked(vector, tree))[0], tree)
        finally:
            self.pure = pure


def _by_autograd(forward: Forward, leaves: Tree, probes: list[Tree]) -> Found:
    """By ordinary autograd."""
    leaves, *probes = [{key: value.detach().requires_grad_() for key, value in tree.items()} for tree in (leaves, *probes)]
    every = [value for tree in (leaves, *probes) for value in tree.values()]
    with torch.enable_grad():
        value, buffers = forward(leaves, probes)
    found = iter(torch.autograd.grad(value, every, allow_unused=True, materialize_grads=True) if every else ())
    dense, *seen = [{key: next(found) for key in tree} for tree in (leaves, *probes)]
    return value.detach(), dense, seen, buffers


def _by_func(forward: Forward, leaves: Tree, probes: list[Tree]) -> Found:
    """By torch.func, for calls under `vmap`."""
    (dense, seen), (value, buffers) = torch.func.grad_and_value(forward, argnums=(0, 1), has_aux=True)(leaves, probes)
    return value, dense, seen, buffers
