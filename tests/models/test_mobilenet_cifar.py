"""mobilenet_v2_cifar: the counts that DWFNP's network has, by arithmetic, its sizes, and what its blocks compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import models
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.net import Net

NAME, IMAGE = "mobilenet_v2_cifar", (3, 32, 32)
STAGES = [(16, 1, 1), (24, 2, 1), (32, 3, 1), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]  # channels, blocks, stride of the first


def blocks() -> list[tuple[int, int, int, int]]:
    """Of each block: channels that enter, that the gates are of, that leave, and its stride."""
    leave = [channels for channels, number, _ in STAGES for _ in range(number)]
    strides = [stride if i == 0 else 1 for _, number, stride in STAGES for i in range(number)]
    enter = [32, *leave[:-1]]
    return [(a, a if i == 0 else 6 * a, b, stride) for i, (a, b, stride) in enumerate(zip(enter, leave, strides, strict=True))]


def built(norm: str = "group", **fields: int) -> nn.Module:
    return models.build(ModelSettings(NAME, norm=norm, **fields), IMAGE, 10, 0)  # type: ignore[arg-type]


def test_17_gated_layers_7136_gates_and_2297754_parameters() -> None:
    module = built()
    channels = Net(module).channels
    assert channels.widths == [inner for _, inner, _, _ in blocks()]
    assert (len(channels.widths), channels.n) == (17, 7_136) == (17, sum(inner for _, inner, _, _ in blocks()))
    stem, head = 27 * 32 + 2 * 32, 320 * 1280 + 2 * 1280 + 1280 * 10 + 10
    inner = sum(a * c + 2 * c + 9 * c + 2 * c + c * b + 2 * b for a, c, b, _ in blocks())
    shortcuts = sum(a * b + 2 * b for a, _, b, stride in blocks() if stride == 1 and a != b)
    assert sum(value.numel() for value in module.parameters()) == stem + inner + shortcuts + head == 2_297_754


def test_the_sides_are_halved_at_the_fourth_and_the_sixth_stage() -> None:
    layers = profiler.profile(built(width=4), IMAGE).layers
    assert [layer.positions for layer in layers if layer.name.endswith("depthwise")] == [32**2] * 6 + [16**2] * 7 + [8**2] * 4


def test_the_network_is_its_formula() -> None:
    """With torch's functions alone, from the weights by their order in the network."""
    module = built("batch", width=8).double().eval()
    draw = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if value.dim() == 1 and value.is_floating_point():  # norms that do something
            value.copy_(torch.rand(value.shape, generator=draw, dtype=torch.float64) + (0.5 if "var" in name or "weight" in name else -0.5))
    x = torch.randn(3, *IMAGE, generator=draw, dtype=torch.float64)
    weights = iter([value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")])

    def normed(x: Tensor, stride: int = 1, around: int = 0, groups: int = 1) -> Tensor:
        x = F.conv2d(x, next(weights), None, stride, around, 1, groups)
        scale, shift, mean, variance = (next(weights).view(1, -1, 1, 1) for _ in range(4))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    h = normed(x, around=1).relu()
    for a, c, b, stride in blocks():
        inside = h
        h = normed(normed(normed(inside).relu(), stride, 1, c // 4).relu())
        if stride == 1:
            h = h + (normed(inside) if a != b else inside)
    h = normed(h).relu().mean((2, 3))
    torch.testing.assert_close(module(x), F.linear(h, next(weights), next(weights)), rtol=1e-9, atol=1e-9)
    assert next(weights, None) is None


@pytest.mark.parametrize("norm", ["group", "batch", "none", "nsconv"])
def test_no_activation_is_relu6(norm: str) -> None:
    assert not any(isinstance(layer, nn.ReLU6) for layer in built(norm, width=4).modules())
