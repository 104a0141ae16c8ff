"""Clients stacked as one program, and the pooling in it: the values and gradients of every client's own network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedsim import models
from fedsim.core.types import Batch
from fedsim.kernels import max_pool
from fedsim.models.settings import ModelSettings
from fedsim.nn import packed_program
from fedsim.nn.net import Net

CLIENTS, IMAGES, SHAPE, CLASSES = 3, 5, (2, 14, 12), 4


class Twice(nn.Linear):
    """Not a linear layer that a program knows."""


def tied() -> nn.Module:
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    return nn.Sequential(nn.Conv2d(2, 6, 12, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), one, nn.ReLU(), other, nn.Linear(6, CLASSES))


def pools_and_relus() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, dilation=2, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU())
    return nn.Sequential(body, nn.AvgPool2d(1), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(4, CLASSES, bias=False))


def built(name: str, norm: str = "none") -> nn.Module:
    return models.build(ModelSettings(name=name, norm=norm, width=6), SHAPE, CLASSES, 0)


MODELS = {
    "cnn": lambda: built("cnn"),
    "cnn-group": lambda: built("cnn", "group"),
    "lenet5": lambda: built("lenet5"),
    "tied": tied,
    "pools-and-relus": pools_and_relus,
}


def drawn(module: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights (K, …), images (K, B, …) and labels (K, B)."""
    made = torch.Generator().manual_seed(3)
    weights = {"w/" + name: 0.3 * torch.randn(CLIENTS, *value.shape, generator=made) for name, value in module.named_parameters()}
    x = torch.randn(CLIENTS, IMAGES, *SHAPE, generator=made)
    return weights, x, torch.randint(CLASSES, (CLIENTS, IMAGES), generator=made)


def own(module: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients of one client's first `count` images, by torch alone and in float64."""
    leaves = {key[2:]: value.double().requires_grad_() for key, value in weights.items()}
    loss = F.cross_entropy(functional_call(module, leaves, x[:count].double()), y[:count])
    return loss, torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("counts", [(IMAGES,) * CLIENTS, (IMAGES, 2, 3)])
def test_a_pack_has_the_losses_and_gradients_of_its_clients(name: str, counts: tuple[int, ...]) -> None:
    module = MODELS[name]()
    net, (weights, x, y) = Net(module).under_vmap(), drawn(module)
    real = None if min(counts) == IMAGES else (torch.arange(IMAGES) < torch.tensor(counts).unsqueeze(1)).float()
    assert net.program is not None

    def one(tree: dict[str, Tensor], x: Tensor, y: Tensor, *real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nothing = torch.zeros(())
        return net.gradient(tree, Batch(x, y, real[0] if real else None, nothing, nothing))[:2]

    losses, found = vmap(one)(weights, x, y, *(() if real is None else (real,)))
    for k, count in enumerate(counts):
        loss, gradients = own(module, {key: value[k] for key, value in weights.items()}, x[k], y[k], count)
        assert losses[k].item() == pytest.approx(loss.item(), rel=1e-5)
        for key, gradient in zip(weights, gradients, strict=True):
            assert (found[key][k] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), key


def test_a_client_alone_and_weights_that_all_share_go_through_the_program() -> None:
    module = built("cnn")
    weights, x, y = drawn(module)
    program, first, nothing = packed_program.program(module), {key: value[0] for key, value in weights.items()}, torch.zeros(())
    assert program is not None
    whole = vmap(lambda x, y: packed_program.gradient(program, first, Batch(x, y, None, nothing, nothing)))(x, y)
    for k in range(CLIENTS):
        loss, gradient = packed_program.gradient(program, first, Batch(x[k], y[k], None, nothing, nothing))
        assert loss.item() == pytest.approx(whole[0][k].item(), rel=1e-6)
        assert all((gradient[key] - whole[1][key][k]).abs().max() <= 1e-5 * gradient[key].abs().max() for key in gradient)


@pytest.mark.parametrize(
    "module",
    [
        built("resnet8", "batch"),
        built("cnn", "batch"),
        nn.Sequential(nn.Linear(12, 4)),
        nn.Sequential(nn.Flatten(), Twice(336, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(336, 4), nn.Conv2d(1, 1, 1)),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding_mode="circular"), nn.Flatten(), nn.Linear(480, 4)),
        nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(336, 4)),
    ],
    ids=["resnet8", "batch norm", "no flatten", "a layer of one's own", "images after features", "circular", "partly flattened"],
)
def test_what_is_more_than_a_sequence_of_known_layers_has_no_program(module: nn.Module) -> None:
    assert packed_program.program(module) is None


def awkward() -> Tensor:
    """Ties, rows and columns left over, and values that are not numbers."""
    x = torch.randint(-2, 3, (2, 3, 7, 9), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0, 0, :4] = torch.tensor([float("nan"), 1.0, 2.0, float("nan")])
    x[0, 1, 3, 2:4] = float("inf")
    return x


@pytest.mark.parametrize("x", [awkward(), torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))])
def test_pooling_by_halves_is_torchs_to_the_bit(x: Tensor) -> None:
    pool = nn.MaxPool2d(2)
    assert max_pool.takes(x, pool)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = max_pool.halved(mine), pool(theirs)
    assert torch.equal(out.nan_to_num(-9), wanted.nan_to_num(-9))
    weight = torch.arange(out.numel(), dtype=torch.float32).view(out.shape) + 1
    (found,), (expected,) = torch.autograd.grad((out * weight).sum(), mine), torch.autograd.grad((wanted * weight).sum(), theirs)
    assert torch.equal(found.nan_to_num(-9), expected.nan_to_num(-9))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True)])
def test_other_pools_and_layouts_are_left_to_torch(pool: nn.MaxPool2d) -> None:
    x = torch.zeros(2, 3, 8, 8)
    assert not max_pool.takes(x, pool)
    assert max_pool.takes(x, nn.MaxPool2d((2, 2)))
    assert not max_pool.takes(x.contiguous(memory_format=torch.channels_last), nn.MaxPool2d(2))
    assert not max_pool.takes(x.double(), nn.MaxPool2d(2))
    assert not max_pool.takes(x[:, :, :1].contiguous(), nn.MaxPool2d(2))  # which torch refuses
