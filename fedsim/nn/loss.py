"""Losses of a batch, over its real images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of logits (B, classes), labels (B,), real (B,) or None


def cross_entropy(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy over the real images; logits (B, classes), y (B,) int64, real (B,) in {0, 1} or None (all are real)."""
    if real is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction="none") * real).sum() / real.sum()
