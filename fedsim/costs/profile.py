"""What is counted: the layers of a network, their positions and what a step of them keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedsim.core.activation_pruning import ActivationPruning

VALUE_BYTES = 4  # bytes of a float32

KeptCounts = Mapping[str, int]  # kept weights of each masked layer: {"layer1.0.conv1": 1843}

DENSE: KeptCounts = MappingProxyType({})


@dataclass(frozen=True)
class LayerProfile:
    """A convolution or a linear map."""

    name: str  # "layer1.0.conv1" has the weight "w/layer1.0.conv1.weight"
    weights: int
    flops: int  # forward, one image, dense
    shape: tuple[int, ...]  # of its weight, outputs first
    positions: int  # output positions of one image, H'W'; uses of the weights


@dataclass(frozen=True)
class BackwardMoment:
    """A step where the backward pass stands at one module."""

    activations: int  # bytes per image that are saved up to it
    caches: int  # caches that are
    signs: int  # ReLUs' bits that are
    transient: int  # bytes per image of gradients and restored inputs beside them
    layer: str = ""  # it is a convolution or a linear map, whose weight's gradient is formed now
    free: int = 0  # other parameters whose gradient is


@dataclass(frozen=True)
class ModelProfile:
    """What the ledger needs to know of a model."""

    layers: tuple[LayerProfile, ...]  # conv and linear, in the order of the forward pass
    free: int  # u: parameters that are never masked (biases, scale and shift of norms)
    buffers: int  # b: running means and variances, and other buffers that clients average
    activations: int  # bytes saved for backward per image, float32
    vectors: int = 0  # bytes saved for backward per batch, whatever its size (the channel statistics of batch norms)
    keep: ActivationPruning | None = None  # how inputs of layers are pruned before they are saved
    caches: tuple[int, ...] = ()  # entries per image of every input that is; not in `activations`
    signs: tuple[int, ...] = ()  # entries per image of every ReLU that saves a bit each; not in `activations`
    normalised: frozenset[str] = frozenset()  # layers whose weight in use is made anew in every pass
    moments: tuple[BackwardMoment, ...] = ()  # of a backward pass, in the order of the forward pass

    @property
    def weights(self) -> int:
        """n, all conv and linear weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def parameters(self) -> int:
        """n + u."""
        return self.weights + self.free


class Breakdown(dict[str, int]):
    """The terms of a sum, by name."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __add__(self, other: Mapping[str, int]) -> Breakdown:
        """Term by term; a name that only one of them has is kept."""
        return Breakdown({name: self.get(name, 0) + other.get(name, 0) for name in {**self, **other}})

    def without(self, *names: str) -> Breakdown:
        return Breakdown({name: value for name, value in self.items() if name not in names})


def positions_bytes(kept: int, weights: int) -> int:
    """Bytes that say where the kept ones of `weights` weights stand."""
    return min(VALUE_BYTES * kept, -(-weights // 8))
