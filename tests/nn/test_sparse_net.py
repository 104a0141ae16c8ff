"""A net whose layers run on their kept weights alone gives what masked dense layers give; which layers do, and from when on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.config.job import check
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch
from fedsim.fleet.plan import Plan
from fedsim.kernels.sparse.chwn_layout import is_chwn
from fedsim.kernels.sparse.cost_model import Cost, Patterns, always_sparse, from_rows, sparse_layers, to_rows
from fedsim.kernels.sparse.pattern import Geometry
from fedsim.nn.net import Net
from fedsim.simulation.planning import layer_timing
from fedsim.simulation.planning.plan import resolve


class Smooth(nn.Module):
    """Strided, dilated, grouped and 1x1 convolutions, both pools, a shortcut and linear layers; no kink, where rounding would show."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.norm1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8, affine=False)
        self.deep, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=False), nn.GroupNorm(1, 16)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.largest, self.average = nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True)
        self.hidden, self.out = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm0(self.stem(x)))
        x = x + torch.sigmoid(self.norm1(self.wide(x)))
        x = self.norm2(self.deep(x)) + self.short(x)
        x = self.largest(x) + self.average(x)
        return self.out(torch.tanh(self.hidden(x.mean((2, 3)))))


def net_and_tree(module: nn.Module, density: float, dtype: torch.dtype = torch.float32) -> tuple[Net, Tree]:
    net = Net(module)
    generator = torch.Generator().manual_seed(1)
    masks = {f"mask/{layer}.weight": torch.rand(net.shapes[layer], generator=generator) < density for layer in net.maskable}
    return net, net.initial | masks


def batch(count: int, size: int = 8, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(2)
    x, zero = torch.randn(count, 3, size, size, generator=generator), torch.tensor(0)
    return Batch(x, torch.arange(count) % classes, None, zero, zero + 1, 0)


def agrees(ours: Tree, theirs: Tree, off: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        assert float((ours[key].double() - value).abs().max()) <= off * largest, key


def double(tree: Tree) -> Tree:
    return {key: value.double() if value.is_floating_point() else value for key, value in tree.items()}


@pytest.mark.parametrize("count", [1, 7, 32])
def test_sparse_is_masked_dense_in_float64(count) -> None:
    torch.manual_seed(0)
    net, tree = net_and_tree(Smooth(), 0.4)
    given = batch(count)
    net.set_sparse_costs(always_sparse(net.geometries))
    assert set(net.sparse(tree)) == set(net.maskable)
    loss, gradient, buffers, _ = net.gradient(tree, given)
    logits, _ = net(tree, given.x)
    exact = net.to("cpu", torch.float64)
    exact.set_sparse_costs({})
    wide = Batch(given.x.double(), given.y, None, given.t, given.T, 0)
    wanted = exact.gradient(double(tree), wide)
    assert float(loss) == pytest.approx(float(wanted[0]), rel=1e-5)
    agrees(gradient, wanted[1])
    agrees(buffers, wanted[2])
    agrees({"logits": logits}, {"logits": exact(double(tree), wide.x)[0]})
    for layer in net.maskable:
        assert not gradient[f"w/{layer}.weight"][~tree[f"mask/{layer}.weight"]].any()


def gradients(layer: str, g: Tensor) -> Tree:
    return {f"grad/{layer}": g}


@pytest.mark.parametrize("wrt", ["w", None])
@pytest.mark.parametrize("count", [9, 16])  # strided layers sort their images by phases, or do not
def test_tapped_layers_stay_sparse_and_their_gradients_are_whole(count, wrt) -> None:
    """Dilated, grouped and strided, strided 1x1, and linear."""
    torch.manual_seed(0)
    net, tree = net_and_tree(Smooth(), 0.4)
    layers = ("wide", "deep", "short", "hidden")
    wanted = net.gradient(tree, batch(count), wrt, tap=gradients, layers=layers)
    net.set_sparse_costs(always_sparse(net.geometries))
    chwn: dict[str, bool] = {}
    for name in layers[:3]:
        net.module.get_submodule(name).register_forward_hook(lambda _, x, out, name=name: chwn.__setitem__(name, is_chwn(out)))
    found = net.gradient(tree, batch(count), wrt, tap=gradients, layers=layers)
    assert chwn == dict.fromkeys(layers[:3], True)
    agrees(found[3], wanted[3])
    if wrt:
        agrees(found[1], wanted[1])
    for layer in layers:
        assert found[3][f"grad/{layer}"][~tree[f"mask/{layer}.weight"]].all()


def test_a_tapped_sparse_layer_that_is_called_twice_gives_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.again(torch.tanh(self.again(self.stem(x)))))
            return self.out(x.mean((2, 3)))

    torch.manual_seed(0)
    net, tree = net_and_tree(Twice(), 0.5)
    wanted = net.gradient(tree, batch(4), tap=gradients, layers=("again",))
    net.set_sparse_costs(always_sparse(net.geometries))
    assert "again" in net.sparse(tree)
    found = net.gradient(tree, batch(4), tap=gradients, layers=("again",))
    agrees(found[3], wanted[3])
    agrees(found[1], wanted[1])


@pytest.mark.parametrize("over", ["all", "kept"])
@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("count", [6, 16])
def test_normalised_convolutions_on_their_kept_weights(count, share, over) -> None:
    """A strided and a 1x1 one among them, their inputs pruned or not, with growth scores; the first layer, without a mask, stays dense."""
    torch.manual_seed(0)
    form: Any = check(JOB | {"model": {"name": "resnet18", "width": 4, "norm": "nsconv", "nsconv_over": over}}).model
    net, tree = net_and_tree(models.build(form, (3, 16, 16), 5, 0), 0.3)
    net.set_activation_pruning(ActivationPruning(share) if share else None)
    tapped = ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "fc")
    wanted = net.gradient(tree, batch(count, 16), tap=gradients, layers=tapped)
    logits, _ = net(tree, batch(count, 16).x)
    net.set_sparse_costs(always_sparse(net.geometries))
    assert set(net.sparse(tree)) == set(net.maskable)
    found = net.gradient(tree, batch(count, 16), tap=gradients, layers=tapped)
    agrees({"logits": net(tree, batch(count, 16).x)[0]}, {"logits": logits})
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-5)
    agrees(found[1], wanted[1], 1e-4 if share else 1e-5)  # rounding decides which of two entries of a size is kept
    agrees(found[3], wanted[3], 1e-4 if share else 1e-5)


def test_extra_is_added_and_masked() -> None:
    torch.manual_seed(0)
    net, tree = net_and_tree(Smooth(), 0.4)
    extra = {key: torch.ones_like(value) for key, value in under(tree, "w/").items()}
    wanted = net.gradient(tree, batch(4), extra=extra)[1]
    net.set_sparse_costs(always_sparse(net.geometries))
    found = net.gradient(tree, batch(4), extra=extra)[1]
    agrees(found, wanted)
    assert not found["w/deep.weight"][~tree["mask/deep.weight"]].any()


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 1e-2), (0.0, 1e-2)])
def test_steps_at_the_kept_weights_are_torchs(momentum, decay) -> None:
    torch.manual_seed(0)
    net, tree = net_and_tree(Smooth(), 0.4)
    net.set_sparse_costs(always_sparse(net.geometries))
    held = under(tree, "mask/")
    w = net.effective(tree)
    state = {key: value.clone() for key, value in w.items()}
    state |= {"opt/momentum/" + key[2:]: torch.zeros_like(value) for key, value in w.items()} if momentum else {}
    theirs = {key: value.clone().requires_grad_() for key, value in w.items()}
    optimiser = torch.optim.SGD(list(theirs.values()), 0.1, momentum, weight_decay=decay)
    for _ in range(3):
        gradient = net.gradient(held | under(tree, "buf/") | {key: value.detach() for key, value in theirs.items()}, batch(6))[1]
        for key, value in theirs.items():
            value.grad = gradient[key].clone()
        optimiser.step()
        state = net.descend(state, gradient, 0.1, momentum, decay)
        agrees(under(state, "w/"), {key: value.detach() for key, value in theirs.items()}, 1e-6)
    assert not state["w/wide.weight"][~tree["mask/wide.weight"]].any()


@pytest.mark.parametrize("norm", ["batch", "nsconv"])
def test_images_stay_in_chwn_layout_between_sparse_layers(norm) -> None:
    """What a sparse layer is handed needs no copy: every norm, ReLU, pool and sum before it kept the layout."""
    torch.manual_seed(0)
    form: Any = check(JOB | {"model": {"name": "resnet8", "width": 4, "norm": norm}}).model
    net, tree = net_and_tree(models.build(form, (3, 32, 32), 10, 0), 0.1)
    net.set_sparse_costs(always_sparse(net.geometries))
    given: dict[str, bool] = {}
    for name, layer in net.module.named_modules():
        if name in net.maskable and "fc" not in name:
            layer.register_forward_pre_hook(lambda _, x, name=name: given.__setitem__(name, is_chwn(x[0])))
    net.gradient(tree, batch(4, 32, 10))
    assert given
    assert all(given.values()), given


def test_new_masks_are_noticed_and_the_same_ones_are_not_rebuilt() -> None:
    torch.manual_seed(0)
    net, tree = net_and_tree(Smooth(), 0.4)
    net.set_sparse_costs(always_sparse(net.geometries))
    first = net.sparse(tree)
    again = net.sparse(tree | {key: value.clone() for key, value in under(tree, "mask/").items()})
    assert all(again[layer] is first[layer] for layer in first)
    moved = tree["mask/wide.weight"].flip(0)
    other = net.sparse(tree | {"mask/wide.weight": moved})
    assert torch.equal(other["wide"].mask, moved)
    assert other["deep"] is first["deep"]
    tree["mask/deep.weight"].logical_not_()
    assert torch.equal(net.sparse(tree)["deep"].mask, tree["mask/deep.weight"])
    assert net.sparse(tree)["deep"] is not first["deep"]


def test_gates_transforms_and_shared_weights_stay_dense() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    net, tree = net_and_tree(module, 0.5)
    net.set_sparse_costs(always_sparse(net.geometries))
    assert net.sparse(tree)
    assert not net.under_vmap().sparse(tree)
    assert not net.sparse(tree | {"gate/channels": torch.ones(8, dtype=torch.bool)})
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 5))
    tied[1].weight = tied[0].weight
    assert set(Net(tied).geometries) == {"3"}
    odd = nn.Sequential(nn.Conv2d(3, 3, 3, padding_mode="circular", padding=1), nn.Conv2d(3, 3, 3, padding="same"))
    assert not Net(odd).geometries


def test_the_choice_is_by_cost() -> None:
    """Layer a breaks even where 1 + 10 d = 4 + 1; the network gains only if what the others lose by the layout is made up for."""
    costs = {"a": Cost(4.0, 1.0, 1.0, 10.0), "b": Cost(2.0, 1.0, 5.0, 1.0)}
    assert costs["a"].crossover == pytest.approx(0.4)
    assert costs["b"].crossover == 0
    assert sparse_layers(costs, {"a": 0.05, "b": 0.05}) == {"a"}  # 1.5 + 3 of 6
    assert sparse_layers(costs, {"a": 0.27, "b": 0.05}) == frozenset()  # 3.7 + 3 of 6
    assert sparse_layers(costs, {}) == frozenset()
    assert from_rows(to_rows(costs)) == costs
    with pytest.raises(ValueError, match="no layer 'c'"):
        Patterns({"a": Geometry()}, {"c": Cost(1, 1, 1, 1)})


JOB: dict[str, Any] = {
    "name": "sparse",
    "rounds": 1,
    "data": {"name": "fake", "channels": 3, "image_size": 8, "classes": 5, "train_images": 40},
    "partition": {"name": "blocks", "clients": 4},
    "cohort": {"size": 4},
    "model": {"name": "resnet8", "width": 4},
    "train": {"batch": 10, "lr": 0.1},
    "method": {"name": "fedtiny", "density": 0.3, "pretrain_epochs": 0, "pool": 1},
}


def test_costs_cover_every_layer_and_stand_in_the_plan(tmp_path, monkeypatch) -> None:
    from fedsim.simulation.experiment import build_experiment

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parts = build_experiment(check(JOB))
    costs = layer_timing.costs(parts.setting.net, torch.ones(10, 3, 8, 8))
    assert set(costs) == set(parts.setting.net.sizes)
    assert all(cost.dense > 0 and cost.fixed >= 0 and cost.slope >= 0 for cost in costs.values())
    plan = resolve(parts)
    assert Plan.of(plan.text()) == plan == resolve(parts)
    forced = Plan.of(resolve(build_experiment(check(JOB | {"execution": {"plan": "reference", "kernels": "sparse"}}))).text())
    assert set(from_rows(forced.sparse)) == set(parts.setting.net.sizes)
    forced.apply(parts.site)
    assert set(parts.site.net.sparse(net_and_tree_masks(parts.site.net))) == set(parts.site.net.maskable)


def net_and_tree_masks(net: Net) -> Tree:
    return {f"mask/{layer}.weight": torch.ones(shape, dtype=torch.bool) for layer, shape in net.shapes.items() if layer in net.maskable}
