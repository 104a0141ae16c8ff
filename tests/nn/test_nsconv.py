"""Normalised sparse convolutions, and what a network that prunes its activations keeps for its backward pass.

FedMef's acceptance checks 8, 10, 11, 12 and 16 (specification, section 8).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.bench.memory import saved
from fedsim.core import masks
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.costs import flops, memory
from fedsim.errors import BadInput
from fedsim.kernels.activation_pruning.layers import Layer
from fedsim.kernels.nsconv import RELU_SCALE, normalised
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.layers.nsconv import NormalisedConv2d, ScaledReLU
from fedsim.nn.net import Net

KEEP = ActivationPruning(0.3)
MODELS = ["cnn", "lenet5", "resnet8", "resnet18", "vgg11", "mobilenet_v2", "mobilenet_v2_cifar"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def batch_of(images: int, shape: tuple[int, ...] = (3, 32, 32)) -> Batch:
    zero = torch.tensor(0)
    return Batch(torch.randn(images, *shape), torch.arange(images) % 10, None, zero, zero + 1)


def sparse(net: Net, density: float = 0.3) -> Tree:
    held = {f"mask/{layer}.weight": torch.rand(net.shapes[layer]) < density for layer in net.maskable}
    return masks.apply(net.initial, held) | held


def built(name: str, norm: str = "nsconv", width: int | None = None) -> nn.Module:
    return models.build(ModelSettings(name, norm=norm, width=width), (3, 32, 32), 10, 0)


# ---- the layer


def test_check_10_the_closed_form_of_a_normalised_filter() -> None:
    w, gain = torch.randn(8, 64, 3, 3, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    mask = torch.rand(w.shape) < 0.1
    w, n = w * mask, w[0].numel()
    mean, kept = w.mean((1, 2, 3)), mask.sum((1, 2, 3))
    about = (w - mean.view(-1, 1, 1, 1)).square().sum((1, 2, 3))
    found = normalised(w, gain, mask)
    wanted = gain**2 * (n - 1) / n * (1 - (n - kept) * mean**2 / about)
    torch.testing.assert_close(found.square().sum((1, 2, 3)), wanted, rtol=1e-12, atol=0)
    assert not found[~mask].any()
    torch.testing.assert_close(normalised(7.5 * w, gain, mask), found)


def test_check_10_at_a_tenth_of_576_zero_mean_weights() -> None:
    w = torch.randn(4000, 64, 3, 3)
    mask = torch.rand(w.shape) < 0.1
    squares = normalised(w, torch.ones(len(w)), mask).square().sum((1, 2, 3))
    assert abs(float(squares.mean()) - (1 - 1.9 / 576)) < 2e-4


def test_statistics_of_the_kept_entries_alone() -> None:
    w, mask = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.rand(5, 4, 3, 3) < 0.4
    found = normalised(w, torch.ones(5, dtype=torch.float64), mask, "kept")
    for row, kept in zip(found, mask, strict=True):
        assert abs(float(row[kept].mean())) < 1e-12
        assert float(row[kept].square().sum()) == pytest.approx((int(kept.sum()) - 1) / int(kept.sum()))


def test_a_filter_that_is_pruned_whole_is_nothing_and_spoils_nothing() -> None:
    mask = torch.ones(3, 2, 3, 3, dtype=torch.bool)
    mask[1] = False
    w, gain = torch.randn(mask.shape, requires_grad=True), torch.ones(3, requires_grad=True)
    found = normalised(w * mask, gain, mask)
    assert not found[1].any()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found.square().sum(), (w, gain)))


def test_check_11_the_growth_score_is_the_gradient_of_the_weight_in_use() -> None:
    """One filter of 64 entries keeps 14: the tap sees 50 numbers at its pruned ones, its stored weights have one."""
    net = Net(nn.Sequential(OrderedDict(a=NormalisedConv2d(3, 64, 1), r=nn.Tanh(), b=NormalisedConv2d(64, 2, 1), f=nn.Flatten())))
    mask = torch.zeros(2, 64, 1, 1, dtype=torch.bool)
    mask[:, :14] = True
    tree = masks.apply(net.initial, {"mask/b.weight": mask}) | {"mask/b.weight": mask}
    seen: dict[str, Tensor] = {}

    def tap(layer: str, g: Tensor) -> Tree:
        seen[layer] = g
        return {"top/seen": g.flatten()[:1]}

    batch = Batch(torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 0, 1]), None, torch.tensor(0), torch.tensor(1))
    for wrt in ("w", None):
        seen.clear()
        _, gradient, _, taps = net.gradient(tree, batch, wrt, tap=tap, layers=("b",))
        pruned = seen["b"][~mask].view(2, 50)
        assert [len(row.unique()) for row in pruned] == [50, 50]
        assert torch.equal(taps["top/seen"], seen["b"].flatten()[:1])
        assert wrt is None or not gradient["w/b.weight"][~mask].any()
    w = tree["w/b.weight"].clone().requires_grad_()
    stored = torch.autograd.grad(normalised(w, tree["w/b.gain"], mask), w, seen["b"])[0]
    assert [len(row.unique()) for row in stored[~mask].view(2, 50)] == [1, 1]
    torch.testing.assert_close(gradient.get("w/b.weight", stored * mask), stored * mask)


def test_a_stored_zero_that_grew_is_alive() -> None:
    mask = torch.ones(1, 4, 1, 1, dtype=torch.bool)
    w = torch.tensor([0.0, 1, 2, 4]).view(1, 4, 1, 1)
    mean, variance = w.mean(), w.var()
    assert normalised(w, torch.ones(1), mask)[0, 0, 0, 0] == pytest.approx(float(-mean / (4 * variance).sqrt()))


def test_the_scaled_relu_keeps_the_variance() -> None:
    x = torch.randn(1_000_000)
    assert float(ScaledReLU()(x).var()) == pytest.approx(1, abs=0.01)
    assert torch.equal(ScaledReLU()(x), RELU_SCALE * x.relu())


# ---- networks


@pytest.mark.parametrize("name", MODELS)
def test_check_16_no_norms_and_a_batch_of_one(name) -> None:
    module = built(name, width=None if name.startswith("mobilenet") else 8)
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    assert not [layer for layer in module.modules() if isinstance(layer, norms)]
    assert all(isinstance(layer, NormalisedConv2d) for layer in module.modules() if isinstance(layer, nn.Conv2d))
    net = Net(module)
    for keep in (None, KEEP):
        net.set_activation_pruning(keep)
        loss, gradient, buffers, _ = net.gradient(sparse(net), batch_of(1))
        assert loss.isfinite()
        assert not buffers
        assert all(bool(g.isfinite().all()) for g in gradient.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["nsconv", "batch"])
def test_check_12_at_keep_one_a_network_is_the_plain_one(name, norm) -> None:
    """To the bit in what it hands on; weights of linear layers get their gradients as another product."""
    net, batch = Net(built(name, norm, 8)), batch_of(4)
    tree = sparse(net, 0.5)
    plain = net.gradient(tree, batch)
    net.set_activation_pruning(ActivationPruning(1.0))
    ours = net.gradient(tree, batch)
    assert torch.equal(plain[0], ours[0])
    largest = max(float(g.abs().max()) for g in plain[1].values())
    for key, g in plain[1].items():
        assert float((g - ours[1][key]).abs().max()) <= 1e-6 * largest, key


def test_check_12_every_layer_but_the_first_is_pruned() -> None:
    net = Net(built("resnet8", width=8))
    net.set_activation_pruning(KEEP)
    prunes = {name: layer.may_prune for name, layer in net.module.named_modules() if hasattr(layer, "may_prune")}
    assert list(prunes) == list(net.sizes)
    assert [name for name, pruned in prunes.items() if not pruned] == ["conv1"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_check_8_saved_bytes_are_the_ledgers_to_the_byte(name, pruned, dtype) -> None:
    """Of NSConv networks: caches, bits of ReLUs and pools, the first input. Nothing of a weight's size but kept values."""
    module, keep = built(name, width=16 if name.startswith("mobilenet") else 8), KEEP if pruned else None
    net, batch = Net(module), batch_of(6)
    net.set_activation_pruning(keep)
    tree = sparse(net)
    if dtype is not None:
        if not pruned:
            return
        net.set_compute_dtype(dtype)
    activations, weights = saved(net, tree, batch)
    found = memory.saved(profiler.profile(module, (3, 32, 32), keep), 6)
    if dtype is None and name not in ("cnn", "lenet5", "vgg11"):
        assert activations == found.total + LOSS
    elif dtype is None:  # ReLUs before max pools; where nothing is pruned the rules count what torch's pools keep
        assert activations == found.total + LOSS if pruned else activations <= found.total
    else:
        assert activations < 0.7 * found.total
    assert not pruned or dtype is not None or weights <= 4 * sum(masks.ones(tree).values())
    assert (found["caches"] > 0) == (found["signs"] > 0) == pruned


LOSS = 4  # bytes of the loss's own weight


def test_check_8_with_an_ordinary_relu_the_full_tensor_is_still_kept() -> None:
    """The test of the test: a ReLU of a user's own function keeps its output, which is the next layer's input."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    def chain(activation: type[nn.Module]) -> nn.Module:
        layers = OrderedDict(a=nn.Conv2d(3, 8, 3, padding=1), r=activation(), b=nn.Conv2d(8, 8, 3, padding=1), s=activation())
        return nn.Sequential(OrderedDict(**layers, c=nn.Conv2d(8, 4, 3), p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten()))

    kept = {}
    for activation in (nn.ReLU, Own):
        net = Net(chain(activation))
        net.set_activation_pruning(KEEP)
        kept[activation] = saved(net, net.initial, batch_of(4))[0] - 4 * 4 * 3 * 32 * 32
    each = 4 * 8 * 32 * 32
    small = 4 * (8 + 4 * 4) + LOSS  # labels, log-probabilities
    assert kept[nn.ReLU] == 2 * KEEP.bytes(each) + 2 * each // 8 + small
    assert kept[Own] == 2 * KEEP.bytes(each) + 2 * 4 * each + small


def test_layers_that_read_the_same_tensor_share_a_cache(monkeypatch) -> None:
    found = profiler.profile(built("resnet18", "batch", 8), (3, 32, 32), KEEP)
    assert len(found.caches) == 20 - 3  # the shortcuts' three read what others do
    net = Net(built("resnet18", "batch", 8))
    net.set_activation_pruning(KEEP)
    caches: set[int] = set()
    before = Layer.__call__

    def called(self, x, cache, *rest):  # type: ignore[no-untyped-def]
        caches.add(id(cache[1]))
        return before(self, x, cache, *rest)

    monkeypatch.setattr(Layer, "__call__", called)
    for dtype in (None, torch.bfloat16):
        net.set_compute_dtype(dtype)
        caches.clear()
        net.gradient(net.initial, batch_of(2))
        assert len(caches) == 17


class Twice(nn.Module):
    """A tensor that a layer reads, that is then changed in place or not, and read by another."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first = self.b(y)
        y = y.mul_(3) if self.inplace else y * 3
        return (first + self.c(y)).mean((2, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tensor_that_was_changed_in_place_has_a_cache_of_its_own(packed) -> None:
    batch = replace(batch_of(3), y=torch.tensor([0, 1, 2]))

    def alone(net: Net, x: Tensor) -> Tree:
        return net.gradient(net.initial, replace(batch, x=x))[1]

    found = {}
    for inplace in (False, True):
        net = Net(Twice(inplace))
        net.set_activation_pruning(KEEP)
        found[inplace] = torch.func.vmap(partial(alone, net.under_vmap()))(batch.x[None]) if packed else alone(net, batch.x)
    for key, g in found[False].items():
        assert torch.equal(g, found[True][key]), key


def test_evaluation_and_passes_without_a_gradient_prune_nothing(monkeypatch) -> None:
    from fedsim.kernels.activation_pruning import layers

    net = Net(built("cnn", width=8))
    net.set_activation_pruning(KEEP)
    monkeypatch.setattr(layers, "pruned", lambda *given: pytest.fail("an activation was pruned"))
    with torch.no_grad():
        net(net.initial, batch_of(2).x, train=True)
        net(net.initial, batch_of(2).x)
    net.without_activation_pruning().gradient(net.initial, batch_of(2))


def test_a_pruned_network_becomes_a_plain_module_with_its_filters_ready() -> None:
    net = Net(built("mobilenet_v2", width=8))
    tree = sparse(net)
    plain = net.plain(tree)
    assert {type(layer) for layer in plain.modules() if isinstance(layer, nn.Conv2d)} == {nn.Conv2d}
    assert not [name for name, _ in plain.named_parameters() if name.endswith("gain")]
    x = batch_of(3).x
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(tree, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "1 pads by padding_mode = 'reflect'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, padding="same")), '1 has padding = "same" and an even kernel'),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)), r"1 \(ConvTranspose2d\) has a weight of its own"),
        (nn.Sequential(nn.Linear(3, 4)), "no layer comes after the first one"),
    ],
)
def test_layers_that_cannot_are_reported(module, message) -> None:
    with pytest.raises(ValueError, match=message):
        Net(module).set_activation_pruning(KEEP)


def test_settings_that_do_not_fit_are_reported() -> None:
    with pytest.raises(BadInput, match="There are: all, kept"):
        ModelSettings(norm="nsconv", nsconv_over="some")
    with pytest.raises(BadInput, match=r"needs model\.norm"):
        ModelSettings(nsconv_over="kept")
    with pytest.raises(BadInput, match="normalises its filters by itself"):
        ModelSettings(norm="nsconv", standardise=True)


def test_normalising_has_a_line_of_its_own() -> None:
    found = profiler.profile(built("cnn", width=8), (3, 32, 32))
    convolutions = sum(layer.weights for layer in found.layers if len(layer.shape) == 4)
    assert flops.normalising_flops(found) == 5 * convolutions
    assert flops.forward_flops(found) == flops.forward_flops(replace(found, normalised=frozenset()))
