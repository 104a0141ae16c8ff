"""The model profile beside autograd's own bookkeeping, for layers that the package does not know."""

from __future__ import annotations

import model_kinds
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.activation_pruning import ActivationPruning
from fedsim.costs import flops
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn.net import Net
from fedsim.nn.profiler import profile

IMAGE = (3, 16, 16)
LOSS = 4 * 3 + 8  # log-probabilities of three classes, and the label


FIGURES = [  # bytes: activations per image, vectors per batch, the sum over moments; counted by hand-written rules for each kind of layer
    (ModelSettings("resnet18"), 4_700_208, 38_400, 195_371_792),
    (ModelSettings("vgg11"), 1_603_632, 22_016, 38_821_008),
    (ModelSettings("mobilenet_v2"), 19_063_856, 136_448, 1_772_033_600),
    (ModelSettings("lenet5"), 106_080, 176, 952_080),
    (ModelSettings("cnn", gate_keep=0.5), 751_420, 768, 6_077_556),
    (ModelSettings("resnet8", gate_keep=0.5, gate_place="affine"), 835_184, 1_920, 17_511_888),
    (ModelSettings("cnn", norm="nsconv"), 356_912, 0, 1_807_792),
    (ModelSettings("resnet8", norm="group", standardise=True), 602_472, 0, 10_418_408),
]


class Functional(nn.Module):
    """Calls functions where other models have modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(F.max_pool2d(self.conv(x), 2)).flatten(1))


class OneByOne(nn.Module):
    """Calls its layers once for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(self.conv(image).flatten(1)) for image in x.split(1)])


@pytest.mark.parametrize(("settings", "activations", "vectors", "moments"), FIGURES)
def test_figures_of_shipped_models_stay(settings: ModelSettings, activations: int, vectors: int, moments: int) -> None:
    found = profile(build(settings, (3, 32, 32), 10, 0), (3, 32, 32))
    assert (found.activations, found.vectors) == (activations, vectors)
    assert sum(moment.activations for moment in found.moments) == moments


def test_functional_calls_are_counted() -> None:
    entries = 8 * 16 * 16
    pool = 4 * entries + 8 * entries // 4  # its input and its int64 indices
    gelu, head = 4 * entries // 4, 4 * entries // 4
    assert profile(Functional(), IMAGE).activations == 4 * 3 * 16 * 16 + pool + gelu + head + LOSS


def test_channels_own_what_functions_save_of_them() -> None:
    assert Net(Functional()).per_channel(IMAGE) == [4 * 256 + 8 * 64 + 4 * 64 + 4 * 64]


def test_layers_that_are_called_for_each_image() -> None:
    found = profile(OneByOne(), IMAGE)
    assert found.activations == 4 * 3 * 16 * 16 + 4 * 8 * 16 * 16 + LOSS
    assert {moment.activations for moment in found.moments} == {found.activations}


@pytest.mark.parametrize("settings", [ModelSettings("resnet8"), ModelSettings("cnn", gate_keep=0.5), ModelSettings("cnn", norm="nsconv")])
def test_the_module_may_be_frozen_and_the_caller_may_need_no_gradient(settings: ModelSettings) -> None:
    module = build(settings, IMAGE, 10, 0)
    expected = profile(module, IMAGE)
    with torch.no_grad():
        assert profile(module.requires_grad_(False), IMAGE) == expected


def test_weights_that_are_made_anew_in_every_pass_are_no_activations() -> None:
    plain, standardised = (build(ModelSettings("resnet8", norm="group", standardise=made), IMAGE, 10, 0) for made in (False, True))
    assert profile(plain, IMAGE).activations == profile(standardised, IMAGE).activations


def test_pruned_activations_are_counted_by_module() -> None:
    found = profile(Functional(), IMAGE, ActivationPruning(0.5))
    assert found.activations == 4 * 3 * 16 * 16 + LOSS  # the first layer's input
    assert found.caches == (8 * 64,)  # the classifier's


def test_layers_with_one_weight_are_one_layer_as_methods_see_them() -> None:
    module = model_kinds.tied()
    found, sizes = profile(module, (3, 8, 8)), Net(module).sizes
    assert {layer.name: layer.weights for layer in found.layers} == sizes
    assert found.free == sum(value.numel() for name, value in module.named_parameters() if name.endswith("bias"))
    used = {layer.name: layer.positions for layer in found.layers}
    assert used["a"] == 2 * used["stem"]
    assert flops.layer_flops(found, {"a": 100})["a"] == 2 * 100 * used["a"]
    assert flops.density(found, {"a": 100}) == 1 - (sizes["a"] - 100) / sum(sizes.values())
