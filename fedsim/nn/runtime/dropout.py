"""Dropout as run-time layers: what they let through is a function of a key, so that every fleet, rank and resumed run draws the same.

The key is of the client and its step, of the layer, and of the layer's use in this call. An entry's number follows from its place in
the input: its row (the image, wherever a batch ends) and its position in that row.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.core import rng

if TYPE_CHECKING:
    from fedsim.nn.runtime.call_context import CallContext

ALPHA = 1.7580993408473766  # of alpha dropout: SELU goes to -ALPHA for very negative inputs


class Drawn(nn.modules.dropout._DropoutNd):
    """Entries, each kept with probability 1 - p and then divided by 1 - p."""

    context: CallContext
    key: str

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.context.train and self.p):
            return input
        kept = self._kept(self._drawn_shape(input), self.context.draw_key(self.key))
        return self._dropped(input, kept.to(input.dtype))

    def _drawn_shape(self, x: Tensor) -> tuple[int, ...]:
        """(…) like x, with 1 along the axes whose entries are kept or dropped together."""
        return tuple(x.shape)

    def _kept(self, shape: tuple[int, ...], key: Tensor) -> Tensor:
        """Bool, of this shape."""
        rows = rng.fold(key, torch.arange(shape[0] if shape else 1, device=key.device))
        least = min(int(self.p * 2**64), 2**64 - 1) - 2**63  # of the 64 bits of an entry, as a signed number
        return (
            (rng.bits(rows, prod(shape[1:])) >= least).view(shape)
            if self.p < 1
            else torch.zeros(shape, dtype=torch.bool, device=key.device)
        )

    def _dropped(self, x: Tensor, kept: Tensor) -> Tensor:
        scaled = kept / (1 - self.p) if self.p < 1 else kept
        return x.mul_(scaled) if self.inplace else x * scaled


class OfChannels(Drawn):
    """Whole channels: the first two axes of the input have an entry each."""

    def _drawn_shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:2], *[1] * (x.dim() - 2))


class OfAlpha(Drawn):
    """A dropped entry becomes -ALPHA; then all are scaled and shifted so that mean 0 and variance 1 stay."""

    def _dropped(self, x: Tensor, kept: Tensor) -> Tensor:
        if self.p == 1:
            return x * kept
        scale = ((ALPHA**2 * self.p + 1) * (1 - self.p)) ** -0.5
        scaled, shift = kept * scale, (kept - 1) * (ALPHA * scale) + ALPHA * scale * self.p
        return x.mul_(scaled).add_(shift) if self.inplace else x * scaled + shift


class Dropout(Drawn, nn.Dropout):
    pass


class Dropout1d(OfChannels, nn.Dropout1d):
    """An input of two axes is (C, L), as torch reads it."""

    def _drawn_shape(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), 1) if x.dim() == 2 else super()._drawn_shape(x)


class Dropout2d(OfChannels, nn.Dropout2d):
    pass


class Dropout3d(OfChannels, nn.Dropout3d):
    """An input of four axes is (C, D, H, W), as torch reads it."""

    def _drawn_shape(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), 1, 1, 1) if x.dim() == 4 else super()._drawn_shape(x)


class AlphaDropout(OfAlpha, nn.AlphaDropout):
    pass


class FeatureAlphaDropout(OfAlpha, OfChannels, nn.FeatureAlphaDropout):
    pass
