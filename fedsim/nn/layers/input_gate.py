"""Dynamic (input-dependent) gates: for each image they choose the output channels of a convolution (ADP, arXiv:2106.06921 v1).

A gate reads its convolution's input x (B, C_in, H, W), pooled: s = mean over height and width, or the sigmoid of that. It gives
g = ReLU(U s + c) (B, C_out), of which the `keep` largest of every image stay and the others become 0, in training and inference
alike. g multiplies the convolution's output behind its norm. Without the sigmoid g grows with the image's activations. Where the
output does too, behind a batch norm or none, their product is of second degree in them: in a network with additions, whose stream
carries it from block to block, it soon exceeds every number. A group norm takes each image's own scale away.
To the ledger, and to methods that mask weights, U is a linear layer. A gate is put into a model that is built already, so that the
model's own layers keep their names and, for a seed, their first values; its own are "gates.LAYER.weight" (C_out, C_in) and
"gates.LAYER.bias" (C_out,).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import rng

FEW = 1 << 11  # gate values of a batch up to which a sort is the faster way to the largest
GATES_MODULE = "gates"  # the container of a model's gates
SHIFTS_MODULE = "shifts"  # and of the shifts of norms whose scales gates replace


@dataclass(frozen=True)
class Gating:
    """The settings of a model's dynamic gates."""

    keep: float  # d, share of its output channels that a gated layer keeps for an image, at most
    sigmoid: bool | None = None  # of the pooled input; None: not in a network with additions and group norms
    bias: float | None = None  # c at the start; None: 1, and 0 in a network with additions
    l1: float = 0.0  # of the sum of g, the mean over the batch, in the loss
    choice: str = "saliency"  # which channels stay: those of largest g, or for each image "random" ones
    place: str = "norm"  # where the gate multiplies: behind the norm, or "affine": in the place of the norm's scale


class InputGate(nn.Module):
    """y · g(x), y (B, C_out, H, W) the output of the norm behind the gated convolution, x the convolution's input."""

    def __init__(self, inside: int, outside: int, gating: Gating, residual: bool, by_image: bool = False) -> None:
        """residual: whether the network has additions; by_image: whether the norm before the gate looks at each image alone."""
        super().__init__()
        self.keep: int | None = max(1, round(Fraction(str(gating.keep)) * outside)) if gating.keep < 1 else None  # None: all
        self.sigmoid = not (residual and by_image) if gating.sigmoid is None else gating.sigmoid
        self.l1, self.random = gating.l1, gating.choice == "random"
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(outside, inside)))  # U
        self.bias = nn.Parameter(torch.full((outside,), float(not residual) if gating.bias is None else gating.bias))  # c

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g = self.selected(self.saliency(x), keys_of(x) if self.random else None)
        return y * g[..., None, None]

    def saliency(self, x: Tensor) -> Tensor:
        """(B, C_out) g = ReLU(U s + c)."""
        s = x.mean((2, 3))
        return F.linear(s.sigmoid() if self.sigmoid else s, self.weight, self.bias).relu()

    def selected(self, g: Tensor, keys: Tensor | None = None) -> Tensor:
        """g with the closed channels of each image set to 0; `keys` (B,) of the images, if the open channels are drawn at random."""
        if self.keep is None:
            return g
        return largest(g, self.keep) if keys is None else drawn(g, self.keep, keys)

    def extra_repr(self) -> str:
        outside, inside = self.weight.shape
        return f"{inside}, {outside}, keep={outside if self.keep is None else self.keep}, sigmoid={self.sigmoid}"


class Shift(nn.Module):
    """Adds a number to every channel: the shift of a norm whose scale is replaced by a gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def largest(g: Tensor, k: int) -> Tensor:
    """g (..., C) with all but the `k` largest of a row set to 0; of equal values the lower channel stays."""
    return g * _first(g.detach(), k)


def drawn(g: Tensor, k: int, keys: Tensor) -> Tensor:
    """g (B, C) with all but `k` drawn ones of each image set to 0, by the images' keys (B,)."""
    return g * _first(rng.uniform(keys, g.shape[-1]), k)


def _first(score: Tensor, k: int) -> Tensor:
    """(..., C) bool, the `k` largest; of equal values the lower ones."""
    recorded = not isinstance(score, Tensor) or torch.jit.is_tracing() or torch.compiler.is_compiling()
    return _by_sorting(score, k) if not recorded and score.numel() <= FEW else _by_threshold(score, k)


def _by_sorting(score: Tensor, k: int) -> Tensor:
    """Fast on few values. Recorded graphs cannot hold a stable sort: neither torch.jit.trace nor ONNX has one."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def _by_threshold(score: Tensor, k: int) -> Tensor:
    """All above the k-th largest value, and as many of the first that equal it as there is room for."""
    last = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > last, score == last
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def keys_of(x: Tensor) -> Tensor:
    """(B,) int64, a key made of the values of each image, rounded to a 4096th."""
    values = (x.flatten(1) * 4096).round().long()
    weights = rng.bits(torch.zeros((), dtype=torch.int64, device=x.device), values.shape[1]) | 1
    return rng.fold((values * weights).sum(1), "gate")


def gates_of(module: nn.Module) -> dict[str, InputGate]:
    """Name -> dynamic gate, of every gate of a model."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, InputGate)}


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear, InputGate)
