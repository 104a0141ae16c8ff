"""The SGD step along a gradient that is 0 except at the kept positions of a pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.kernels.sparse import cpu
from fedsim.kernels.sparse.pattern import KeptPositions, Pattern

NOTE = "kept_alone"  # a note on the very tensor that `spread` made: arithmetic on it gives another tensor, without the note


def spread(pattern: Pattern | KeptPositions, values: Tensor) -> Tensor:
    """A dense gradient with the values (nnz,) at the kept positions, which `steps` recognises."""
    dense: Any = pattern.spread(values)
    setattr(dense, NOTE, (pattern.kept, values))
    return dense


def steps(gradient: Tensor) -> bool:
    """Whether `sgd` can take the step along this gradient."""
    return hasattr(gradient, NOTE) and not gradient.is_cuda and gradient.dtype == torch.float32


def sgd(w: Tensor, momentum: Tensor | None, gradient: Tensor, lr: float, factor: float, decay: float) -> None:
    """torch.optim.SGD's step, in place; w and its momentum are 0 where nothing is kept, and stay so."""
    kept, values = getattr(gradient, NOTE)
    held = w.new_empty(0) if momentum is None else momentum.view(-1)
    cpu.step(w.view(-1).numpy(), held.numpy(), values.numpy(), kept.numpy(), lr, factor, decay)
