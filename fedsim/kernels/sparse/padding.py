"""Padding of CHWN images, sorted by the phases of a strided convolution."""

from __future__ import annotations

from typing import Any

from fedsim.core.compiled import inlined, kernel


@inlined
def _copy(into: Any, values: Any) -> None:  # pragma: no cover - compiled
    for k in range(into.size):
        into[k] = values[k]


@inlined
def _clear(into: Any) -> None:  # pragma: no cover - compiled
    for k in range(into.size):
        into[k] = 0.0


@kernel
def pad(x: Any, out: Any, stride: Any, phases: Any, begin: Any) -> None:  # pragma: no cover - compiled
    """out (P, C, H', W', B): where the strides (2,) leave phase p = (a, b), out[p, c, Y, X] is x[c, sY + a - top, sX + b - left].

    `begin` (2,) is (top, left); positions outside x (C, H, W, B) are 0.
    """
    channels, height, width, count = x.shape
    whole = out.shape[3] * count
    for p in range(out.shape[0]):
        top, left = begin[0] - phases[p, 0], begin[1] - phases[p, 1]
        for c in range(channels):
            for row in range(out.shape[2]):
                y = row * stride[0] - top
                if y < 0 or y >= height:
                    _clear(out[p, c, row].reshape(whole))
                elif stride[1] == 1:
                    to, of = out[p, c, row].reshape(whole), x[c, y].reshape(width * count)
                    first, last = max(0, left) * count, min(out.shape[3], width + left) * count
                    _clear(to[:first])
                    _copy(to[first:last], of[first - left * count : last - left * count])
                    _clear(to[last:])
                else:
                    for column in range(out.shape[3]):
                        at = column * stride[1] - left
                        if at < 0 or at >= width:
                            _clear(out[p, c, row, column])
                        else:
                            _copy(out[p, c, row, column], x[c, y, at])


@kernel
def unpad(padded: Any, out: Any, stride: Any, phases: Any, begin: Any) -> None:  # pragma: no cover - compiled
    """The inverse of `pad`: every position of out (C, H, W, B) from its phase, 0 where that is not among the phases."""
    channels, height, width, _ = out.shape
    every = padded.shape[0] == stride[0] * stride[1]
    if not every or padded.shape[2] * stride[0] - begin[0] < height or padded.shape[3] * stride[1] - begin[1] < width:
        out[:] = 0.0
    for p in range(padded.shape[0]):
        top, left = begin[0] - phases[p, 0], begin[1] - phases[p, 1]
        for c in range(channels):
            for row in range(padded.shape[2]):
                y = row * stride[0] - top
                if 0 <= y < height:
                    for column in range(padded.shape[3]):
                        at = column * stride[1] - left
                        if 0 <= at < width:
                            _copy(out[c, y, at], padded[p, c, row, column])
