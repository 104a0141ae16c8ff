"""The CPU kernels: sparse layers against dense ones in float64, norms, pools and the optimiser's step against torch's own."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels.sparse import chwn_layout, layers, padding, walk
from fedsim.kernels.sparse.chwn_layout import ToChwn, ToNchw, as_chwn, as_nchw, empty_chwn
from fedsim.kernels.sparse.pattern import Geometry, Pattern
from fedsim.kernels.sparse.sgd import spread, steps
from fedsim.nn import optim
from fedsim.nn.runtime import chwn, replace
from fedsim.nn.runtime.call_context import CallContext

GRID = [  # I, O, H, W, B, kernel, stride, padding, dilation, groups
    (4, 6, 8, 8, 10, 3, 1, 1, 1, 1),
    (4, 6, 8, 8, 32, 3, 2, 1, 1, 1),
    (4, 6, 7, 9, 5, 3, 2, 1, 1, 1),
    (4, 6, 8, 8, 7, 1, 2, 0, 1, 1),
    (4, 8, 8, 8, 1, 1, 1, 0, 1, 1),
    (4, 4, 8, 8, 3, 3, 1, 1, 1, 4),
    (4, 8, 9, 9, 3, 3, 2, 1, 1, 4),
    (4, 6, 12, 12, 2, 5, 1, 0, 1, 1),
    (4, 6, 12, 12, 2, 3, 1, 2, 2, 2),
    (4, 6, 12, 11, 2, 3, 3, 2, 2, 1),
    (4, 6, 4, 4, 33, 3, 1, 1, 1, 1),
    (3, 5, 6, 6, 4, 2, 2, 0, 1, 1),
    (3, 5, 7, 7, 4, 1, 3, 0, 1, 1),
    (4, 6, 9, 13, 16, 3, 2, 1, 1, 1),  # strips of two, four and eight columns, and what is left of a row
    (4, 6, 9, 14, 32, 3, 2, 1, 1, 2),
    (4, 6, 8, 11, 64, 3, 2, 1, 1, 1),
    (2, 3, 5, 6, 192, 3, 2, 1, 1, 1),
    (3, 5, 9, 26, 16, 1, 2, 0, 1, 1),
    (3, 5, 9, 12, 32, 1, 3, 0, 1, 1),
    (3, 4, 10, 10, 16, 5, 3, 2, 2, 1),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_chwn(x: Tensor) -> Tensor:
    """x in CHWN layout."""
    return as_chwn(x).movedim(-1, 0)


def near(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    """Within a share of the largest value, or of 1, the size of what is drawn, where larger ones cancelled."""
    assert found.shape == wanted.shape
    if wanted.numel():
        far = (found.detach().double() - wanted.detach().double()).abs().max()
        assert far <= share * wanted.detach().abs().max().clamp(min=1)


def agrees(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, way: Geometry) -> None:
    """Output and every gradient of the sparse layer, against the masked dense one in float64."""
    pattern = Pattern(mask, way)
    given = [x, pattern.values(weight), *([] if bias is None else [bias])]
    mine = [part.clone().requires_grad_() for part in given]
    theirs = [part.double().requires_grad_() for part in (x, weight * mask, *given[2:])]
    out = layers.conv2d(mine[0], mine[1], mine[2] if bias is not None else None, pattern)
    wanted = F.conv2d(*theirs, stride=way.stride, padding=way.padding, dilation=way.dilation, groups=way.groups)
    near(out, wanted)
    g = drawn(*wanted.shape, seed=1)
    found = torch.autograd.grad(out, mine, g)
    by_x, by_weight, *by_bias = torch.autograd.grad(wanted, theirs, g.double())
    for one, other in zip(found, (by_x, pattern.values(by_weight), *by_bias), strict=True):
        near(one, other)


# ---- sparse layers


@pytest.mark.parametrize("few", [walk.FEW, 0])  # lists for every cell, or padded
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_a_sparse_convolution_is_the_masked_dense_one(case, density, few, monkeypatch) -> None:
    monkeypatch.setattr(walk, "FEW", few)
    i, o, height, width, images, k, s, p, d, groups = case
    weight = drawn(o, i // groups, k, k, seed=2)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < density
    agrees(drawn(images, i, height, width), weight, drawn(o, seed=4), mask, Geometry((s, s), (p, p), (d, d), groups))


@pytest.mark.parametrize("images", [5, 16, 32, 64])
def test_strided_images_are_padded_and_sorted_only_where_a_strip_cannot_be_pieced_together(images) -> None:
    pattern = Pattern(torch.ones(2, 3, 3, 3, dtype=torch.bool), Geometry((2, 2), (1, 1)))
    way = walk.walk_of(pattern, (3, 6, 8, images))
    assert (way.phased, way.padded is not None) == (images == 5, images == 5)
    x = in_chwn(drawn(images, 3, 6, 8)).requires_grad_()
    out = layers.conv2d(x, drawn(54), None, pattern)
    assert (out.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()) == (images != 5)  # the backward pass keeps no copy


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDING = st.tuples(st.integers(0, 3), st.integers(0, 3))
SHARE = st.floats(0.0, 1.0)


@given(PAIR, PAIR, PADDING, PAIR, PAIR, PAIR, st.integers(1, 2), st.integers(1, 70), SHARE)
@settings(deadline=None, max_examples=60)
@example((1, 1), (2, 1), (1, 0), (1, 1), (1, 1), (1, 1), 1, 1, 1.0)  # a stride that leaves the size as it was
def test_any_convolution(kernel, stride, padding, dilation, room, channels, groups, images, density) -> None:
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, s - 2 * p) + r for s, p, r in zip(span, padding, room, strict=True)]
    weight = drawn(channels[0] * groups, channels[1], *kernel, seed=2)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < density
    agrees(drawn(images, channels[1] * groups, *size), weight, None, mask, Geometry(stride, padding, dilation, groups))


@pytest.mark.parametrize("images", [1, 3, 4, 7, 16, 21, 64, 85])  # 85 = 64 + 16 + 4 + 1, a strip of every width
def test_a_sparse_linear_layer_to_the_bit_in_small_whole_numbers(images) -> None:
    x = in_chwn((4 * drawn(images, 9)).round()) if images % 2 else (4 * drawn(images, 9)).round()
    weight, mask, bias = (4 * drawn(5, 9, seed=1)).round(), drawn(5, 9, seed=2) > 0.3, torch.arange(5.0)
    pattern = Pattern(mask)
    mine = [part.clone().requires_grad_() for part in (x, pattern.values(weight), bias)]
    theirs = [part.clone().requires_grad_() for part in (x, weight * mask, bias)]
    out, wanted = layers.linear(mine[0], mine[1], mine[2], pattern), F.linear(*theirs)
    assert torch.equal(out, wanted)
    g = (4 * drawn(images, 5, seed=3)).round()
    by_x, by_values, by_bias = torch.autograd.grad(out, mine, g)
    dense = torch.autograd.grad(wanted, theirs, g)
    assert torch.equal(by_x, dense[0])
    assert torch.equal(pattern.spread(by_values), dense[1] * mask)
    assert torch.equal(by_bias, dense[2])


def test_an_output_that_keeps_nothing_is_its_bias_and_an_input_that_nobody_reads_has_no_gradient() -> None:
    mask = torch.ones(3, 4, 3, 3, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    pattern, x = Pattern(mask, Geometry(padding=(1, 1))), drawn(6, 4, 5, 5).requires_grad_()
    values = pattern.values(drawn(3, 4, 3, 3, seed=1)).requires_grad_()
    out = layers.conv2d(x, values, torch.tensor([1.0, 2.5, 3.0]), pattern)
    assert (out[:, 1] == 2.5).all()
    by_x, by_values = torch.autograd.grad(out.square().sum(), (x, values))
    assert (by_x[:, 2] == 0).all()
    assert (by_x[:, [0, 1, 3]] != 0).all()
    assert pattern.spread(by_values)[~mask].eq(0).all()
    assert by_values.shape == (2 * 3 * 9,)


def test_layers_in_a_row_need_no_copy_and_take_a_relu_in_place() -> None:
    pattern = Pattern(drawn(4, 4, 3, 3) > 0, Geometry(padding=(1, 1)))
    x, values = drawn(6, 4, 5, 5).requires_grad_(), pattern.values(drawn(4, 4, 3, 3, seed=1))
    one = F.relu_(layers.conv2d(x, values, None, pattern))
    assert as_chwn(one).data_ptr() == one.data_ptr()
    two = layers.conv2d(one, values, None, pattern)
    assert as_chwn(two).data_ptr() == two.data_ptr()
    weight, y = pattern.spread(values).double(), x.detach().double().requires_grad_()
    wanted = F.conv2d(F.relu(F.conv2d(y, weight, padding=1)), weight, padding=1)
    near(two, wanted)
    near(torch.autograd.grad(two.sum(), x)[0], torch.autograd.grad(wanted.sum(), y)[0])


def test_what_keeps_the_kernels_from_a_device_is_reported() -> None:
    assert not layers.missing("cpu")
    assert layers.missing("cuda:99")  # which no machine has


# ---- patterns


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_values_and_spread_undo_each_other_and_both_orders_hold_every_kept_weight(o, i, k, seed) -> None:
    weight = drawn(o, i, k, k, seed=seed)
    mask = weight > 0.2
    pattern = Pattern(mask)
    assert torch.equal(pattern.spread(pattern.values(weight)), weight * mask)
    assert pattern.density == pytest.approx(float(mask.float().mean()))
    assert [b - a for a, b in pairwise(pattern.begins.tolist())] == mask.flatten(1).sum(1).tolist()
    assert [b - a for a, b in pairwise(pattern.begins_back[0].tolist())] == mask.transpose(0, 1).flatten(1).sum(1).tolist()
    assert pattern.order.sort().values.tolist() == list(range(len(pattern.kept)))
    assert torch.equal(pattern.owners.long(), mask.nonzero()[:, 0])


def test_a_sweep_is_made_once_and_refused_beyond_32_bits() -> None:
    pattern = Pattern(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert pattern.sweep(4, 4, 2) is pattern.sweep(4, 4, 2)
    pattern.sweep(2**15, 2**15, 1)
    with pytest.raises(ValueError, match="2 images of 32768 x 32768 in 1 channels are too many for 32-bit offsets"):
        pattern.sweep(2**15, 2**15, 2)
    wide = Pattern(torch.ones(2, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="32-bit"):
        wide.sweep(2**15, 2**15, 1)  # its output, not its input
    with pytest.raises(ValueError, match="32-bit"):
        walk.walk_of(wide, (1, 2**15, 2**15, 1))
    assert walk.walk_of(wide, (1, 4, 4, 2)) is walk.walk_of(wide, (1, 4, 4, 2))


# ---- layouts


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 7), (1, 3, 2, 2)])
def test_the_ways_inwards_and_outwards(shape) -> None:
    x = drawn(*shape)
    there = in_chwn(x)
    assert torch.equal(there, x)
    assert as_chwn(x).is_contiguous()
    assert as_chwn(there).data_ptr() == there.data_ptr()
    assert torch.equal(as_nchw(there), x)
    assert as_nchw(there).is_contiguous()
    assert as_nchw(x) is x
    assert torch.equal(as_nchw(x[:, ::2]), x[:, ::2])
    whole, images = empty_chwn(x, shape)
    assert (whole.shape, whole._base) == (x.shape, None)
    assert torch.equal(whole.copy_(x), images.movedim(-1, 0))
    assert images.is_contiguous()
    assert images.data_ptr() == whole.data_ptr()


def test_gradients_lie_as_what_they_are_gradients_of() -> None:
    x, g = drawn(5, 3, 4, 2), drawn(5, 3, 4, 2, seed=1)
    for way, start, back in ((ToChwn, x, in_chwn(g)), (ToNchw, in_chwn(x), g)):
        start = start.detach().requires_grad_()
        out = way.apply(start)
        (found,) = torch.autograd.grad(out, start, back)
        assert torch.equal(out, x)
        assert torch.equal(found, g)
        assert chwn_layout.is_chwn(out) != chwn_layout.is_chwn(start)
        assert found.stride() == start.stride()


# ---- norm and pools


@pytest.mark.parametrize(("shape", "mean"), [((10, 3, 4, 5), 0.0), ((32, 2, 9, 16), 10.0), ((2, 4, 1, 1), 1.0)])
@pytest.mark.parametrize("way", [chwn.batch_norm, chwn._by_torch])  # on the CPU, and that on CUDA
def test_batch_norm_is_torchs_in_double_precision(way, shape, mean) -> None:
    x, weight, bias = in_chwn(3 * drawn(*shape) + mean), drawn(shape[1], seed=1), drawn(shape[1], seed=2)
    mine = [part.clone().requires_grad_() for part in (x, weight, bias)]
    theirs = [part.double().requires_grad_() for part in (x, weight, bias)]
    out, found_mean, found_var = way(*mine, 0.5)
    wanted = F.batch_norm(theirs[0], None, None, theirs[1], theirs[2], True, 0.0, 0.5)
    near(out, wanted)
    assert chwn_layout.is_chwn(out)
    near(found_mean, theirs[0].mean((0, 2, 3)))
    near(found_var, theirs[0].var((0, 2, 3), correction=0))
    g = drawn(*shape, seed=3)
    for one, other in zip(torch.autograd.grad(out, mine, g), torch.autograd.grad(wanted, theirs, g.double()), strict=True):
        near(one, other)


def test_batch_norm_without_weights_is_that_with_one_and_nought() -> None:
    x = in_chwn(drawn(6, 3, 2, 2))
    out, _, _ = chwn.batch_norm(x, None, None, 1e-5)
    assert torch.equal(out, chwn.batch_norm(x, torch.ones(3), torch.zeros(3), 1e-5)[0])
    near(out, F.batch_norm(x.double(), None, None, training=True))


@pytest.mark.parametrize("shape", [(10, 3, 4, 5), (33, 2, 3, 1), (1, 4, 2, 2)])
def test_group_norm_is_torchs_in_double_precision(shape) -> None:
    x, weight, bias = in_chwn(3 * drawn(*shape) + 2), drawn(shape[1], seed=1), drawn(shape[1], seed=2)
    mine = [part.clone().requires_grad_() for part in (x, weight, bias)]
    theirs = [part.double().requires_grad_() for part in (x, weight, bias)]
    out, wanted = chwn.group_norm(*mine, 0.5), F.group_norm(theirs[0], 1, theirs[1], theirs[2], 0.5)
    near(out, wanted)
    g = drawn(*shape, seed=3)
    for one, other in zip(torch.autograd.grad(out, mine, g), torch.autograd.grad(wanted, theirs, g.double()), strict=True):
        near(one, other)
    near(chwn.group_norm(x, None, None, 0.5), F.group_norm(x.double(), 1, None, None, 0.5))


def pooled(pool: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient for 1, 2, 3 … as that of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = pool(x)
    g = torch.arange(1.0, 1 + out.numel()).view(out.shape)
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def placed(pool: nn.Module) -> nn.Module:
    """The pool as Net runs it where some other layer is sparse."""
    replace.replace_layers(pool, CallContext(patterns={"other": Pattern(torch.ones(1, 1))}))
    return pool


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], share: float = 0.0) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=share, atol=share, equal_nan=True)
        assert chwn_layout.is_chwn(one)


MAXIMA = [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (2, 3), "stride": 1, "dilation": 2}]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("ways", MAXIMA, ids=str)
def test_max_pool_is_torchs_to_the_bit(ways, ceil_mode) -> None:
    x = drawn(5, 3, 7, 8).mul(2).round()  # whole numbers: many ties, and the first of equals takes the gradient
    x[0, 0, 3, 3], x[1, 1, 2:4, 2:4], x[2] = torch.nan, torch.nan, -torch.inf
    wanted = pooled(nn.MaxPool2d(**ways, ceil_mode=ceil_mode), x)
    same(pooled(placed(nn.MaxPool2d(**ways, ceil_mode=ceil_mode)), in_chwn(x)), wanted)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("ways", [{"kernel_size": 4}, {"kernel_size": (3, 2), "stride": 2}, {"kernel_size": 3, "stride": (3, 1)}], ids=str)
def test_average_pool_is_torchs(ways, ceil_mode) -> None:
    x = drawn(5, 3, 8, 7)
    wanted = pooled(nn.AvgPool2d(**ways, ceil_mode=ceil_mode), x)
    same(pooled(placed(nn.AvgPool2d(**ways, ceil_mode=ceil_mode)), in_chwn(x)), wanted, 1e-6)


def test_pools_that_the_kernels_do_not_know_are_torchs_own() -> None:
    x = drawn(5, 3, 6, 6)
    for pool in (nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, divisor_override=3)):
        wanted = pool(x)
        torch.testing.assert_close(placed(pool)(in_chwn(x)), wanted)


# ---- the optimiser's step


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 5e-3), (0.0, 5e-3)])
def test_steps_along_kept_weights_are_those_of_torch(momentum, decay) -> None:
    mask = drawn(4, 3, 3, 3) > 0.5
    pattern, start = Pattern(mask), drawn(4, 3, 3, 3, seed=1) * mask
    w = nn.Parameter(start.double())
    optimiser = torch.optim.SGD([w], 0.1, momentum, weight_decay=decay)
    state = {"w/a": start.clone()} | ({"opt/momentum/a": torch.zeros_like(start)} if momentum else {})
    for number in range(5):
        g = drawn(4, 3, 3, 3, seed=10 + number) * mask
        w.grad = g.double()
        optimiser.step()
        state |= optim.sgd(state, {"w/a": spread(pattern, pattern.values(g))}, 0.1, momentum, decay)
    near(state["w/a"], w, 1e-6)
    assert state["w/a"][~mask].eq(0).all()
    if momentum:
        near(state["opt/momentum/a"], optimiser.state[w]["momentum_buffer"], 1e-6)
        assert state["opt/momentum/a"][~mask].eq(0).all()


def test_a_gradient_that_was_added_to_is_no_longer_one_at_the_kept_positions_alone() -> None:
    pattern = Pattern(drawn(3, 3) > 0)
    g: Any = spread(pattern, pattern.values(drawn(3, 3, seed=1)))
    assert steps(g)
    assert not steps(g + 1)
    assert not steps(g.clone())
    assert not steps(SimpleNamespace(gradient=g))


def test_positions_that_no_phase_reaches_are_written_too() -> None:
    """A kernel of 2 at stride 2 leaves the last of 5 rows and columns unread: their gradient is 0, whatever was in memory."""
    phases, none = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.zeros(2, np.int64)
    out = np.full((1, 5, 5, 3), np.nan, np.float32)
    padding.unpad(np.ones((4, 1, 2, 2, 3), np.float32), out, np.array([2, 2]), phases, none)
    expected = np.zeros_like(out)
    expected[:, :4, :4] = 1
    np.testing.assert_array_equal(out, expected)
