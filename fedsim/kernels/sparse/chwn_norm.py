"""Batch norm and group norm in CHWN layout: images (C, H, W, B), each channel one contiguous plane."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SUMS = {"reassoc", "contract", "nsz"}  # a sum may be taken in lanes


@njit(cache=True, nogil=True, fastmath=SUMS)
def _sum(values: Any) -> float:  # pragma: no cover - compiled
    whole = 0.0
    for begin in range(0, values.size, 4096):
        part: Any = np.float32(0)
        for k in range(begin, min(begin + 4096, values.size)):
            part += values[k]
        whole += part
    return whole


@njit(cache=True, nogil=True, fastmath=SUMS)
def _squares(values: Any, mean: Any) -> float:  # pragma: no cover - compiled
    whole = 0.0
    for begin in range(0, values.size, 4096):
        part: Any = np.float32(0)
        for k in range(begin, min(begin + 4096, values.size)):
            away = values[k] - mean
            part += away * away
        whole += part
    return whole


@njit(cache=True, nogil=True, fastmath=SUMS)
def norm_forward(x: Any, weight: Any, bias: Any, eps: float, out: Any, mean: Any, var: Any) -> None:  # pragma: no cover - compiled
    """Batch norm of x (C, n) over each row; mean and var (C,), biased, are filled in."""
    count = x.shape[1]
    for c in range(x.shape[0]):
        mean[c] = _sum(x[c]) / count
        var[c] = _squares(x[c], mean[c]) / count
        scale = np.float32(weight[c] / np.sqrt(np.float64(var[c]) + eps))
        shift = bias[c] - mean[c] * scale
        for k in range(count):
            out[c, k] = x[c, k] * scale + shift


@njit(cache=True, nogil=True, fastmath=SUMS)
def _dots(x: Any, g: Any, mean: Any) -> tuple[float, float]:  # pragma: no cover - compiled
    """Σ g and Σ g (x - mean)."""
    whole, product = 0.0, 0.0
    for begin in range(0, x.size, 4096):
        part: Any = np.float32(0)
        both: Any = np.float32(0)
        for k in range(begin, min(begin + 4096, x.size)):
            part += g[k]
            both += g[k] * (x[k] - mean)
        whole += part
        product += both
    return whole, product


@njit(cache=True, nogil=True, fastmath=SUMS)
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
            into[c, k] = scale * (g[c, k] - offset - (x[c, k] - mean[c]) * slope)


@njit(cache=True, nogil=True, fastmath=SUMS)
def group_forward(x: Any, weight: Any, bias: Any, eps: float, out: Any, mean: Any, inverse: Any) -> None:  # pragma: no cover - compiled
    """Group norm of one group, x (C, P, B) over channels and positions; mean and 1 / deviation (B,) are filled in."""
    channels, positions, images = x.shape
    count = channels * positions
    whole, part = np.zeros(images), np.empty(images, np.float32)
    for c in range(channels):
        part[:] = 0.0
        for p in range(positions):
            part += x[c, p]
        whole += part
    mean[:] = whole / count
    whole[:] = 0.0
    for c in range(channels):
        part[:] = 0.0
        for p in range(positions):
            for b in range(images):
                away = x[c, p, b] - mean[b]
                part[b] += away * away
        whole += part
    inverse[:] = 1.0 / np.sqrt(whole / count + eps)
    for c in range(channels):
        for p in range(positions):
            for b in range(images):
                out[c, p, b] = (x[c, p, b] - mean[b]) * inverse[b] * weight[c] + bias[c]


@njit(cache=True, nogil=True, fastmath=SUMS)
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
                scaled[b] += g[c, p, b] * (x[c, p, b] - mean[b]) * inverse[b]
        by_bias[c], by_weight[c] = plain.sum(), scaled.sum()
        offset += weight[c] * plain
        slope += weight[c] * scaled
    plain[:] = offset / (channels * positions)
    scaled[:] = slope / (channels * positions)
    for c in range(channels):
        for p in range(positions):
            for b in range(images):
                away = (x[c, p, b] - mean[b]) * inverse[b]
                into[c, p, b] = inverse[b] * (weight[c] * g[c, p, b] - plain[b] - away * scaled[b])
