"""Pooling by windows of 2 × 2 gives torch's own bits, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.types import Batch
from fedsim.kernels.max_pool import halved, takes
from fedsim.nn.net import Net


def images(*shape: int) -> Tensor:
    """Few distinct values, so that many windows have equal ones, and some that are no numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).mul(2).round()
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.05, torch.nan)


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 7), (8, 14), (16, 16), (5, 30), (2, 47)])
def test_values_and_gradients_are_torchs_own(size: tuple[int, int]) -> None:
    one, other = (images(3, 5, *size).requires_grad_() for _ in range(2))
    found, wanted = halved(one), F.max_pool2d(other, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    found.backward(g)
    wanted.backward(g)
    assert one.grad is not None
    assert other.grad is not None
    assert torch.equal(one.grad, other.grad)


def test_other_pools_and_layouts_are_left_to_torch() -> None:
    x = torch.zeros(2, 3, 8, 8)
    assert takes(x, nn.MaxPool2d(2))
    assert takes(x, nn.MaxPool2d((2, 2), (2, 2)))
    others = [nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, ceil_mode=True)]
    assert not any(takes(x, pool) for pool in others)
    assert not any(takes(y, nn.MaxPool2d(2)) for y in (x.double(), x.contiguous(memory_format=torch.channels_last), x[0], x[..., :1]))


def test_a_net_pools_so() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    net, x, y = Net(module), images(5, 2, 8, 8).nan_to_num(0), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        loss, found, _, _ = net.gradient(net.initial, Batch(x, y, None, torch.tensor(0), torch.tensor(1)))
    wanted = F.cross_entropy(module(x), y)
    wanted.backward()
    assert loss == wanted
    assert all(torch.equal(found["w/" + name], value.grad) for name, value in module.named_parameters() if value.grad is not None)
