"""What the run-time layers of one network know of the current call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.core import rng
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.kernels.sparse.pattern import KeptPositions, Pattern
from fedsim.nn.layers import input_gate


@dataclass
class CallContext:
    """What the layers of one call of `Net` share. Net fills it before the call and empties it after."""

    tree: Tree = field(default_factory=dict)
    train: bool = False
    real: Tensor | None = None  # (B,)
    momentum: float | None = None  # of running statistics; None: each norm's own
    pure: bool = False  # under a torch.func transform: nothing may be overwritten
    gates: Tree = field(default_factory=dict)  # group -> (C,)
    gate_values: Tree = field(default_factory=dict)  # group -> (C,), constants in place of what the dynamic gates compute
    norm_gates: Tree = field(default_factory=dict)  # norm -> (C,) hard gate of its channels
    patterns: dict[str, Pattern] = field(default_factory=dict)  # layers that run on their kept weights alone, in CHWN layout
    kept_positions: dict[str, KeptPositions] = field(default_factory=dict)  # layers whose weight comes as its kept values (nnz,)
    compact: bool = False  # the weights are those of the open channels alone, standardised filters ready for use
    activation_pruning: ActivationPruning | None = None  # what layers keep of their inputs for the backward pass; None: all
    caches: list[Any] = field(default_factory=list)  # (source, version, cache, form) of inputs that have been pruned already
    energy: Tree | None = None  # group -> (C,) sum of |activation|^power; None: nobody asks for it
    power: int = 2
    saliency: Tree | None = None  # group -> (B, C) values of the dynamic gates; None: nobody asks for them
    penalties: list[Tensor] = field(default_factory=list)  # () each, added to the loss
    buffers: Tree = field(default_factory=dict)  # the new running statistics
    images: Tensor | None = None  # (B, C, H, W), the input of the net
    has_dropout: bool = False  # layers draw in training
    batch: Batch | None = None  # by whose key layers draw; None: they cannot
    uses: dict[str, int] = field(default_factory=dict)  # layer -> number of its last draw in this call, from 0
    again: bool = False  # parts of the forward are computed once more, in the backward pass

    def image_keys(self) -> Tensor:
        """(B,) a random key of each image: the same for all layers, whatever way they are computed."""
        assert self.images is not None
        return input_gate.keys_of(self.images)

    @contextmanager
    def drawing(self, batch: Batch | None) -> Iterator[None]:
        """One call inside may draw, by the key of the batch."""
        self.batch, self.uses = batch, {}
        try:
            yield
        finally:
            self.batch = None

    @contextmanager
    def computing_again(self) -> Iterator[None]:
        """The backward pass inside may compute parts of the forward once more."""
        self.again = True
        try:
            yield
        finally:
            self.again = False

    def draw_key(self, layer: str) -> Tensor:
        """() the key of a layer's draws in this step; another one for each use of the layer. ValueError if the batch has no key."""
        batch = self.batch
        if batch is None or batch.key is None:
            raise ValueError(
                f"{layer}: dropout draws by the key of a batch; call net(…, draws=batch), and make a batch as Batch(…, key=sent.key)"
            )
        return rng.fold(rng.fold(batch.key, batch.t), rng.number("dropout", batch.feed, layer, self._use(layer)))

    def _use(self, layer: str) -> int:
        """The number of this draw of the layer. A part of the forward that is computed again draws what it drew before."""
        if not self.again:
            self.uses[layer] = self.uses.get(layer, -1) + 1
        elif self.uses[layer]:
            raise ValueError(
                f"{layer}: this dropout layer is called {self.uses[layer] + 1} times in a forward of which the backward pass computes parts"
                " again (torch.utils.checkpoint); give each call a layer of its own"
            )
        return self.uses[layer]
