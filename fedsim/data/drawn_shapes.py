"""`shapes`: labelled images drawn by us, the stand-in for CIFAR-like work where nothing can be downloaded.

An image is one geometric figure of random place, size, colour and angle (within 45 degrees) on a textured ground, with a small
distractor, a bar that may hide part of it, and pixel noise; the figure may be lighter or darker than the ground, so that no
pixel speaks for a class. The class is the figure: ten outlines, filled, then the same ten drawn as a line. Every image is a
function of the part (train, test), its number, size, channels and classes: the job's seed varies partition and weights only.

Measured, 3x32x32 in 10 classes, 10 epochs: a `cnn` of width 16 with batch norm reaches 80 % of the 2,000 test images from 5,000
training images and 89 % from 10,000; a linear classifier stays at 11 %. 12,000 images are drawn in 0.9 s on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.data.image_sets import Stored, moments
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput

DATA_SEED = 1
CHUNK = 500 * 32 * 32  # pixels drawn at once
LINE = 0.13  # half the width of a drawn line, in units of the figure


def shapes(settings: DataSettings) -> tuple[Stored, Stored]:
    """10,000 and 2,000 images of 3x32x32 in 10 classes, where the job does not say otherwise; image i is of class i mod C."""
    size, channels, classes = settings.image_size or 32, settings.channels or 3, settings.classes or 10
    if channels not in (1, 3):
        raise BadInput(f"[data] channels = {channels}: shapes are drawn in 1 or 3 channels")
    if classes > 2 * len(FIGURES):
        raise BadInput(f"[data] classes = {classes}: shapes has at most {2 * len(FIGURES)} classes")
    parts = {"train": settings.train_images or 10_000, "test": settings.test_images or 2_000}
    drawn = {part: _images(part, n, size, channels, classes) for part, n in parts.items()}
    mean, std = moments(drawn["train"])
    train, test = (Stored("shapes", x, torch.arange(len(x)) % classes, classes, mean, std) for x in drawn.values())
    return train, test


def _images(part: str, n: int, size: int, channels: int, classes: int) -> Tensor:
    """(n, C, size, size) uint8."""
    chunks = torch.arange(n).split(max(1, CHUNK // size**2))
    return torch.cat([_chunk(rng.key(DATA_SEED, "shapes", part, index), index % classes, size, channels) for index in chunks])


def _chunk(keys: Tensor, label: Tensor, size: int, channels: int) -> Tensor:
    """(b, C, size, size) uint8 of keys (b,) and classes (b,)."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack([line.expand(size, size), line[:, None].expand(size, size)])  # (2, H, W), x then y, in -1 … 1
    blur = 1.5 / size  # half a pixel and a bit: soft edges
    ground, ink = _colours(keys, channels)
    image = ground * _texture(keys, grid, channels)
    image = _paint(image, _distractor(keys, grid), ink.flip(1) if channels == 3 else 1 - ink, blur)
    image = _paint(image, _figure(keys, label, grid), ink * (0.85 + 0.15 * _texture(rng.fold(keys, "ink"), grid, channels)), blur)
    image = _paint(image, _bar(keys, grid), _bar_colour(keys, channels), blur)
    return ((image + _noise(keys, image.shape)) * 255).round().clamp(0, 255).to(torch.uint8)


def _paint(image: Tensor, distance: Tensor, colour: Tensor, blur: float) -> Tensor:
    """`colour` laid over the image where the signed distance (b, H, W) is negative."""
    cover = (0.5 - distance / (2 * blur)).clamp(0, 1).unsqueeze(1)
    return image * (1 - cover) + colour * cover


def _colours(keys: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Ground and ink, (b, C, 1, 1) each in 0 … 1, their mean brightness at least 0.3 apart, either being the lighter."""
    u = rng.uniform(rng.fold(keys, "colour"), 2 * channels + 2)
    dark, gap = 0.1 + 0.4 * u[:, -1:], 0.3 + 0.25 * u[:, -2:-1]
    hue = 0.3 * (u[:, :-2] - 0.5) * (channels > 1)
    swap = (rng.uniform(rng.fold(keys, "swap"), 1) < 0.5).float()
    pair = torch.stack([dark + gap * swap + hue[:, :channels], dark + gap * (1 - swap) + hue[:, channels:]])
    ground, ink = pair.clamp(0.02, 1).unsqueeze(-1).unsqueeze(-1)
    return ground, ink


def _texture(keys: Tensor, grid: Tensor, channels: int) -> Tensor:
    """(b, C, H, W) around 1: a slope and two plane waves of random direction, frequency and phase."""
    u = rng.uniform(rng.fold(keys, "texture"), 8).unsqueeze(-1).unsqueeze(-1)  # (b, 8, 1, 1)
    slope = 0.2 * _along(grid, u[:, 0])
    waves = sum(torch.sin(_along(grid, u[:, i]) * (3 + 14 * u[:, i + 1]) + 2 * pi * u[:, i + 2]) for i in (1, 4))
    return (1 + slope + 0.1 * waves).unsqueeze(1).expand(-1, channels, -1, -1)


def _along(grid: Tensor, turn: Tensor) -> Tensor:
    """(b, H, W) coordinate along the direction of `turn` (b, 1, 1) full turns."""
    return grid[0] * torch.cos(2 * pi * turn) + grid[1] * torch.sin(2 * pi * turn)


def _noise(keys: Tensor, shape: torch.Size) -> Tensor:
    """Pixel noise of standard deviation 0.04, the sum of two uniform bytes."""
    count = shape[1:].numel()
    raw = rng.bits(rng.fold(keys, "noise"), -(-count // 4)).view(torch.uint8)[:, : 2 * count].view(-1, 2, count)
    return (raw.sum(1).float() / 255 - 1).view(shape) * (0.04 * 6**0.5)


def _figure(keys: Tensor, label: Tensor, grid: Tensor) -> Tensor:
    """(b, H, W) signed distance to each image's figure."""
    u = rng.uniform(rng.fold(keys, "figure"), 5)
    scale = (0.4 + 0.3 * u[:, 0]).view(-1, 1, 1)
    place = 0.3 * (2 * u[:, 1:3] - 1)
    x, y = _framed(grid, place, 0.25 * (u[:, 3] - 0.5), scale)
    x = x * (0.85 + 0.3 * u[:, 4]).view(-1, 1, 1)  # a little narrower or wider
    distance = torch.empty_like(x)
    for c, figure in enumerate(FIGURES):
        mine = label % len(FIGURES) == c
        distance[mine] = figure(x[mine], y[mine])
    outlined = (label >= len(FIGURES)).view(-1, 1, 1)
    return torch.where(outlined, distance.abs() - LINE, distance) * scale


def _framed(grid: Tensor, place: Tensor, turn: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (b, H, W) in the frame of a figure at `place` (b, 2), turned by `turn` (b,), of size `scale` (b, 1, 1)."""
    x, y = grid[0] - place[:, 0].view(-1, 1, 1), grid[1] - place[:, 1].view(-1, 1, 1)
    cos, sin = torch.cos(2 * pi * turn).view(-1, 1, 1), torch.sin(2 * pi * turn).view(-1, 1, 1)
    return (x * cos + y * sin) / scale, (y * cos - x * sin) / scale


def _distractor(keys: Tensor, grid: Tensor) -> Tensor:
    """(b, H, W) signed distance to a small disc or square somewhere."""
    u = rng.uniform(rng.fold(keys, "distractor"), 5)
    x, y = _framed(grid, 1.8 * (u[:, :2] - 0.5), u[:, 2], (0.12 + 0.1 * u[:, 3]).view(-1, 1, 1))
    return torch.where((u[:, 4] < 0.5).view(-1, 1, 1), disc(x, y), square(x, y)) * 0.15


def _bar(keys: Tensor, grid: Tensor) -> Tensor:
    """(b, H, W) signed distance to a bar across the image, in 4 of 10 images; elsewhere far away."""
    u = rng.uniform(rng.fold(keys, "bar"), 4).unsqueeze(-1).unsqueeze(-1)
    away = torch.where(u[:, 3] < 0.4, 0.0, 10.0)
    return (_along(grid, u[:, 0]) - 1.4 * (u[:, 1] - 0.5)).abs() - (0.05 + 0.1 * u[:, 2]) + away


def _bar_colour(keys: Tensor, channels: int) -> Tensor:
    return rng.uniform(rng.fold(keys, "bar colour"), channels).unsqueeze(-1).unsqueeze(-1)


# The figures: signed distance (or a bound with the same sign) of points x, y (…) in a frame where the figure spans about -1 … 1.
def disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """An upright rectangle of half sides `width` and `height` at the origin."""
    return torch.maximum(x.abs() - width, y.abs() - height)


def square(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, 0.8, 0.8)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.6, x.abs() * 0.87 - y * 0.5 - 0.5)


def plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, 1.0, 0.33), box(x, y, 0.33, 1.0))


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the radius as a zigzag over the angle."""
    fifth = (torch.atan2(y, x) * (5 / (2 * pi))).remainder(1.0)
    return (torch.hypot(x, y) - (0.42 + 1.3 * (fifth - 0.5).abs())) * 0.6


def crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.75 - torch.hypot(x - 0.55, y))


def bar(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, 1.1, 0.35)


def corner(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x + 0.55, y, 0.3, 0.9), box(x, y - 0.6, 0.85, 0.3))


def tee(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y + 0.6, 0.9, 0.3), box(x, y, 0.3, 0.9))


def half_disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y + 0.4) - 1.0, -y - 0.4)


FIGURES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (disc, square, triangle, plus, star, crescent, bar, corner, tee, half_disc)
