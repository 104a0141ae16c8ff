"""Compact gradients: under a hard gate, the gradient of the open channels' weights alone, and the optimiser step along it.

A closed channel's gradient is 0, so its weights only decay and drift with their momentum; that needs no tensor of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.kernels import channel_blocks

Array = Any
NOTHING = np.empty((0, 0, 0), np.float32)


@dataclass(frozen=True)
class ChannelBlock:
    """Kept rows and columns of a tensor that is read as (rows, columns, run)."""

    shape: tuple[int, int, int]
    rows: Array  # (r,) int64, rising
    columns: Array  # (c,)

    def cut(self, whole: Tensor) -> Tensor:
        """The kept part."""
        out = whole.new_empty(self._compact_shape(whole))
        channel_blocks.cut(whole.numpy().reshape(self.shape), self.rows, self.columns, self._part(out))
        return out

    def step(self, w: Tensor, momentum: Tensor | None, g: Tensor, *rates: np.float32) -> None:
        """torch.optim.SGD's step in place, g the gradient of the kept part; rates: lr, factor of the momentum, decay."""
        held = NOTHING if momentum is None else momentum.numpy().reshape(self.shape)
        channel_blocks.step(w.numpy().reshape(self.shape), held, self._part(g.contiguous()), self.rows, self.columns, *rates)

    def _compact_shape(self, whole: Tensor) -> tuple[int, ...]:
        """The kept part's own shape."""
        if whole.dim() == 1:
            return (len(self.columns),)
        return (len(self.rows), len(self.columns) * whole.shape[1] // self.shape[1], *whole.shape[2:])

    def _part(self, compact: Tensor) -> Array:
        return compact.numpy().reshape(len(self.rows), len(self.columns), self.shape[2])


class CompactGradient(dict[str, Tensor]):
    """A gradient: of the kept part of the tensors that have a block, of the whole tensor for the others."""

    def __init__(self, gradient: Tree, blocks: Mapping[str, ChannelBlock]) -> None:
        super().__init__(gradient)
        self.blocks = blocks

    def whole(self, like: Tree) -> Tree:
        """The gradient in the shapes of `like`, with zeros where nothing is kept."""
        made = {key: torch.zeros_like(like[key]) for key in self.blocks}
        for key, block in self.blocks.items():
            block.step(made[key], None, self[key], *_float32(-1.0, 0.0, 0.0))
        return {key: made.get(key, g) for key, g in self.items()}

    def step(self, state: Tree, lr: float, momentum: float, decay: float) -> Tree:
        """One SGD step of the tensors that have a block, in place in `state`. Returns the gradient of the others."""
        rates = _float32(lr, momentum, decay)
        for key, block in self.blocks.items():
            block.step(state[key], state[keys.MOMENTUM + keys.name_of(key)] if momentum else None, self[key], *rates)
        return {key: g for key, g in self.items() if key not in self.blocks}


def cuttable(whole: Tensor) -> bool:
    """Whether the kernels can take this tensor: float32, contiguous, on the CPU."""
    return whole.dtype == torch.float32 and whole.device.type == "cpu" and whole.is_contiguous()


def _float32(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)
