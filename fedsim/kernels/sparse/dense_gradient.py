"""The dense gradient of a sparse layer's weight, pruned positions too, in CHWN layout: one matrix product for each tap of the kernel.

The gradient of the output is widened by columns of 0 to the width of the padded images. Then the positions that a tap meets are one
stretch of each channel of both, and nothing is copied for it.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fedsim.kernels.sparse.pattern import Pattern


def dense_gradient(phases: Tensor, g: Tensor, pattern: Pattern) -> Tensor:
    """Like the mask, of phases (P, I, *plane, B) of the padded images and g (O, H', W', B)."""
    (outputs, height, width, count), across, groups = g.shape, phases.shape[-2], pattern.geometry.groups
    if across > width:
        wide = g.new_zeros(outputs, height, across, count)
        wide[:, :, :width] = g
        g = wide
    stretch = ((height - 1) * across + width) * count
    rows = g.reshape(groups, outputs // groups, -1)[:, :, :stretch]
    images = phases.view(len(phases), groups, pattern.inputs // groups, -1)
    found = g.new_empty(groups, outputs // groups, pattern.inputs // groups, *pattern.kernel)
    numbers = {tuple(phase): number for number, phase in enumerate(pattern.phases.tolist())}
    way = pattern.geometry
    for tap in product(*(range(size) for size in pattern.kernel)):
        (down, above), (right, left) = (divmod(t * d, s) for t, d, s in zip(tap, way.dilation, way.stride, strict=True))
        first = (down * across + right) * count
        met = images[numbers[above, left], :, :, first : first + stretch].transpose(1, 2)
        found[:, :, :, tap[0], tap[1]] = (rows[0] @ met[0]).unsqueeze(0) if groups == 1 else rows @ met
    return found.view(pattern.mask.shape)


def phases_of(images: Tensor, pattern: Pattern) -> Tensor:
    """(P, I, *plane, B) the phases of the padded images (I, H, W, B)."""
    (down, across), (top, left) = pattern.geometry.stride, pattern.geometry.padding
    size = images.shape[1], images.shape[2]
    plane = pattern.plane(size)
    if (down, across) == (1, 1) and plane == size:
        return images.unsqueeze(0)
    padded = images.new_zeros(len(images), down * plane[0], across * plane[1], images.shape[-1])
    room = padded[:, top : top + size[0], left : left + size[1]]
    room.copy_(images[:, : room.shape[1], : room.shape[2]])
    return (
        torch.stack([padded[:, a::down, b::across] for a, b in pattern.phases.tolist()])
        if (down, across) != (1, 1)
        else padded.unsqueeze(0)
    )
