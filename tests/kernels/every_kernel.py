"""Runs every kernel on fixed numbers and prints a hash of what each gives: `python every_kernel.py`, started by test_same_bits.py.

Each way begins its inputs at another address, or gives torch another number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from fedsim.core import exact_sum
from fedsim.kernels import channel_blocks, max_pool, max_pool_cpu
from fedsim.kernels.activation_pruning import entries, topk, words
from fedsim.kernels.sparse import chwn_norm, cpu, layers, nsconv, padding, sgd, walk
from fedsim.kernels.sparse.pattern import Geometry, Pattern
from fedsim.kernels.vectors import HAS_512
from fedsim.nn.runtime import chwn

WAYS = {"plain": (0, 1), "an address that ends in 4": (1, 1), "an address that ends in 12": (3, 1), "two threads": (0, 2)}
MODULES = (exact_sum, channel_blocks, max_pool_cpu, entries, words, chwn_norm, cpu, nsconv, padding)
SIZES = ((1, 3, 1, 1), (16, 4, 8, 5), (10, 3, 5, 5), (64, 5, 4, 4), (33, 4, 12, 12), (85, 2, 33, 2), (32, 3, 5, 14))  # B, C, H, W
STEPS = [(np.float32(factor), np.float32(decay)) for factor in (0, 0.9) for decay in (0, 0.01)]


class Drawn:
    """Arrays that begin `offset` values behind a multiple of 64 bytes."""

    def __init__(self, offset: int) -> None:
        self.offset, self.random = offset, np.random.default_rng(0)

    def array(self, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        size, whole = prod(shape), np.empty(prod(shape) + 64, dtype)
        begin = -whole.ctypes.data % 64 // whole.itemsize + self.offset
        part = whole[begin : begin + size]
        part[:] = self.random.standard_normal(size)
        return part.reshape(shape)

    def images(self, b: int, c: int, h: int, w: int) -> Tensor:
        """In CHWN layout."""
        return torch.from_numpy(self.array(c, h, w, b)).movedim(-1, 0).requires_grad_()

    def tensor(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.array(*shape)).requires_grad_()


def norms(drawn: Drawn) -> Iterator[Any]:
    for size in SIZES:
        x, weight, bias, g = drawn.images(*size), drawn.tensor(size[1]), drawn.tensor(size[1]), drawn.images(*size).detach()
        out, mean, var = chwn.batch_norm(x, weight, bias, 1e-5)
        yield from (out, mean, var, *torch.autograd.grad(out, (x, weight, bias), g))
        out = chwn.group_norm(x, weight, bias, 1e-5)
        yield from (out, *torch.autograd.grad(out, (x, weight, bias), g))
    x, one, none = drawn.array(4, 640), np.ones(4, np.float32), np.zeros(4, np.float32)
    held = [np.empty_like(x), one.copy(), one.copy()]
    chwn_norm.norm_forward(x, one, none, 1e-5, *held)
    yield from held


def sparse(drawn: Drawn) -> Iterator[Any]:
    for size in SIZES:
        for stride in (1, 2):
            pattern = Pattern(torch.from_numpy(drawn.array(6, size[1], 3, 3)) > 0, Geometry((stride, stride), (1, 1)))
            x, values, bias = drawn.images(*size), drawn.tensor(len(pattern.kept)), drawn.tensor(6)
            for walk.FEW in (512, 0):  # lists for every cell, or padded
                pattern.walks.clear()
                out = layers.conv2d(x, values, bias, pattern)
                yield from (out, *torch.autograd.grad(out, (x, values, bias), drawn.images(*out.shape).detach()))
            for factor, decay in STEPS:
                w, momentum = pattern.spread(drawn.tensor(len(pattern.kept)).detach()), pattern.spread(values.detach())
                sgd.sgd(w, momentum if factor else None, sgd.spread(pattern, values.detach()), 0.1, float(factor), float(decay))
                yield from (w, momentum)


def normalised(drawn: Drawn) -> Iterator[Any]:
    for over in ("all", "kept"):
        pattern = Pattern(torch.from_numpy(drawn.array(6, 9, 3, 3)) > 0)
        values, gain = drawn.tensor(len(pattern.kept)), drawn.tensor(6)
        out = nsconv.normalised(values, gain, pattern, over)
        yield from (out, *torch.autograd.grad(out, (values, gain), drawn.tensor(len(pattern.kept)).detach()))


def compact(drawn: Drawn) -> Iterator[Any]:
    rows, columns = np.arange(0, 9, 2), np.arange(1, 7, 3)
    for factor, decay in STEPS:
        w, momentum, g = drawn.array(9, 7, 25), drawn.array(9, 7, 25), np.empty((5, 2, 25), np.float32)
        channel_blocks.cut(drawn.array(9, 7, 25), rows, columns, g)
        channel_blocks.step(w, momentum if factor else np.empty((0, 0, 0), np.float32), g, rows, columns, np.float32(0.1), factor, decay)
        yield from (w, momentum)


def pooled_and_pruned(drawn: Drawn) -> Iterator[Any]:
    for width in (2, 4, 7, 31, 46):
        x = drawn.tensor(2, 3, 6, width)
        out = max_pool.halved(x)
        yield from (out, *torch.autograd.grad(out, x, drawn.tensor(*out.shape).detach()))
    for count in (1, 37, 4096):
        x, k = drawn.tensor(2, count).detach(), 1 + count // 3
        bits, values = topk.select(x, None, k)
        yield from (bits, values, topk.restore(bits, values, count), topk.where_set(x, bits, 1.7))
        yield from (topk.where_positive(x, out := torch.empty_like(x), 1.5, 1.7), out)


def sums(drawn: Drawn) -> Iterator[Any]:
    for shared in ({"w/a": torch.ones(101)}, {}):
        whole = exact_sum.Sum(shared, 30)
        whole.add({"w/a": torch.from_numpy(drawn.array(3, 101, dtype=np.float64))}, [0, 1, 2], [10, 10, 10])
        yield whole.flat()


def digest(parts: Iterator[Any]) -> str:
    whole = sha256()
    for part in parts:
        whole.update(np.ascontiguousarray(part.detach().numpy() if isinstance(part, Tensor) else part).tobytes())
    return whole.hexdigest()


def unused() -> list[str]:
    """Kernels that nothing has called."""
    every = {f"{module.__name__}.{name}": value for module in MODULES for name, value in vars(module).items()}
    kernels = {name: value for name, value in every.items() if isinstance(value, Dispatcher) and not value.targetoptions.get("forceinline")}
    other = entries if HAS_512 else words  # those for other processors and dtypes, which only move entries
    left = entries.passed, other.select, other.restore
    return [name for name, kernel in kernels.items() if not kernel.signatures and kernel not in left]


if __name__ == "__main__":
    found = {}
    for way, (offset, threads) in WAYS.items():
        torch.set_num_threads(threads)
        found[way] = {run.__name__: digest(run(Drawn(offset))) for run in (norms, sparse, normalised, compact, pooled_and_pruned, sums)}
    loaded = sum(
        sum(value.stats.cache_hits.values()) for module in MODULES for value in vars(module).values() if isinstance(value, Dispatcher)
    )
    print(json.dumps({"found": found, "unused": unused(), "loaded": loaded}))
