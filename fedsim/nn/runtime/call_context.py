"""What the run-time layers of one network know of the call at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.tree import Tree
from fedsim.kernels.sparse.pattern import KeptPositions, Pattern
from fedsim.nn.layers import input_gate


@dataclass
class CallContext:
    """What the layers of one call of Net share."""

    tree: Tree = field(default_factory=dict)
    train: bool = False
    real: Tensor | None = None  # (B,)
    momentum: float | None = None  # of running statistics; None: each norm's own
    pure: bool = False  # under a transform: nothing may be overwritten
    gates: Tree = field(default_factory=dict)  # group -> (C,)
    values: Tree = field(default_factory=dict)  # group -> (C,), what gates by the image are, where it does not depend on the image
    kept: Tree = field(default_factory=dict)  # norm -> (C,) hard gate of its channels
    patterns: dict[str, Pattern] = field(default_factory=dict)  # layers that run on their kept values alone, images innermost
    thin: dict[str, KeptPositions] = field(default_factory=dict)  # layers that are given their kept values, and make the weight of them
    cut: bool = False  # the weights are narrower than the stored ones, standardised filters ready for use
    keep: ActivationPruning | None = None  # what layers keep of their inputs for a backward pass; None: all
    caches: list[Any] = field(default_factory=list)  # (whose, cache) of inputs that have been pruned already
    energy: Tree | None = None  # group -> (C,) sum of |activation|^power, where it is asked for
    power: int = 2
    saliency: Tree | None = None  # group -> (B, C) what the gates of every image were, where it is asked for
    penalties: list[Tensor] = field(default_factory=list)  # () each, added to the loss
    buffers: Tree = field(default_factory=dict)
    images: Tensor | None = None  # (B, C, H, W), what the net was called with

    def image_keys(self) -> Tensor:
        """(B,) of the images: the same for all layers, and however these are computed."""
        assert self.images is not None
        return input_gate.keys_of(self.images)
