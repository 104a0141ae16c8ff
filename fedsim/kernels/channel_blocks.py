"""Kept rows and columns of a tensor: copied in one pass, and one torch.optim.SGD step whose gradient is 0 everywhere else."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels.vectors import multiply_add


@inlined
def _copied(run: Any, out: Any) -> None:  # pragma: no cover - compiled
    for k in range(run.size):
        out[k] = run[k]


@kernel
def cut(w: Any, rows: Any, columns: Any, out: Any) -> None:  # pragma: no cover - compiled
    """out (r, c, run) = w (R, C, run) at the rows (r,) and columns (c,)."""
    for i in range(rows.size):
        row = w[rows[i]]
        for j in range(columns.size):
            _copied(row[columns[j]], out[i, j])


@inlined
def _slowed(momentum: Any, factor: Any) -> None:  # pragma: no cover - compiled
    for k in range(momentum.size):
        momentum[k] *= factor


@inlined
def _carried(w: Any, momentum: Any, g: Any, lr: Any, decay: Any) -> None:  # pragma: no cover - compiled
    for k in range(w.size):
        momentum[k] += multiply_add(decay, w[k], g[k])  # rounds as torch's own step does
        w[k] = multiply_add(-lr, momentum[k], w[k])


@inlined
def _moved(w: Any, g: Any, lr: Any, decay: Any) -> None:  # pragma: no cover - compiled
    for k in range(w.size):
        w[k] = multiply_add(-lr, multiply_add(decay, w[k], g[k]), w[k])


@kernel
def step(w: Any, momentum: Any, g: Any, rows: Any, columns: Any, lr: Any, factor: Any, decay: Any) -> None:  # pragma: no cover - compiled
    """torch.optim.SGD's step of w (R, C, run) and, where it is not empty, of its momentum, alike in shape.

    The gradient is g (r, c, run) at the rows (r,) and columns (c,), both rising, and 0 elsewhere. lr, factor of the momentum and
    decay are of their dtype.
    """
    width, i = w.shape[1] * w.shape[2], 0
    spread = np.zeros((w.shape[1], w.shape[2]), w.dtype)
    for row in range(w.shape[0]):
        kept = i < rows.size and rows[i] == row
        if momentum.size or decay:
            for j in range(columns.size if kept else 0):
                _copied(g[i, j], spread[columns[j]])
            if momentum.size:
                held = momentum[row].reshape(width)
                _slowed(held, factor)
                _carried(w[row].reshape(width), held, spread.reshape(width), lr, decay)
            else:
                _moved(w[row].reshape(width), spread.reshape(width), lr, decay)
            if kept:
                spread[:] = 0
        elif kept:
            for j in range(columns.size):
                _moved(w[row, columns[j]], g[i, j], lr, decay)
        i += kept
