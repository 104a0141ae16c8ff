"""Net: a torch module as a pure function of a tree, and the only place that differentiates the simulated network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.core import keys, masks
from fedsim.core.keys import GATE, GATE_VALUES
from fedsim.core.tree import Tree, each, under
from fedsim.nn import optim, packed_program
from fedsim.nn.channels import filled
from fedsim.nn.functional import FunctionalModule
from fedsim.nn.gradients.compact import CompactGradient
from fedsim.nn.gradients.strategies import STRATEGIES, GradientRequest, TapCallback, checked
from fedsim.nn.loss import LossFunction, cross_entropy
from fedsim.nn.profiler import per_channel

if TYPE_CHECKING:
    from fedsim.core.types import Batch


class Net(FunctionalModule):
    """A module without values: each call gets them from a tree, and changes neither the module nor the tree.

    Keys of the tree: "w/NAME" for every parameter, "buf/NAME" for running statistics and other buffers, "mask/NAME" (bool, like its
    weight) for weights that are pruned, "gate/channels" (n,) for all `channels`. A bool gate is hard: closed channels are left out
    of the computation (under `vmap`, and in training with dropout, they are multiplied by 0, which is the same but for rounding). A
    float gate is soft: it multiplies the channels. Where `set_sparse_costs` says what layers cost, layers that keep few weights run on
    these alone.

    Args:
        module: any torch module; Net keeps copies and leaves it as it was. Buffers of floats, and of one whole number or truth value, may
            change in training mode, as in torch; changes in evaluation mode are dropped.
        kept: for a net that `cut` made: group -> positions (c,) int64 of its channels among those of the first net.

    Attributes:
        initial: the module's own values, under "w/" and "buf/".
        sizes: layer -> number of weights, of convolutions, linear layers and gates in the order of the forward pass.
        maskable: the layers that may be pruned: all but the first.

    >>> import torch
    >>> from fedsim.core.types import Batch
    >>> net = Net(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)))
    >>> net.sizes
    {'1': 32, '3': 24}
    >>> tree = net.initial | {"mask/3.weight": torch.arange(24).view(3, 8) % 2 == 0}
    >>> x, y = torch.ones(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    >>> logits, statistics = net(tree, x)
    >>> logits.shape
    torch.Size([5, 3])
    >>> batch = Batch(x, y, real=None, t=torch.tensor(0), T=torch.tensor(1))
    >>> loss, gradient, statistics, taps = net.gradient(tree, batch)
    >>> int((gradient["w/3.weight"] != 0).sum()) <= 12  # the gradient of pruned weights is 0
    True
    >>> tree = net.descend(tree, gradient, lr=0.1)
    """

    def __init__(self, module: nn.Module, kept: Tree | None = None) -> None:
        super().__init__(module)
        self.sizes = {name: self.initial[keys.weight(name)].numel() for name in self.shapes}
        self.kept: Tree = kept or {}
        self._cuts: list[Net] = []

    @property
    def maskable(self) -> tuple[str, ...]:
        """The conv and linear layers that methods prune: all but the first."""
        return tuple(self.sizes)[1:]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Net:
        """The same net with its initial values and constants on another device and in another dtype."""
        moved = copy.copy(self)
        moved.initial = each(lambda value: value.to(device, dtype if value.is_floating_point() else value.dtype), self.initial)
        moved._cuts = []
        moved.module.to(device, dtype)
        return moved

    def under_vmap(self) -> Net:
        """The same net for calls under a torch.func transform: nothing is overwritten, gradients come from torch.func."""
        twin = copy.copy(self)
        twin.pure = True
        return twin

    def without_activation_pruning(self) -> Net:
        """The same net whose layers keep their whole inputs for the backward pass."""
        twin = copy.copy(self)
        twin.activation_pruning, twin.program = None, packed_program.program(self.original)
        return twin

    # ---- channels

    def used(self, tree: Tree) -> dict[str, int]:
        """Layer -> weights in use, of every layer that a mask, a hard gate or an earlier cut makes smaller."""
        gate, held = tree.get(GATE), under(tree, keys.MASKS)
        if gate is not None and not gate.is_floating_point():
            kept = self.channels.kept(gate)
            whole, held = self.channels.used(self.channels.open(gate[None])[0]), self.channels.cut(held, kept)
        else:
            whole = self.channels.used(self.channels.widths) if self.kept else {}
        gone = {group.gate: 0 for group in self.channels.groups} if GATE_VALUES in tree else {}
        return whole | {key.removesuffix(".weight"): count for key, count in masks.ones(held).items()} | gone

    def per_channel(self, shape: tuple[int, ...]) -> list[int]:
        """Bytes saved for the backward pass per image of `shape` (C, H, W) and open channel, for each group in network order."""
        owners = {node: group.name for group in self.channels.groups for node in group.nodes}
        found = per_channel(self.original, shape, self.traced[0], owners, self.activation_pruning)
        return [found[group.name] for group in self.channels.groups]

    def cut(self, kept: Tree) -> Net:
        """A physically smaller net of the kept channels, its initial values cut as well; the same net for the same channels.

        Args:
            kept: group -> positions (c,) int64 among this net's channels. ValueError for a group without any.
        """
        self.channels.kept(self.channels.gate(kept))  # at least one in every group
        kept = {name: index.cpu() for name, index in kept.items()}
        whole = {name: self.kept[name][index] if self.kept else index for name, index in kept.items()}
        for small in self._cuts:
            if all(torch.equal(small.kept[name], index) for name, index in whole.items()):
                return small
        like = next(iter(self.initial.values()))
        small = Net(self.channels.compact(self.original, kept), whole).to(like.device, like.dtype)
        small.set_compute_dtype(self.compute_dtype)
        small.set_packed_convolution(self.packed_convolution)
        small.set_activation_pruning(self.activation_pruning)
        self._cuts[:] = [small]
        return small

    def compact(self, tree: Tree, kept: Tree, removed: bool = True) -> Tree:
        """The values of a tree for the net that `cut(kept)` gives: "w/", "buf/", "mask/" and "opt/" alike.

        Args:
            kept: group -> positions (c,) int64 among this net's channels.
            removed: whether standardised filters go on counting the input channels that they lose, in "buf/LAYER.removed" (out, 3).
        """
        tree = self.masked(tree, tree)  # what is cut away goes on counting in sums, so nothing may stand below a mask
        return self.channels.cut(tree, kept) | (self.channels.lost(tree, kept) if removed else {})

    def plain(self, tree: Tree) -> nn.Module:
        """The values of a tree as a torch module in evaluation mode: masked weights 0, made filters as those of ordinary convolutions."""
        return filled(self.original, self.folded(tree))

    # ---- calls

    def __call__(
        self,
        tree: Tree,
        x: Tensor,
        train: bool = False,
        real: Tensor | None = None,
        momentum: float | None = None,
        draws: Batch | None = None,
    ) -> tuple[Tensor, Tree]:
        """The logits (B, classes) of the images x (B, C, H, W), and the new buffers ("buf/"); the tree stays as it is.

        Args:
            train: training mode: norms use the statistics of the batch. There are no new buffers in evaluation mode.
            real: (B,) in {0, 1}, which images of a padded batch count; None: all.
            momentum: of the running statistics, in (0, 1], in place of each norm's own.
            draws: the batch that x is of, by whose key dropout draws in training mode.
        """
        patterns = self.sparse(tree)
        with self.on_kept_weights(patterns), self.context.drawing(draws):
            return self.forward(self.weights_in_use(tree, patterns), tree, x, train, real, momentum)

    def energy(self, tree: Tree, x: Tensor, real: Tensor | None = None, power: int = 2) -> Tensor:
        """(n,) sum over images x (B, C, H, W) and positions of every channel's |activation|^power, in evaluation mode.

        ValueError for a model without channels that can be cut.
        """
        module, self.context.energy, self.context.power, self.context.images = self.gated_module, {}, power, x
        try:
            with self.with_values(self.effective(tree), tree, False, real):
                module(x)
            return torch.cat([self.context.energy[group.name] for group in self.channels.groups])
        finally:
            self.context.energy = None

    def saliency(self, tree: Tree, x: Tensor) -> Tensor:
        """(B, n) the values of the dynamic gates for every image of x (B, C, H, W), in evaluation mode."""
        self.context.saliency = {}
        try:
            self(tree, x)
            return torch.cat([self.context.saliency[group.name] for group in self.channels.groups], -1)
        finally:
            self.context.saliency = None

    def gradient(
        self,
        tree: Tree,
        batch: Batch,
        wrt: str | tuple[str, ...] | None = "w",
        loss: LossFunction = cross_entropy,
        extra: Tree | None = None,
        tap: TapCallback | None = None,
        layers: Sequence[str] = (),
        compact: bool = False,
    ) -> tuple[Tensor, Tree, Tree, Tree]:
        """(mean loss (), gradient, running statistics, taps) of one batch in training mode.

        Args:
            wrt: what to differentiate for. "w": every weight, its gradient masked, under "w/"; "gate": the tree's soft gate, under
                its key, summed over all places where a channel is gated; ("w", "gate"): both; None: only what is tapped.
            loss: of logits (B, classes), labels (B,) and `real` (B,) or None; a number ().
            extra: "w/NAME" -> tensor, added to the gradient before it is masked.
            tap: called as tap(layer, g) for each name in `layers` with the dense gradient g of its effective weight, as soon as g
                exists; what it returns is collected in taps. With wrt=None g is freed before the next layer's gradient is formed.
            compact: under a hard gate the gradient may be a CompactGradient, which only `descend` can use.

        Raises:
            ValueError: for a `wrt` that is neither "w" nor "gate"; for "gate" without a soft gate in the tree; for a layer that is
                not there or cannot be tapped.
        """
        request = GradientRequest(tree, batch, checked(wrt, tree), loss, extra, tap, layers if tap else (), compact)
        strategy = next(strategy for strategy in STRATEGIES if strategy.fits(self, request))
        with self.context.drawing(batch):
            return strategy.run(self, request)

    def descend(
        self, state: Tree, gradient: Tree, lr: float | Tensor, momentum: float = 0.0, decay: float = 0.0, optimiser: str = "sgd"
    ) -> Tree:
        """`state` after one step of torch.optim.SGD or Adam along the (masked) `gradient`; overwrites "w/" and "opt/" in it.

        Pruned weights stay exactly 0: their gradient is 0, and so are the weight that decays and the momentum that moves.

        Args:
            lr: learning rate, a number or a tensor ().
            momentum: of SGD; with a momentum the state has "opt/momentum/NAME" for every weight.
            decay: weight decay, added to the gradient as `decay` times the weight.
            optimiser: "sgd" or "adam" (the state has its moments and its number of steps: `optim.fresh`).
        """
        if optimiser == "adam":
            gradient = gradient.whole(state) if isinstance(gradient, CompactGradient) else gradient
            return optim.adam(state, gradient, lr, decay)
        return optim.sgd(state, gradient, lr, momentum, decay, self.pure)

    def hessian_vector(self, tree: Tree, batch: Batch, vector: Tree, loss: LossFunction = cross_entropy) -> Tree:
        """H · vector of the masked loss, by differentiating twice; running statistics are left alone.

        Args:
            vector: "w/NAME" -> tensor like that weight; the product has its keys. H is the Hessian with respect to these weights.
        """
        if not self.pure or self.activation_pruning is not None:
            return self.without_activation_pruning().under_vmap().hessian_vector(tree, batch, vector, loss)
        weights = self.weights_in_use(tree, {})

        def gradient(leaves: Tree) -> Tree:
            def forward(inner: Tree) -> Tensor:
                with self.context.drawing(batch):
                    logits, _ = self.forward({**weights, **inner}, tree, batch.x, True, batch.real)
                return self.objective(loss, logits, batch)

            return torch.func.grad(forward)(leaves)

        back = torch.func.vjp(gradient, {key: weights[key] for key in vector})[1]
        return self.masked(back(self.masked(vector, tree))[0], tree)
