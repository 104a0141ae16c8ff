"""Net: a torch module as a pure function of a tree, and the only place that differentiates the simulated network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import masks, norms
from fedsim.tree import Tree, each

if TYPE_CHECKING:
    from fedsim.core import Batch

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Tap = Callable[[str, Tensor], Tree]


def cross_entropy(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy over the real images; logits (B, classes), y (B,), real (B,) or None."""
    if real is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()


class _Tapped(torch.autograd.Function):
    """The identity; in backward the dense gradient is handed to `tap` as soon as it exists, and passed on only if it is wanted."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: str, tap: Tap, taps: Tree, wanted: bool) -> Tensor:
        ctx.layer, ctx.tap, ctx.taps, ctx.wanted = layer, tap, taps, wanted
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        ctx.taps |= ctx.tap(ctx.layer, gradient)
        return gradient if ctx.wanted else None, None, None, None, None


class Net:
    """A module without values: they come from the tree of each call.

    Keys: "w/NAME" for every parameter, "buf/NAME" for the running statistics of norms. `initial` holds the module's own values.
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
    def _filled(self, weights: Tree, tree: Tree, train: bool, real: Tensor | None) -> Iterator[Tree]:
        call = self._call
        call.tree, call.train, call.real, call.pure, call.buffers = tree, train, real, self.pure, {}
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

    def __call__(self, tree: Tree, x: Tensor, train: bool = False, real: Tensor | None = None) -> tuple[Tensor, Tree]:
        """(logits (B, classes), new running statistics) of x (B, C, H, W); the tree stays as it is."""
        with self._filled(self.effective(tree), tree, train, real) as buffers:
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
        tap(layer, g) is called for each name in `layers` with the dense gradient g of its effective weight; what it returns is
        collected in taps. Outside of `vmap`, with wrt=None, g is freed before the next layer's gradient is formed.
        """
        if wrt not in ("w", None):
            raise ValueError(f"wrt = {wrt!r}: this net has no gates; differentiate 'w', or None for the tapped layers alone")
        tapped = {self._key_of(layer): layer for layer in (layers if tap is not None else ())}
        wanted = self.weights if wrt == "w" else tuple(tapped)
        find = self._gradient_pure if self.pure else self._gradient_direct
        value, dense, buffers, taps = find(tree, batch, wanted, loss, tap, tapped, wrt == "w")
        if wrt is None:
            return value, {}, buffers, taps
        if extra:
            dense = {key: g + extra[key] if key in extra else g for key, g in dense.items()}
        return value, self._masked(dense, tree), buffers, taps

    def _key_of(self, layer: str) -> str:
        key = f"w/{layer}.weight"
        if key not in self.weights:
            names = ", ".join(key[2:].removesuffix(".weight") for key in self.weights if key.endswith(".weight"))
            raise ValueError(f"no layer {layer!r} to tap; the net has {names}")
        return key

    def _gradient_direct(
        self, tree: Tree, batch: Batch, wanted: tuple[str, ...], loss: Loss, tap: Tap | None, tapped: dict[str, str], passed: bool
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """By ordinary autograd; taps happen within the backward pass."""
        taps: Tree = {}
        weights = self.effective(tree)
        leaves = {key: weights[key].detach().requires_grad_() for key in wanted}
        with torch.enable_grad():
            used = {**weights, **leaves}
            for key, layer in tapped.items():
                used[key] = _Tapped.apply(leaves[key], layer, tap, taps, passed)
            with self._filled(used, tree, True, batch.real) as buffers:
                value = loss(self.module(batch.x), batch.y, batch.real)
            if leaves:
                found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=passed)
        return value.detach(), dict(zip(leaves, found, strict=True)) if passed else {}, buffers, taps

    def _gradient_pure(
        self, tree: Tree, batch: Batch, wanted: tuple[str, ...], loss: Loss, tap: Tap | None, tapped: dict[str, str], passed: bool
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """By torch.func, for calls under `vmap`."""
        weights = self.effective(tree)

        def forward(leaves: Tree) -> tuple[Tensor, Tree]:
            with self._filled({**weights, **leaves}, tree, True, batch.real) as buffers:
                return loss(self.module(batch.x), batch.y, batch.real), buffers

        dense, (value, buffers) = torch.func.grad_and_value(forward, has_aux=True)({key: weights[key] for key in wanted})
        taps: Tree = {}
        for key, layer in tapped.items():
            taps |= tap(layer, dense[key])  # type: ignore[misc]
        return value, dense, buffers, taps

    def descend(self, state: Tree, gradient: Tree, lr: float | Tensor, momentum: float = 0.0, decay: float = 0.0) -> Tree:
        """`state` after one step of torch.optim.SGD along the (masked) `gradient`; overwrites "w/" and "opt/momentum/" in it.

        Pruned weights stay exactly 0: their gradient is 0, and so are the weight that decays and the momentum that moves.
        """
        w = [state[key] for key in gradient]
        g = list(gradient.values())
        rows = _InTurn if self.pure or isinstance(lr, Tensor) else torch
        if decay:
            g = list(rows._foreach_add(g, w, alpha=decay))
        if momentum:
            kept = [state["opt/momentum/" + key[2:]] for key in gradient]
            rows._foreach_mul_(kept, momentum)
            rows._foreach_add_(kept, g, alpha=1.0)
            g = kept
        if isinstance(lr, Tensor):
            g, lr = [lr * step for step in g], 1.0
        rows._foreach_add_(w, g, alpha=-lr)
        return state

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


class _InTurn:
    """torch._foreach_* one tensor at a time: the foreach kernels have no `vmap` rule."""

    @staticmethod
    def _foreach_add(tensors: list[Tensor], others: list[Tensor], alpha: float) -> list[Tensor]:
        return [torch.add(tensor, other, alpha=alpha) for tensor, other in zip(tensors, others, strict=True)]

    @staticmethod
    def _foreach_add_(tensors: list[Tensor], others: list[Tensor], alpha: float) -> None:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.add_(other, alpha=alpha)

    @staticmethod
    def _foreach_mul_(tensors: list[Tensor], factor: float) -> None:
        for tensor in tensors:
            tensor.mul_(factor)
