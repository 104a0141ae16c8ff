"""Activation pruning: what is kept, what is exact, what is approximate, and that it holds under `vmap`, bf16 and every layout.

FedMef's acceptance checks 6, 7 and 12 (specification, section 8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.activation_pruning import ActivationPruning, count
from fedsim.kernels.activation_pruning import topk
from fedsim.kernels.activation_pruning.layers import Layer, Product, flat, form_of, operation, pruned, restored, shaped, transposed
from fedsim.kernels.activation_pruning.relu_and_pool import AveragePool, MaxPool, has_places, largest_of_windows, relu
from fedsim.kernels.nsconv import normalised

LAYERS = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "unpadded, dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depth-wise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "1x1": lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False),
    "oblong": lambda: nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(0, 2)),
    "linear": lambda: nn.Linear(9, 5),
    "linear on rows": lambda: nn.Linear(9, 5, bias=False),
}
SHARE = 0.3


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps meanwhile."""
    held: list[Tensor] = []  # so that a storage's address stays its own
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        held.append(value)
        found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def image(name: str, batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = {"linear": (batch, 9), "linear on rows": (batch, 7, 9)}.get(name, (batch, 4, 9, 9))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def zero_filled(x: Tensor, share: float) -> Tensor:
    """x with the entries of its stable sort by magnitude that come after the first k at 0."""
    order = x.flatten().abs().double().sort(descending=True, stable=True).indices
    return x.flatten().index_fill(0, order[count(x.numel(), share) :], 0).view(x.shape)


def gradients(layer: nn.Module, x: Tensor, share: float | None) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of the input and the parameters, for a fixed direction."""
    x = x.detach().requires_grad_()
    if share is None:
        out = layer(x)
    else:
        form = form_of(x, False)
        out = Layer(operation(layer), form=form)(x, pruned(x, None, ActivationPruning(share), form), layer.weight, layer.bias)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float32).to(out.dtype)
    return out, list(torch.autograd.grad(out, [x, *layer.parameters()], g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "chwn"])
@pytest.mark.parametrize("name", LAYERS)
def test_result_and_input_gradient_are_the_plain_layers_to_the_bit(name, layout, dtype) -> None:
    layer, x = LAYERS[name]().to(dtype), image(name, dtype=dtype)
    if x.dim() < 4 and layout != "contiguous":
        return
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "chwn":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    out, plain = gradients(layer, x, None)
    ours, found = gradients(layer, x, SHARE)
    assert torch.equal(out, ours)
    assert torch.equal(plain[0], found[0])
    for a, b in zip(plain[2:], found[2:], strict=True):  # the bias
        assert torch.equal(a, b)
    _, filled = gradients(layer, zero_filled(x, SHARE), None)
    torch.testing.assert_close(found[1], filled[1])
    assert not torch.allclose(found[1], plain[1])
    whole, kept = gradients(layer, x, 1.0)
    assert torch.equal(out, whole)
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b)


def test_the_count_of_kept_entries_and_their_bytes() -> None:
    assert count(10, 0.3) == 3
    assert count(320, 0.3) == 96
    assert count(7, 0.01) == 1
    assert ActivationPruning(0.3).bytes(320) == 424 == 0.33125 * 1280
    assert ActivationPruning(0.3, cache="int32").bytes(320) == 768
    assert ActivationPruning(0.5).bytes(320) == 0.53125 * 1280
    assert ActivationPruning(0.5, cache="int32").bytes(320) == 1280


@pytest.mark.parametrize("cache", ["bitmap", "int32"])
def test_a_cache_owns_its_bytes_and_no_more(cache) -> None:
    x = image("3x3")
    where, values = pruned(x, None, ActivationPruning(SHARE, cache=cache), "contiguous")
    assert where.untyped_storage().nbytes() + values.untyped_storage().nbytes() == ActivationPruning(SHARE, cache=cache).bytes(x.numel())
    assert torch.equal(restored((where, values), x.shape, "contiguous"), zero_filled(x, SHARE))


entries = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-140, -3.0, 1e30, 7.25]), min_size=1, max_size=70)


@settings(max_examples=200, deadline=None)
@given(entries, st.floats(0.01, 1.0), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_largest_are_those_of_a_stable_sort_here_and_on_any_device(values, share, dtype) -> None:
    x = torch.tensor(values, dtype=dtype).unsqueeze(0)
    k = count(x.shape[1], share)
    bits, kept = topk.select(x, None, k)
    order = x[0].abs().double().sort(descending=True, stable=True).indices[:k].sort().values
    chosen = torch.zeros(x.shape[1], dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(topk._unpacked(bits, x.shape[1])[0], chosen)
    assert torch.equal(kept[0], x[0, order])
    again = topk._select_anywhere(x, torch.tensor([k]), x.new_empty(1, k))
    assert torch.equal(bits, again[0])
    assert torch.equal(kept, again[1])
    assert torch.equal(topk.restore(bits, kept, x.shape[1])[0], torch.where(chosen, x[0], 0))
    assert torch.equal(topk.positions(bits, x.shape[1], k)[0].long(), order)


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "chwn"])
def test_equal_entries_are_kept_in_the_same_order_in_every_layout(form) -> None:
    """A dark background gives the same number at many places."""
    x = torch.randint(-2, 3, (4, 3, 5, 5), generator=torch.Generator().manual_seed(5)).float()
    wanted = zero_filled(x, 0.6)
    x = x.contiguous(memory_format=torch.channels_last) if form == "channels_last" else x
    x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if form == "chwn" else x
    assert form_of(x, False) == form
    assert torch.equal(restored(pruned(x, None, ActivationPruning(0.6), form), x.shape, form), wanted)
    entries, k = flat(x, form).unsqueeze(0), count(x.numel(), 0.6)
    anywhere = topk._select_anywhere(entries, torch.tensor([k]), entries.new_empty(1, k), transposed(x.shape, form))
    assert torch.equal(shaped(topk.restore(*anywhere, x.numel())[0], x.shape, form), wanted)


def test_padded_images_do_not_count() -> None:
    x, real = image("3x3", 6), torch.tensor([1.0, 1, 0, 1, 0, 0])
    cache = pruned(x * 1.0, real, ActivationPruning(SHARE), "contiguous")
    alone = zero_filled(x[real.bool()], SHARE)
    assert torch.equal(restored(cache, x.shape, "contiguous")[real.bool()], alone)
    assert int(topk._unpacked(cache[0].unsqueeze(0), x.numel()).sum()) == count(alone.numel(), SHARE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pack_of_clients_gives_what_each_gives_alone(name, padded) -> None:
    clients = 3
    layers = [LAYERS[name]() for _ in range(clients)]
    op, weights = operation(layers[0]), torch.stack([layer.weight.detach() for layer in layers])
    x = torch.stack([image(name) * (i + 1) for i in range(clients)])
    real = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]) if padded else None

    def loss(weight: Tensor, images: Tensor, real: Tensor | None) -> Tensor:
        out = relu(Layer(op)(images, pruned(images, real, ActivationPruning(SHARE), "contiguous"), weight, None), pure=True)
        seen = out if real is None else out * real.view(-1, *[1] * (out.dim() - 1))
        return seen.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))
    stacked = grads(weights, x, real) if padded else torch.func.vmap(torch.func.grad(partial(loss, real=None), argnums=(0, 1)))(weights, x)
    for i in range(clients):
        weight, images = weights[i].clone().requires_grad_(), x[i].clone().requires_grad_()
        alone = torch.autograd.grad(loss(weight, images, None if real is None else real[i]), (weight, images))
        for a, b in zip(alone, stacked, strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("over", ["all", "kept"])
def test_inside_a_normalised_convolution(over) -> None:
    """Check 12: at keep 1 the gradients are those of plain autograd through the effective weight; the rest as for plain layers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 9, 9, dtype=torch.float64, generator=generator)
    w, gain = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((6, 4, 3, 3), (6,)))
    mask, bias = torch.rand(w.shape, generator=generator) < 0.4, torch.randn(6, dtype=torch.float64, generator=generator)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    leaves = [value.requires_grad_() for value in (x, w, gain, bias)]
    plain = F.conv2d(x, normalised(w, gain, mask, over), bias, padding=1)
    g = torch.randn(plain.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad(plain, leaves, g)
    for share in (1.0, SHARE):
        ours = Layer(operation(layer), over)(x, pruned(x, None, ActivationPruning(share), "contiguous"), w, bias, gain, mask)
        found = torch.autograd.grad(ours, leaves, g)
        assert torch.equal(plain, ours)
        assert torch.equal(wanted[0], found[0])
        if share == 1:
            for a, b in zip(wanted, found, strict=True):
                torch.testing.assert_close(a, b * (mask if b.shape == w.shape else 1))
            assert not found[1][~mask].any()
        else:
            filled = torch.autograd.grad(F.conv2d(zero_filled(x, share), normalised(w, gain, mask, over), bias, padding=1), leaves[1:3], g)
            torch.testing.assert_close(filled[0] * mask, found[1])
            torch.testing.assert_close(filled[1], found[2])


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w, gain = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64, requires_grad=True)
    op = operation(nn.Conv2d(3, 4, 3))
    assert torch.autograd.gradcheck(lambda x, w, gain: Layer(op, "all")(x, None, w, None, gain, None), (x, w, gain))
    y = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: relu(y, 0.5, 1.7), (y,))
    assert torch.autograd.gradcheck(lambda y: MaxPool.apply(y, (3, 2), (2, 1), (1, 0), True)[0], (y,))
    assert torch.autograd.gradcheck(lambda y: AveragePool.apply(y, ([3, 2], [2, 2], [1, 0], True, False, None)), (y,))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 4), (1, 7)])
def test_a_relu_keeps_a_bit_an_entry(shape, dtype, inplace) -> None:
    x = torch.randn(shape).to(dtype)
    for kind, top, scale in ((nn.ReLU(), float("inf"), 1.0), (nn.ReLU6(), 6.0, 1.0)):
        leaf = (3 * x).requires_grad_()
        wanted = torch.autograd.grad(kind(leaf), leaf, x)[0]
        with saved_bytes() as saved:
            out = relu(leaf + 0, top, scale, inplace)
        assert torch.equal(out, kind(leaf))
        assert torch.equal(torch.autograd.grad(out, leaf, x)[0], wanted)
        assert sum(saved.values()) == -(-x.numel() // 8)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((1, 3), (2, 1), ceil_mode=True), nn.MaxPool2d(20, 1, 3)]
)
def test_a_max_pool_keeps_a_place_in_each_window(pool) -> None:
    x = torch.randn(4, 3, 21, 22).relu().requires_grad_()
    out = largest_of_windows(pool, x)
    assert has_places(pool)
    assert torch.equal(out, pool(x))
    g = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(pool(x), x, g)[0])
    together = torch.func.vmap(torch.func.grad(lambda x: largest_of_windows(pool, x).square().sum()))(x.detach().view(2, 2, 3, 21, 22))
    alone = torch.autograd.grad(pool(x).square().sum(), x)[0]
    torch.testing.assert_close(together.flatten(0, 1), alone)


def test_a_product_takes_inputs_of_any_rank() -> None:
    x, w = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    out = Layer(Product())(x, pruned(x, None, ActivationPruning(1.0), "contiguous"), w, None)
    for a, b in zip(torch.autograd.grad(out.sum(), (x, w)), torch.autograd.grad(F.linear(x, w).sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b)
