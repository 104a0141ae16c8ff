"""Batch norm and group norm in CHWN layout: images (C, H, W, B), each channel one contiguous plane.

Sums over a plane are taken in 32 lanes, value k in lane k mod 32, 4096 values at a time in float32; these sums are added in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fedsim.core.compiled import inlined, kernel
from fedsim.kernels.vectors import LONG, SIZE, Strip, multiply_add

OfVector = Callable[[Strip, list[Any], Any, Any, Any], list[Any]]
VECTORS, WIDTH = 4, 8  # vectors of a strip and float32 of a vector: the lanes of a sum
PART = 4096  # values that are summed in float32


def _lane_sums(count: int, of_vector: OfVector) -> Any:
    """`count` sums over the n values at two addresses and a mean: `of_vector(strip, held, x, g, mean)` adds one vector."""

    @intrinsic
    def lane_sums(context: Any, x: Any, g: Any, mean: Any, n: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            strip, n = Strip(builder, VECTORS, WIDTH), given[3]
            x, g, mean = strip.pointer(given[0]), strip.pointer(given[1]), strip.splat(given[2])
            held = [strip.sums(strip.zero) for _ in range(count)]
            whole, left = builder.sdiv(n, LONG(VECTORS * WIDTH)), builder.srem(n, LONG(VECTORS * WIDTH))
            with cgutils.for_range(builder, whole) as loop:
                begin = [builder.mul(loop.index, LONG(VECTORS * WIDTH))]
                _add_strip(strip, held, of_vector, builder.gep(x, begin), builder.gep(g, begin), mean)
            with builder.if_then(builder.icmp_signed("!=", left, LONG(0))):
                begin = [builder.sub(n, left)]
                x, g = (strip.copied(builder.gep(values, begin), left) for values in (x, g))
                _add_strip(strip, held, of_vector, x, g, mean, left)
            return context.make_tuple(builder, signature.return_type, [_added_up(strip, sums) for sums in held])

        return types.UniTuple(types.float32, count)(types.intp, types.intp, types.float32, types.intp), code

    return lane_sums


def _add_strip(strip: Strip, held: Any, of_vector: OfVector, x: Any, g: Any, mean: Any, left: Any = None) -> None:
    """One strip more, or its first `left` values."""
    builder = strip.builder
    for k in range(VECTORS):
        before = [builder.load(sums[k]) for sums in held]
        after = of_vector(strip, before, strip.load(x, k), strip.load(g, k), mean)
        for sums, old, new in zip(held, before, after, strict=True):
            builder.store(new if left is None else builder.select(strip.within(left, k), new, old), sums[k])


def _added_up(strip: Strip, sums: list[Any]) -> Any:
    """The lower half plus the upper half, until one value is left."""
    vectors = [strip.builder.load(one) for one in sums]
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [strip.builder.fadd(vectors[k], vectors[half + k]) for k in range(half)]
    return strip.added_up(vectors[0])


def _values(strip: Strip, held: list[Any], x: Any, g: Any, mean: Any) -> list[Any]:
    return [strip.builder.fadd(held[0], x)]


def _squares(strip: Strip, held: list[Any], x: Any, g: Any, mean: Any) -> list[Any]:
    away = strip.builder.fsub(x, mean)
    return [strip.multiply_add(away, away, held[0])]


def _products(strip: Strip, held: list[Any], x: Any, g: Any, mean: Any) -> list[Any]:
    return [strip.builder.fadd(held[0], g), strip.multiply_add(g, strip.builder.fsub(x, mean), held[1])]


_SUM, _SQUARES, _PRODUCTS = _lane_sums(1, _values), _lane_sums(1, _squares), _lane_sums(2, _products)


@inlined
def _sum(values: Any) -> float:  # pragma: no cover - compiled
    whole, address = 0.0, values.ctypes.data
    for begin in range(0, values.size, PART):
        (part,) = _SUM(address + SIZE * begin, address, np.float32(0), min(PART, values.size - begin))
        whole += part
    return whole


@inlined
def _variation(values: Any, mean: Any) -> float:  # pragma: no cover - compiled
    """Σ (values - mean)²."""
    whole, address = 0.0, values.ctypes.data
    for begin in range(0, values.size, PART):
        (part,) = _SQUARES(address + SIZE * begin, address, mean, min(PART, values.size - begin))
        whole += part
    return whole


@kernel
def norm_forward(x: Any, weight: Any, bias: Any, eps: float, out: Any, mean: Any, var: Any) -> None:  # pragma: no cover - compiled
    """Batch norm of x (C, n) over each row; mean and var (C,), biased, are filled in."""
    count = x.shape[1]
    for c in range(x.shape[0]):
        mean[c] = _sum(x[c]) / count
        var[c] = _variation(x[c], mean[c]) / count
        scale = np.float32(weight[c] / np.sqrt(np.float64(var[c]) + eps))
        shift = multiply_add(-mean[c], scale, bias[c])
        for k in range(count):
            out[c, k] = multiply_add(x[c, k], scale, shift)


@inlined
def _dots(x: Any, g: Any, mean: Any) -> tuple[float, float]:  # pragma: no cover - compiled
    """Σ g and Σ g (x - mean)."""
    whole, product, px, pg = 0.0, 0.0, x.ctypes.data, g.ctypes.data
    for begin in range(0, x.size, PART):
        part, both = _PRODUCTS(px + SIZE * begin, pg + SIZE * begin, mean, min(PART, x.size - begin))
        whole += part
        product += both
    return whole, product


@kernel
def norm_backward(
    x: Any, g: Any, weight: Any, eps: float, mean: Any, var: Any, into: Any, by_weight: Any, by_bias: Any
) -> None:  # pragma: no cover - compiled
    """Gradients of `norm_forward` from that of its output, g (C, n)."""
    count = x.shape[1]
    for c in range(x.shape[0]):
        inverse = 1.0 / np.sqrt(np.float64(var[c]) + eps)
        whole, product = _dots(x[c], g[c], mean[c])
        by_bias[c], by_weight[c] = whole, product * inverse
        scale = np.float32(weight[c] * inverse)
        slope = np.float32(product * inverse * inverse / count)
        offset = np.float32(whole / count)
        for k in range(count):
            into[c, k] = scale * multiply_add(mean[c] - x[c, k], slope, g[c, k] - offset)


@kernel
def group_forward(x: Any, weight: Any, bias: Any, eps: float, out: Any, mean: Any, inverse: Any) -> None:  # pragma: no cover - compiled
    """Group norm of one group, x (C, P, B) over channels and positions; mean and 1 / deviation (B,) are filled in."""
    channels, positions, images = x.shape
    count = channels * positions
    whole, part = np.zeros(images), np.empty(images, np.float32)
    for c in range(channels):
        part[:] = 0.0
        for p in range(positions):
            for b in range(images):
                part[b] += x[c, p, b]
        for b in range(images):
            whole[b] += part[b]
    for b in range(images):
        mean[b] = whole[b] / count
        whole[b] = 0.0
    for c in range(channels):
        part[:] = 0.0
        for p in range(positions):
            for b in range(images):
                away = x[c, p, b] - mean[b]
                part[b] = multiply_add(away, away, part[b])
        for b in range(images):
            whole[b] += part[b]
    for b in range(images):
        inverse[b] = 1.0 / np.sqrt(whole[b] / count + eps)
    for c in range(channels):
        for p in range(positions):
            for b in range(images):
                out[c, p, b] = multiply_add((x[c, p, b] - mean[b]) * inverse[b], weight[c], bias[c])


@kernel
def group_backward(
    x: Any, g: Any, weight: Any, mean: Any, inverse: Any, into: Any, by_weight: Any, by_bias: Any
) -> None:  # pragma: no cover - compiled
    """Gradients of `group_forward` from that of its output, g (C, P, B)."""
    channels, positions, images = x.shape
    slope, offset = np.zeros(images), np.zeros(images)
    plain, scaled = np.empty(images, np.float32), np.empty(images, np.float32)
    for c in range(channels):
        plain[:] = 0.0
        scaled[:] = 0.0
        for p in range(positions):
            for b in range(images):
                plain[b] += g[c, p, b]
                scaled[b] = multiply_add(g[c, p, b], (x[c, p, b] - mean[b]) * inverse[b], scaled[b])
        by_bias[c], by_weight[c] = _sum(plain), _sum(scaled)
        for b in range(images):
            offset[b] += weight[c] * plain[b]
            slope[b] += weight[c] * scaled[b]
    for b in range(images):
        plain[b] = offset[b] / (channels * positions)
        scaled[b] = slope[b] / (channels * positions)
    for c in range(channels):
        for p in range(positions):
            for b in range(images):
                away = (x[c, p, b] - mean[b]) * inverse[b]
                into[c, p, b] = inverse[b] * multiply_add(-away, scaled[b], multiply_add(weight[c], g[c, p, b], -plain[b]))
