"""models: published counts, seeds, sizes, widths that match a budget, an model_profile that agrees with what torch saves and counts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsim.costs import flops
from fedsim.errors import BadInput
from fedsim.models import FAMILIES, build, matched
from fedsim.models.blueprint import Blueprint, he, recast
from fedsim.models.resnet import resnet18
from fedsim.models.settings import ModelSettings
from fedsim.models.width_matching import cost_of
from fedsim.nn import profiler
from fedsim.nn.layers.shortcut import Shortcut
from fedsim.nn.layers.standardized_conv import StandardisedConv2d, standardised

IMAGE = (3, 32, 32)
CONV_AND_LINEAR = (nn.Conv2d, nn.Linear)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def model(name: str, shape: tuple[int, int, int] = IMAGE, classes: int = 10, seed: int = 0, **settings: object) -> nn.Module:
    return build(ModelSettings(name, **settings), shape, classes, seed)  # type: ignore[arg-type]


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def statistics(module: nn.Module) -> int:
    return sum(value.numel() for value in module.buffers() if value.is_floating_point())


def loss_of(module: nn.Module, shape: tuple[int, int, int], batch: int) -> Tensor:
    return F.cross_entropy(module(torch.randn(batch, *shape)), torch.arange(batch) % 10)


# ---- published counts


@pytest.mark.parametrize(
    ("name", "norm", "count"),
    [
        ("resnet18", "batch", 11_173_962),
        ("resnet20", "batch", 269_722),
        ("resnet32", "batch", 464_154),
        ("resnet56", "batch", 853_018),
        ("vgg11", "none", 9_750_922),
        ("vgg16", "batch", 35_281_162 - 1_638_720),  # of the gated network, less its gates
        ("mobilenet_v2", "batch", 2_236_682),
        ("mobilenet_v2_cifar", "group", 2_297_754),
    ],
)
def test_parameters_as_published(name: str, norm: str, count: int) -> None:
    assert parameters(model(name, norm=norm)) == count


def test_parameters_of_the_small_networks_by_hand() -> None:
    cnn = 3 * 9 * 32 + 32 * 9 * 64 + 64 * 64 * 128 + 128 * 10
    assert parameters(model("cnn")) == cnn + 2 * (32 + 64) + 128 + 10
    assert parameters(model("cnn", norm="none")) == cnn + (32 + 64) + 128 + 10
    lenet = 1 * 25 * 6 + 6 * 25 * 16 + 16 * 25 * 120 + 120 * 84 + 84 * 10
    simple = 32 * (27 + 1) + 64 * (32 * 9 + 1) + 128 * (64 * 14 * 14 + 1) + 10 * (128 + 1)
    assert parameters(model("simple_cnn", (3, 32, 32), norm="none")) == simple == 1_626_442
    assert parameters(model("lenet5", (1, 28, 28), norm="none")) == lenet + 6 + 16 + 120 + 84 + 10 == 61_706


def test_statistics_as_published() -> None:
    assert statistics(model("resnet18")) == 9_600
    assert statistics(model("vgg16")) == 8_448


def test_depth_is_the_number_in_the_name() -> None:
    for name in ("resnet8", "resnet18", "resnet20", "resnet32", "resnet56", "vgg11", "vgg16"):
        layers = [layer for at, layer in model(name).named_modules() if isinstance(layer, CONV_AND_LINEAR) and "downsample" not in at]
        assert len(layers) == int(name.removeprefix("resnet").removeprefix("vgg")), name


# ---- seeds


@pytest.mark.processes
def test_the_same_seed_gives_the_same_weights_in_another_process() -> None:
    code = (
        "from fedsim.models import *; from fedsim.core.tree import sha256_of;"
        "print(sha256_of(dict(build(ModelSettings('resnet8'), (3, 32, 32), 10, 7).state_dict())))"
    )
    from fedsim.core.tree import sha256_of

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == sha256_of(dict(model("resnet8", seed=7).state_dict()))
    assert other != sha256_of(dict(model("resnet8", seed=8).state_dict()))


@pytest.mark.parametrize("settings", [ModelSettings("resnet8"), ModelSettings("cnn", match="params", match_density=0.5)])
def test_global_randomness_is_left_alone(settings: ModelSettings) -> None:
    before = torch.get_rng_state()
    profiler.profile(build(settings, IMAGE, 10, 3), IMAGE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "mobilenet_v2_cifar", "resnet8"])
def test_no_parameter_is_left_without_a_value(name: str) -> None:
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in model(name).state_dict().values())


# ---- sizes and norms


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_least_size_works_and_one_pixel_less_is_reported(name: str) -> None:
    least = FAMILIES[name].least
    net = model(name, (1, least, least), classes=7, norm="group", width=8)
    assert net(torch.randn(2, 1, least, least)).shape == (2, 7)
    assert net.eval()(torch.randn(1, 1, least, least)).shape == (1, 7)
    with pytest.raises(BadInput, match=rf"{name} needs images of at least {least}x{least}; these are {least - 1}x{least + 5}"):
        model(name, (1, least - 1, least + 5))


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms_and_biases(name: str, norm: str) -> None:
    net = model(name, norm=norm, width=8)
    kinds = {type(layer) for layer in net.modules()}
    assert (nn.BatchNorm2d in kinds, nn.GroupNorm in kinds) == (norm == "batch", norm == "group")
    assert all((layer.bias is not None) == (norm == "none") for layer in net.modules() if isinstance(layer, nn.Conv2d))
    assert not any(isinstance(layer, nn.Dropout) for layer in net.modules())
    assert all(layer.num_groups == 1 for layer in net.modules() if isinstance(layer, nn.GroupNorm))
    assert all(layer.momentum == 0.1 for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_model_trains_on_grey_images_of_an_odd_size(name: str) -> None:
    side = FAMILIES[name].least + 5
    net = model(name, (1, side, side + 2), width=8)
    loss_of(net, (1, side, side + 2), 3).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in net.parameters())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradients_of_stacked_clients_are_those_of_each(name: str) -> None:
    side = max(FAMILIES[name].least, 8)
    net = model(name, (3, side, side), norm="group", width=4, standardise=name == "resnet8")
    one = {key: value.detach().clone() for key, value in net.named_parameters()}
    both = {key: torch.stack([value, 1.5 * value]) for key, value in one.items()}
    x, y = torch.randn(2, 3, 3, side, side), torch.tensor([[0, 1, 2], [3, 4, 5]])

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, x), y)

    together = vmap(grad(loss))(both, x, y)
    alone = grad(loss)({key: value[1] for key, value in both.items()}, x[1], y[1])
    largest = max(float(value.abs().max()) for value in alone.values())
    assert all((together[key][1] - alone[key]).abs().max() <= 1e-4 * largest for key in alone)


def test_width_is_that_of_the_first_convolution() -> None:
    for name, family in FAMILIES.items():
        for width in (family.width, 3):
            first = next(layer for layer in model(name, width=width).modules() if isinstance(layer, nn.Conv2d))
            assert first.out_channels == width, name


def test_a_narrow_cnn_keeps_its_128_hidden_units() -> None:
    net = model("cnn", (1, 8, 8), width=16, norm="none")
    assert net.get_submodule("fc1").weight.shape == (128, 32 * 2 * 2)


# ---- layers


def test_a_standardised_filter_has_mean_0_and_deviation_1() -> None:
    weight = standardised(torch.randn(6, 4, 3, 3, dtype=torch.float64) * 5 + 2)
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(weight.std((1, 2, 3)), torch.ones(6, dtype=torch.float64), atol=1e-4, rtol=0)


def test_standardisation_forgets_scale_and_offset() -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(standardised(3 * weight - 2), standardised(weight), atol=1e-4, rtol=0)


def test_a_filter_pruned_whole_has_a_finite_gradient() -> None:
    layer = StandardisedConv2d(2, 2, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    layer(torch.randn(1, 2, 5, 5)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_standardise_reaches_every_convolution() -> None:
    for name in FAMILIES:
        net = model(name, width=8, standardise=True)
        assert all(isinstance(layer, StandardisedConv2d) for layer in net.modules() if isinstance(layer, nn.Conv2d)), name


def test_the_shortcut_averages_and_appends_zeros() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = Shortcut(1, 3, 2)(x)
    torch.testing.assert_close(out[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert out.shape == (1, 3, 2, 2)
    assert not out[:, 1:].any()
    assert torch.equal(Shortcut(2, 2, 1)(x), x)


# ---- bad input


def test_an_unknown_name_lists_the_names() -> None:
    known = r"There are: cnn, simple_cnn, lenet5, resnet8, .*model\.factory"
    with pytest.raises(BadInput, match=rf"'resnet19' is not known \(did you mean 'resnet18'\?\)\. {known}"):
        model("resnet19")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "layer"}, "norm = 'layer' is not known. There are: batch, group, none, nsconv"),
        ({"match": "bytes"}, "match = 'bytes' is not known. There are: params, flops, memory"),
        ({"match": "params", "match_density": 0.0}, "match_density = 0.0: should be above 0 and at most 1"),
        ({"match_density": 0.5}, "needs model.match"),
        ({"width": 0}, "width = 0: should be at least 1"),
        ({"match": "params", "factory": "a:b"}, "model.match is for the models of fedsim"),
    ],
)
def test_impossible_settings_are_reported(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ModelSettings(**settings)  # type: ignore[arg-type]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, by its name."""
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "def tiny(shape, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
        "def word(shape, classes):\n    return 'model'\n"
        "def wrong(shape, classes):\n    raise RuntimeError('too few classes')\n"
        "def ending(shape, classes):\n    raise SystemExit('no licence')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


def test_a_factory_of_the_users_own(own: str) -> None:
    settings = ModelSettings(factory=f"{own}:tiny")
    net = build(settings, (1, 8, 8), 5, seed=1)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    again = build(settings, (1, 8, 8), 5, seed=1)
    assert torch.equal(net.get_submodule("1").weight, again.get_submodule("1").weight)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere_at_all:f", "ModuleNotFoundError: No module named 'nowhere_at_all'; it is looked for in the working folder"),
        ("own_models:none", "AttributeError.*'none'"),
        ("own_models", "package.module:function"),
        (":f", "package.module:function"),
        ("own_models:word", "gave a str; it should give a torch.nn.Module"),
        ("own_models:wrong", "RuntimeError: too few classes"),
        ("own_models:ending", "SystemExit: no licence"),
    ],
)
def test_a_factory_that_fails_is_named_with_the_reason(own: str, factory: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        build(ModelSettings(factory=factory), IMAGE, 10, 0)
    assert f'"{factory}"' in str(error.value)


# ---- small dense models


@pytest.mark.parametrize(
    ("name", "match"),
    [(name, match) for name in ("cnn", "resnet8") for match in ("params", "flops", "memory")]
    + [pytest.param("mobilenet_v2", "flops", marks=pytest.mark.full)],
)
def test_the_matched_width_is_the_largest_that_fits(name: str, match: str) -> None:
    settings = ModelSettings(name, match=match, match_density=0.3)
    found = matched(settings, IMAGE, 10)
    net = build(settings, IMAGE, 10, 0)
    assert found.ratio == cost_of(net, match, IMAGE) / cost_of(model(name), match, IMAGE) <= 0.3
    assert next(net.parameters()).shape[0] == found.width
    assert found.full == FAMILIES[name].width
    if name != "cnn":  # where only `width` sets a width, one channel more is a model of its own
        assert cost_of(model(name, width=found.width + 1), match, IMAGE) > 0.3 * found.full_cost


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02, 0.001])  # the last one below one channel
def test_the_matched_cnn_by_hand(density: float) -> None:
    """The widest whose hidden layer is as much narrower as its convolutions; then as many hidden units as still fit."""

    def cost(w: int, hidden: int) -> int:
        return 27 * w + 18 * w * w + 6 * w + 128 * w * hidden + hidden + 10 * hidden + 10

    budget = density * cost(32, 128)
    width = max([w for w in range(1, 33) if cost(w, 4 * w) <= budget], default=1)
    hidden = max(h for h in range(1, 4 * (width + 1)) if cost(width, h) <= budget)
    settings = ModelSettings("cnn", match="params", match_density=density)
    found = matched(settings, IMAGE, 10)
    assert (found.width, found.cost, found.full_cost) == (width, cost(width, hidden), cost(32, 128))
    assert build(settings, IMAGE, 10, 0).fc1.out_features == hidden


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_hundredth_of_the_parameters_is_still_a_model(name: str) -> None:
    if name in ("lenet5", "mobilenet_v2", "mobilenet_v2_cifar"):  # one sixth and one thirty-second of the width are already more
        density = 0.05
    else:
        density = 0.01
    net = build(ModelSettings(name, match="params", match_density=density), IMAGE, 10, 0)
    assert net(torch.randn(2, *IMAGE)).shape == (2, 10)
    assert parameters(net) <= density * parameters(model(name))


def test_a_match_of_everything_is_the_model_itself() -> None:
    found = matched(ModelSettings("resnet8", match="flops"), IMAGE, 10)
    assert (found.width, found.ratio) == (16, 1.0)
    assert matched(ModelSettings("resnet8"), IMAGE, 10) == matched(ModelSettings("resnet8", match="params"), IMAGE, 10)


def test_a_match_below_one_channel_says_the_least() -> None:
    with pytest.raises(BadInput, match=r"match_density = 0.001 of memory; width 1 has 0\.\d+ of width 32"):
        model("cnn", match="memory", match_density=0.001)


# ---- model_profile


def test_resnet18_as_the_specification_has_it() -> None:
    net = model("resnet18")
    found = profiler.profile(net, IMAGE)
    assert (found.weights, found.free, found.buffers) == (11_164_352, 9_610, 9_600)
    assert flops.forward_flops(found) == 1_110_845_440 == 2 * 555_422_720
    assert found.layers[0].flops == 2 * 1_769_472
    head = 512 * 4 + 10 * 4 + 8  # the classifier's input, the log-probabilities, the label
    assert found.activations == 4_698_112 + head
    assert len(found.layers) == 17 + 3 + 1  # convolutions, those of the shortcuts, the classifier


def test_mobilenet_halves_the_sides_three_times() -> None:
    layers = profiler.profile(model("mobilenet_v2", width=4), IMAGE).layers
    depthwise = [layer.positions for layer in layers if layer.shape[1:] == (1, 3, 3)]
    # 1 + 2, 3, 4 + 3 and 3 + 1 blocks; the convolution with stride 2 is the depthwise one of a stage's first block
    assert depthwise == [32 * 32] * 3 + [16 * 16] * 3 + [8 * 8] * 7 + [4 * 4] * 4
    assert [layers[0].positions, layers[-2].positions] == [32 * 32, 4 * 4]


def test_layers_stand_in_state_dict_order() -> None:
    for name in FAMILIES:
        net = model(name, width=4)
        names = [f"{at}.weight" for at, layer in net.named_modules() if isinstance(layer, CONV_AND_LINEAR)]
        assert [f"{layer.name}.weight" for layer in profiler.profile(net, IMAGE).layers] == [
            key for key in net.state_dict() if key in names
        ]


def test_a_module_stays_as_it_was() -> None:
    net = model("resnet8").eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    profiler.profile(net, IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.training
    assert not any(layer._forward_hooks for layer in net.modules())


def test_the_meta_device_gives_the_same_numbers() -> None:
    net = model("resnet20", norm="group")
    assert profiler.profile(net.to("meta"), IMAGE) == profiler.profile(model("resnet20", norm="group"), IMAGE)


def saved_bytes(net: nn.Module, batch: int) -> int:
    """What autograd itself keeps for one loss, each storage once, parameters and buffers left out."""
    own = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss_of(net, IMAGE, batch)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_activations_are_what_autograd_saves(name: str, norm: str) -> None:
    net = model(name, norm=norm, width=8)
    found = profiler.profile(net, IMAGE)
    scalar = 4  # the total weight of the loss's mean
    assert saved_bytes(net, 3) == 3 * found.activations + found.vectors + scalar


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_in_place_saves_the_same(inplace: bool) -> None:
    for relu in (nn.ReLU(inplace), nn.ReLU6(inplace)):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 15 * 15, 10))
        found = profiler.profile(net, IMAGE)
        assert saved_bytes(net, 3) == 3 * found.activations + found.vectors + 4


def counted(net: nn.Module, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(net, IMAGE, 1)
        if backward:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_forward_flops_are_those_that_torch_counts(name: str) -> None:
    net = model(name, norm="group", width=8)
    assert flops.forward_flops(profiler.profile(net, IMAGE)) == counted(net, backward=False)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18", "vgg11"])
def test_training_flops_but_for_the_gradient_of_the_image(name: str) -> None:
    net = model(name, norm="group")
    found = profiler.profile(net, IMAGE)
    first = found.layers[0].flops  # no gradient of the images is asked for
    assert flops.training_flops(found) - first == counted(net, backward=True)
    if name == "resnet18":
        assert counted(net, backward=True) == 3_328_997_376


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_convolutions(groups: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, stride=2, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    found = profiler.profile(net, IMAGE)
    assert flops.forward_flops(found) == counted(net, backward=False)
    assert found.layers[1].weights == 16 * (8 // groups) * 9
    assert found.layers[1].positions == 15 * 15


def test_a_layer_used_twice_counts_twice() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found = profiler.profile(net, IMAGE)
    assert [layer.positions for layer in found.layers] == [2 * 1024, 1]
    assert flops.forward_flops(found) == counted(net, backward=False)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "mobilenet_v2", "mobilenet_v2_cifar", "cnn", "vgg11"])
def test_the_scales_of_norms_start_where_the_job_says(name, norm) -> None:
    scales = [m.weight for m in model(name, norm=norm, norm_weight=0.5).modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert scales
    assert all(bool((scale == 0.5).all()) for scale in scales)
    assert all(bool((m.weight == 1).all()) for m in model(name, norm=norm).modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm))


def test_a_detached_shortcut_gives_the_same_outputs_and_no_gradient() -> None:
    """The shortcuts that halve the image alone; the others are the residual stream itself."""
    whole, cut = (model("resnet8", norm="group", detach_shortcut=detached) for detached in (False, True))
    x = torch.randn(2, *IMAGE)
    assert torch.equal(whole(x), cut(x))
    for block, flows in (("layer1.0", True), ("layer2.0", False), ("layer3.0", False)):
        shortcut = cut.get_submodule(f"{block}.shortcut")
        at = torch.randn(2, shortcut_inputs(cut, block), 8, 8, requires_grad=True)
        assert shortcut(at).requires_grad == flows
        assert whole.get_submodule(f"{block}.shortcut")(at).requires_grad


def shortcut_inputs(module: nn.Module, block: str) -> int:
    return int(module.get_submodule(f"{block}.conv1").in_channels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"norm_weight": 0.0}, r"\[model\] norm_weight = 0.0: should be above 0"),
        ({"norm_weight": float("inf")}, r"\[model\] norm_weight = inf: should be above 0"),
        ({"factory": "a:b", "norm_weight": 0.5}, "model.norm_weight is for the models of fedsim"),
        ({"factory": "a:b", "detach_shortcut": True}, "model.detach_shortcut is for the models of fedsim"),
        ({"factory": "a:b", "norm": "nsconv"}, "model.norm is for the models of fedsim, and model.factory makes its own"),
        ({"factory": "a:b", "standardise": True}, "model.standardise is for"),
    ],
)
def test_settings_of_norms_and_shortcuts_that_cannot_be(settings, said) -> None:
    with pytest.raises(BadInput, match=said):
        ModelSettings(**settings)


def drawing(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A factory that draws from every generator of a process."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    with torch.no_grad():
        module[1].bias[:3] = torch.tensor([np.random.randn(), random.random(), float(torch.rand(()))])
    return module


def test_a_factory_draws_the_same_each_time_and_leaves_generators_as_they_were() -> None:
    settings = ModelSettings(factory=f"{__name__}:drawing")
    sys.modules.setdefault(__name__, sys.modules[drawing.__module__])
    np.random.seed(5)
    random.seed(5)
    expected = np.random.RandomState(5).randn(), random.Random(5).random()
    one, other, third = (build(settings, (1, 2, 2), 4, seed).get_parameter("1.bias") for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not (one[:3] == third[:3]).any()
    assert (np.random.randn(), random.random()) == expected


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Names, order, weights and every bit of the outputs and gradients."""
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    outputs = [each(x) for each in (ours, theirs)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), list(each.parameters())) for y, each in zip(outputs, (ours, theirs), strict=True)]
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_resnet18_is_torchvisions_but_for_its_stem(norm: str) -> None:
    """Names, order, first weights and every bit of the outputs and gradients; torchvision's own stem is for large images."""
    from torchvision.models.resnet import BasicBlock, ResNet

    blueprint, x = Blueprint((3, 32, 32), 10, 8, norm), torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = resnet18(blueprint)
        torch.manual_seed(1)
        with torch.device("meta"):
            net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10, norm_layer=blueprint.normed)
        net.conv1, net.bn1, net.maxpool = blueprint.conv(3, 8), blueprint.normed(8), nn.Identity()
        net.inplanes = 8
        for stage in range(4):
            setattr(net, f"layer{stage + 1}", net._make_layer(BasicBlock, 8 << stage, 2, stride=1 if stage == 0 else 2))
        net.fc = nn.Linear(64, 10)
        recast(net, blueprint)
        theirs = he(net)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize(("name", "plan", "units"), [("vgg11", "A", 64), ("vgg16", "D", 512)])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_vgg_is_torchvisions_but_for_its_head(name: str, plan: str, units: int, norm: str) -> None:
    """Names, order, first weights and every bit of the outputs and gradients; torchvision's own head is for large images, with dropout."""
    from torchvision.models import vgg

    settings, x = ModelSettings(name=name, width=8, norm=norm), torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = build(settings, (3, 32, 32), 10, 1)
        torch.manual_seed(1)
        widths = [width if width == "M" else width // 8 for width in vgg.cfgs[plan]]
        theirs = vgg.VGG(vgg.make_layers(widths, batch_norm=norm == "batch"), init_weights=False)
        torch.manual_seed(1)
        features = nn.Sequential(*(layer if not isinstance(layer, nn.Conv2d) else conv_like(layer, norm) for layer in theirs.features))
        head = nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 10))
        theirs.features, theirs.avgpool, theirs.classifier = features, nn.AdaptiveAvgPool2d(1), head
        he(theirs)
    assert_same(ours, theirs, x)


def conv_like(layer: nn.Conv2d, norm: str) -> nn.Conv2d:
    return nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=norm == "none")
