"""Activation pruning together with what else a run may have: gates, masks, padded packs, sparse kernels, models of a user's own."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.bench.memory import saved
from fedsim.core import masks
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.costs import memory
from fedsim.errors import BadInput
from fedsim.kernels.activation_pruning.relu_and_pool import relu
from fedsim.kernels.nsconv import normalised
from fedsim.kernels.sparse import cost_model
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.net import Net
from fedsim.pruning.mask_adjustment import blocks

KEEP = ActivationPruning(0.3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def batch_of(images: int, shape: tuple[int, ...] = (3, 16, 16), classes: int = 3, real: Tensor | None = None) -> Batch:
    zero = torch.tensor(0)
    return Batch(torch.randn(images, *shape), torch.arange(images) % classes, real, zero, zero + 1)


def off(one: Tree, other: Tree) -> float:
    """The largest difference over the largest value."""
    return max(float((one[key] - other[key]).abs().max()) for key in one) / max(float(value.abs().max()) for value in one.values())


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "pruned"])
@pytest.mark.parametrize(("name", "norm", "standardise"), [("cnn", "batch", False), ("resnet8", "group", True), ("cnn", "nsconv", False)])
def test_under_a_hard_gate_packed_is_serial(name, norm, standardise, keep) -> None:
    net = Net(models.build(ModelSettings(name, norm=norm, width=8, standardise=standardise), (3, 16, 16), 10, 0))
    net.set_activation_pruning(keep)
    tree = net.initial | {GATE: torch.rand(net.channels.n) < 0.6}
    tree |= {key: torch.randn_like(value) for key, value in net.initial.items() if key.endswith(".gain")}
    if norm == "nsconv":
        tree |= {f"mask/{layer}.weight": torch.rand(net.shapes[layer]) < 0.5 for layer in net.maskable}
    batch = batch_of(6)
    assert off(net.gradient(tree, batch)[1], net.under_vmap().gradient(tree, batch)[1]) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(net(tree, batch.x)[0], net.under_vmap()(tree, batch.x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "pruned"])
def test_linear_layers_of_rows_run_sparse(keep) -> None:
    net = Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(196, 5), nn.Flatten(), nn.Linear(20, 3)))
    held = {f"mask/{layer}.weight": torch.rand(net.shapes[layer]) < 0.3 for layer in net.maskable}
    tree, batch = masks.apply(net.initial, held) | held, batch_of(4)
    net.set_activation_pruning(keep)
    dense = net.gradient(tree, batch)[1]
    net.set_sparse_costs(cost_model.always_sparse(net.geometries))
    assert len(net.sparse(tree)) == 2
    assert off(dense, net.gradient(tree, batch)[1]) < 1e-5


class Windows(nn.Module):
    """Rows of windows, and rows that are not of one image each."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.a, self.b, self.mixed = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), mixed

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.mixed:
            return self.b(y.permute(2, 0, 3, 1)).mean((0, 2))
        return self.b(y.permute(0, 2, 3, 1).reshape(-1, 4)).view(len(x), -1, 3).mean(1)


def test_rows_of_windows_are_of_their_images() -> None:
    real = torch.tensor([1.0, 1, 1, 0])
    batch = batch_of(4, real=real)
    net = Net(Windows(False))
    net.set_activation_pruning(KEEP)
    padded = net.gradient(net.initial, batch)[1]
    alone = net.gradient(net.initial, Batch(batch.x[:3], batch.y[:3], None, batch.t, batch.T))[1]
    assert off(alone, padded) < 1e-5
    net = Net(Windows(True))
    net.set_activation_pruning(KEEP)
    with pytest.raises(ValueError, match=r"cannot be pruned in a padded batch of 3 images: axis 0 is not the images"):
        net.gradient(net.initial, Batch(torch.randn(3, 3, 9, 9), batch.y[:3], real[:3], batch.t, batch.T))


@pytest.mark.parametrize("pure", [False, True])
def test_what_a_relu_gives_may_be_changed_in_place(pure) -> None:
    def loss(x: Tensor) -> Tensor:
        return relu(x * 1.0, 6.0, pure=pure).add_(1.0).square().sum()

    x = torch.randn(2, 3, 4, 4).mul(5).requires_grad_()
    wanted = torch.autograd.grad((x.clamp(0, 6) + 1).square().sum(), x)[0]
    found = torch.func.vmap(torch.func.grad(loss))(x.detach()) if pure else torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(found, wanted)


def layers(*more: nn.Module) -> nn.Module:
    every = OrderedDict(a=nn.Conv2d(3, 4, 3, padding=1), r=nn.ReLU(), b=NormalisedConv2d(4, 4, 3, padding=1, bias=False), s=nn.ReLU())
    every |= {f"m{i}": layer for i, layer in enumerate(more)}
    return nn.Sequential(OrderedDict(**every, f=nn.Flatten(), c=nn.LazyLinear(3)))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, dilation=2)], ids=str)
def test_a_pack_of_any_plain_sequence_is_its_clients_and_keeps_what_the_ledger_says(pool) -> None:
    module = layers(pool)
    module(torch.zeros(1, 3, 16, 16))
    net, batch = Net(module), batch_of(4)
    net.set_activation_pruning(KEEP)
    alone = net.gradient(net.initial, batch)[1]
    assert net.program is not None
    together = partial(net.under_vmap().gradient, net.initial)

    def one(x: Tensor, y: Tensor) -> Tree:
        return together(Batch(x, y, None, batch.t, batch.T))[1]

    packed = torch.func.vmap(one)(batch.x[None], batch.y[None])
    assert off(alone, {key: value[0] for key, value in packed.items()}) < 1e-5
    assert saved(net, net.initial, batch)[0] == memory.saved(profiler.profile(module, (3, 16, 16), KEEP), 4).total + 4


class Halves(nn.Module):
    """Two layers that read views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b, self.c = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.r(self.a(x)).chunk(2, 1)
        return (self.b(u) + self.c(v)).mean((2, 3))


def test_views_of_a_tensor_have_caches_of_their_own() -> None:
    found = profiler.profile(Halves(), (3, 16, 16), KEEP)
    assert found.caches == (4 * 14 * 14, 4 * 14 * 14)
    net = Net(Halves())
    net.set_activation_pruning(KEEP)
    assert saved(net, net.initial, batch_of(5))[0] == memory.saved(found, 5).total + 4


def test_normalised_layers_that_cannot_be_are_reported() -> None:
    with pytest.raises(ValueError, match="b: a NormalisedConv2d needs padding_mode"):
        Net(nn.Sequential(OrderedDict(b=NormalisedConv2d(3, 4, 3, padding=1, padding_mode="reflect"))))
    with pytest.raises(ValueError, match="odd kernels"):
        Net(nn.Sequential(NormalisedConv2d(3, 4, 2, padding="same")))

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), NormalisedConv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.b(self.a(x))).mean((2, 3))

    net = Net(Again())
    with pytest.raises(ValueError, match="cannot be tapped if it is called twice"):
        net.gradient(net.initial, batch_of(2), tap=lambda layer, g: {"top/a": g.flatten()[:1]}, layers=("b",))
    net.gradient(net.initial, batch_of(2))


def test_nothing_to_prune_is_reported() -> None:
    from fedsim.config.job import check
    from fedsim.methods.fedmef import FedMef

    with pytest.raises(ValueError, match="no layer is left to be pruned"):
        blocks((), "all")
    assert check({"method": {"name": "fedmef"}}).method.use == FedMef()


def test_products_of_windows_prune_nothing_and_say_so() -> None:
    from fedsim.config.job import check
    from fedsim.simulation.experiment import build_experiment

    table = {"method": {"name": "fedavg"}, "train": {"activation_keep": 0.3}, "execution": {"packed_conv": "matmul"}}
    with pytest.raises(BadInput, match=r"cannot be combined with train.activation_keep"):
        build_experiment(check(table))


def test_evaluation_of_normalised_filters_under_masks_and_gates_is_by_hand() -> None:
    """Compacted: the filters are made ready once, under their masks."""
    w, gain, mask = torch.randn(4, 3, 3, 3), torch.randn(4), torch.rand(4, 3, 3, 3) < 0.5
    net = Net(models.build(ModelSettings("cnn", norm="nsconv", width=4), (3, 16, 16), 10, 0))
    tree = net.initial | {"w/conv1.weight": w * mask, "w/conv1.gain": gain, "mask/conv1.weight": mask}
    tree |= {GATE: torch.ones(net.channels.n, dtype=torch.bool)}
    x = torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    plain = net.plain(tree)
    plain.conv1.register_forward_hook(lambda layer, given, out: seen.append(out))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(tree, x)[0], rtol=1e-4, atol=1e-5)
    wanted = torch.nn.functional.conv2d(x, normalised(w * mask, gain, mask), net.initial["w/conv1.bias"], padding=1)
    torch.testing.assert_close(seen[0], wanted)
