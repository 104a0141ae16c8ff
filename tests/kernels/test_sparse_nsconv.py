"""The normalised weight from kept values alone, and its derivatives, against the whole masked weight in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.kernels import nsconv
from fedsim.kernels.sparse.nsconv import normalised
from fedsim.kernels.sparse.pattern import Pattern


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(shape: tuple[int, ...]) -> Tensor:
    """Filter 1 keeps nothing, filter 2 a single entry, filter 3 all."""
    mask = drawn(*shape, seed=1) > 0.4
    mask[1:3], mask[3] = False, True
    mask[2].view(-1)[3] = True
    return mask


@pytest.mark.parametrize("over", ["all", "kept"])
@pytest.mark.parametrize("size", [1.0, 1e-4])  # where the filters of a small weight have N s^2 below the least
def test_kept_values_give_what_the_whole_weight_gives(over, size) -> None:
    mask, gain = mask_of((6, 5, 3, 3)), drawn(6, seed=2)
    pattern, w = Pattern(mask), size * (drawn(6, 5, 3, 3) + 0.3)
    mine = [pattern.values(w).requires_grad_(), gain.clone().requires_grad_()]
    theirs = [(w * mask).double().requires_grad_(), gain.double().requires_grad_()]
    out, wanted = normalised(*mine, pattern, over), nsconv.normalised(*theirs, mask, over)
    torch.testing.assert_close(pattern.spread(out.detach()).double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    g = drawn(*w.shape, seed=3)
    by_values, by_gain = torch.autograd.grad(out, mine, pattern.values(g))
    by_weight, dense_gain = torch.autograd.grad(wanted, theirs, g.double() * mask)
    largest = by_weight.abs().max()
    torch.testing.assert_close(by_values.double() / largest, pattern.values(by_weight) / largest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_gain.double(), dense_gain, rtol=1e-5, atol=1e-6)
    moved, gained = nsconv.slopes(g.double() * mask, (w * mask).double(), gain.double(), mask, over)  # what the dense layers use
    torch.testing.assert_close(by_values.double() / largest, pattern.values(moved) / largest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_gain.double(), gained, rtol=1e-5, atol=1e-6)


def test_a_grown_weight_of_zero_is_alive() -> None:
    pattern = Pattern(torch.ones(1, 4, 1, 1, dtype=torch.bool))
    w = torch.tensor([0.0, 1, 2, 4])
    assert normalised(w, torch.ones(1), pattern)[0] == pytest.approx(float(-w.mean() / (4 * w.var()).sqrt()))
