"""Augmentation and feature skew as seeded tensor work on float images (M, C, H, W) in [0, 1]; every image has its own key (M,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.core import rng

NAMES = ("crop", "flip", "cutout")


def moved(x: Tensor, keys: Tensor, pad: int, flip: bool, border: str = "zeros") -> Tensor:
    """Each image shifted by up to `pad` pixels either way within a border of zeros, or its reflection; mirrored or not; in one gather."""
    count, _, height, width = x.shape
    shift = rng.integers(rng.fold(keys, "crop"), 2, 2 * pad + 1)  # (M, 2)
    rows = shift[:, :1] + torch.arange(height, device=x.device)  # (M, H)
    columns = shift[:, 1:] + torch.arange(width, device=x.device)
    if flip:
        mirrored = rng.integers(rng.fold(keys, "flip"), 1, 2).bool()
        columns = torch.where(mirrored, columns.flip(-1), columns)
    padded = F.pad(x, (pad, pad, pad, pad), mode="constant" if border == "zeros" else border)
    images = torch.arange(count, device=x.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[images, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def cut_out(x: Tensor, keys: Tensor, hole: int) -> Tensor:
    """A square of `hole` pixels set to 0 (Cutout, arXiv:1708.04552). Its centre is anywhere, so parts of it may fall outside."""
    _, _, height, width = x.shape
    spot = rng.uniform(rng.fold(keys, "cutout"), 2)
    rows = torch.arange(height, device=x.device) - (spot[:, :1] * height).floor()  # (M, H)
    columns = torch.arange(width, device=x.device) - (spot[:, 1:] * width).floor()
    inside = ((rows >= -(hole // 2)) & (rows < hole - hole // 2)).unsqueeze(2) & (
        (columns >= -(hole // 2)) & (columns < hole - hole // 2)
    ).unsqueeze(1)
    return x * ~inside.unsqueeze(1)


def noisy(x: Tensor, keys: Tensor, std: Tensor) -> Tensor:
    """x plus normal noise of standard deviation `std` (M,)."""
    return x + rng.normal(keys, x[0].numel()).view_as(x) * std.view(-1, 1, 1, 1)


def rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned by `degrees` (M,) about its centre, bilinear, zeros outside."""
    angle = torch.deg2rad(degrees.double()).float()
    cos, sin, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, nothing], -1), torch.stack([sin, cos, nothing], -1)], 1)  # (M, 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)
