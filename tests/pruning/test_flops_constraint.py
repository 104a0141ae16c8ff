"""The FLOPs of gates by the formulas of the paper's blocks, the regulariser by its figures, and budgets that are reached."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.core import rng
from fedsim.core.tree import Tree
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.pruning import gates, hypernetwork
from fedsim.pruning.flops_constraint import FlopsConstraint, regulariser

SHAPE, CLASSES = (3, 8, 8), 3


def gated(
    name: str, width: int | None = None, shape: tuple[int, int, int] = SHAPE, squared: bool = True
) -> tuple[nn.Module, Net, FlopsConstraint]:
    module = build(ModelSettings(name, width=width, norm="group"), shape, CLASSES, 0)
    net = Net(module)
    return module, net, FlopsConstraint.of(net.channels, profiler.profile(module, shape), squared)


def resnet56() -> FlopsConstraint:
    return gated("resnet56", shape=(3, 32, 32))[2]


def share(flops: FlopsConstraint, part: float) -> Tensor:
    """T / T_tot of round(part · C) channels in every group."""
    gate = torch.cat([torch.arange(width) < round(part * width) for width in flops.widths])
    return flops.share(gate)


def of_counts(flops: FlopsConstraint, counts: list[int]) -> float:
    """T of so many channels in every group, the last ones."""
    gate = torch.cat([torch.arange(width) >= width - c for width, c in zip(flops.widths, counts, strict=True)])
    return float(flops(gate))


def some(flops: FlopsConstraint, seed: int) -> list[int]:
    """At least one channel in every group."""
    generator = torch.Generator().manual_seed(seed)
    return [1 + int(torch.randint(0, width, (), generator=generator)) for width in flops.widths]


# ---- T


def of_blocks(counts: list[int], blocks: int, width: int, side: int) -> int:
    """k^2 Cin c HW + 3 c HW + k^2 c Cout HW + 3 Cout HW of every residual block."""
    total, enter = 0, width
    for at, c in enumerate(counts):
        stage = at // blocks
        leave, positions = width << stage, (side >> stage) ** 2
        total += (9 * enter * c + 3 * c + 9 * c * leave + 3 * leave) * positions
        enter = leave
    return total


def of_inverted(counts: list[int], squared: bool, own: bool = False) -> float:
    """Expansion, filters and projection of every MobileNetV2 block at an eighth of its width, on 8x8 images.

    own: of mobilenet_v2_cifar, whose first block expands too (by 1), and whose third stage keeps the size.
    """
    stages = [(3, 2, 1), (4, 3, 1 if own else 2), (8, 4, 2), (12, 3, 1), (20, 3, 2), (40, 1, 1)]  # channels, blocks, stride of the first
    blocks = [(leave, stride if i == 0 else 1, 6) for leave, number, stride in stages for i in range(number)]
    blocks = [(2, 1, 1)] * own + blocks
    total, enter, side = 0.0, 4 if own else 2, 8
    for c, (leave, stride, expansion) in zip(counts, blocks, strict=True):
        before, side = side**2, -(-side // stride)
        after, filters = side**2, expansion * enter
        total += enter * c * before + 3 * c * before
        total += 9 * (c / filters if squared else 1) * c * after + 3 * c * after
        total += c * leave * after + 3 * leave * after
        enter = leave
    return total


def test_the_total_of_resnet56() -> None:
    flops = resnet56()
    assert flops.full == 126_590_976 == of_blocks(list(flops.widths), 9, 16, 32)
    assert len(flops.terms) == 54


@pytest.mark.parametrize("seed", range(3))
def test_residual_blocks_cost_what_the_formula_says(seed) -> None:
    flops = resnet56()
    assert of_counts(flops, counts := some(flops, seed)) == of_blocks(counts, 9, 16, 32)


@pytest.mark.parametrize("own", [False, True], ids=["mobilenet_v2", "mobilenet_v2_cifar"])
@pytest.mark.parametrize("squared", [True, False])
def test_inverted_residuals_cost_what_the_formula_says(squared, own) -> None:
    """The published code divides by the filters of the full layer, so that their cost falls with c^2; in truth it falls with c."""
    flops = gated("mobilenet_v2_cifar" if own else "mobilenet_v2", 4, squared=squared)[2]
    assert flops.full == of_inverted(list(flops.widths), squared, own)
    for seed in range(3):
        counts = some(flops, seed)
        assert of_counts(flops, counts) == pytest.approx(of_inverted(counts, squared, own), rel=1e-12)


def test_layers_in_a_row_share_their_gates_and_a_flattened_channel_counts_all_its_positions() -> None:
    flops = gated("cnn", 4)[2]
    a, b, c = counts = [3, 5, 70]
    conv = (27 * a + 3 * a) * 64 + (9 * a * b + 3 * b) * 16
    assert of_counts(flops, counts) == conv + 4 * b * c + 3 * c + c * CLASSES + 3 * CLASSES


def test_hard_gates_of_many_clients_are_counted_in_float64_and_soft_ones_differentiated() -> None:
    flops = resnet56()
    rows = torch.rand(2, 3, flops.n, generator=torch.Generator().manual_seed(0)) < 0.5
    found = flops(rows)
    assert (found.dtype, found.shape) == (torch.float64, (2, 3))
    assert torch.equal(found[1, 2], flops(rows[1, 2]))
    small = gated("mobilenet_v2", 4)[2]
    soft = torch.rand(small.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = torch.autograd.grad(small(at := soft.clone().requires_grad_()), at)[0]
    step = 1e-4 * torch.nn.functional.one_hot(torch.arange(5), small.n)
    assert torch.allclose(slope[:5], (small(soft + step) - small(soft - step)) / 2e-4, rtol=1e-6)


@given(st.integers(0, 10_000))
def test_no_gate_without_empty_groups_costs_less_than_the_least(seed) -> None:
    flops = TOY
    assert flops.least <= of_counts(flops, some(flops, seed)) / flops.full <= 1


def test_the_least_is_one_channel_a_group() -> None:
    assert resnet56().least == of_blocks([1] * 27, 9, 16, 32) / 126_590_976


# ---- what a cut leaves


def parameters(name: str, counts: list[int]) -> int:
    """Of resnet8, cnn and the two mobilenets (width 4) with group norms."""
    if name == "cnn":
        a, b, c = counts
        return (27 * a + 2 * a) + (9 * a * b + 2 * b) + (4 * b * c + c) + (c * CLASSES + CLASSES)
    if name == "resnet8":
        a, b, c = counts
        inner = sum(9 * enter * kept + 2 * kept + 9 * kept * leave + 2 * leave for enter, kept, leave in ((4, a, 4), (4, b, 8), (8, c, 16)))
        return 27 * 4 + 2 * 4 + inner + 16 * CLASSES + CLASSES
    leaves = [2, 3, 3, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 20, 20, 20, 40]
    first = (27 * 4 + 8) + (9 * 4 + 8 + 4 * 2 + 4)
    if name == "mobilenet_v2_cifar":  # the first block is as the others; 1x1 shortcuts with norms where channels change at stride 1
        leaves = [4, *leaves]
        first = (27 * 4 + 8) + sum(enter * leave + 2 * leave for enter, leave in ((4, 2), (2, 3), (3, 4), (8, 12), (20, 40)))
    blocks = sum(
        enter * c + 2 * c + 9 * c + 2 * c + c * leave + 2 * leave for enter, leave, c in zip(leaves, leaves[1:], counts, strict=False)
    )
    return first + blocks + (40 * 160 + 2 * 160) + (160 * CLASSES + CLASSES)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mobilenet_v2", "mobilenet_v2_cifar"])
def test_widths_parameters_and_flops_of_a_cut_network_are_those_predicted(name) -> None:
    module, net, flops = gated(name, 4, squared=False)
    counts = some(flops, 1)
    kept = {group: torch.randperm(width)[:c].sort()[0] for group, width, c in zip(flops.groups, flops.widths, counts, strict=True)}
    small = net.channels.compact(module, kept)
    model_profile = profiler.profile(small, SHAPE)
    again = FlopsConstraint.of(Net(small).channels, model_profile, squared=False)
    whole = {layer.layer for layer in flops.terms}
    counted = sum(layer.flops // 2 + 3 * layer.shape[0] * layer.positions for layer in model_profile.layers if layer.name in whole)
    assert counted == of_counts(flops, counts)
    assert again.full == counted
    assert [small.get_submodule(group).weight.shape[0] for group in flops.groups] == counts
    assert sum(value.numel() for value in small.parameters()) == parameters(name, counts)
    assert sum(value.numel() for value in module.parameters()) == parameters(name, list(flops.widths))
    assert net.channels.open(net.channels.gate(kept)[None]) == [counts]
    assert net.channels.used(counts) == {name: small.get_submodule(name).weight.numel() for name in whole}


# ---- the regulariser


def test_figures_of_the_regulariser() -> None:
    """q = 0.8, ResNet-56."""
    flops = resnet56()
    assert float(regulariser(torch.tensor(1.0, dtype=torch.float64), 0.8)) == pytest.approx(2 * log(1.25), abs=1e-12)
    assert float(regulariser(share(flops, 0.9), 0.8)) == pytest.approx(0.22717, abs=5e-6)
    assert float(regulariser(share(flops, 0.8), 0.8)) == pytest.approx(0.02123, abs=5e-6)


def test_figures_of_the_loss_at_the_start() -> None:
    """Twice the regulariser, all gates one."""
    flops = resnet56()
    everything = flops.share(torch.ones(2, flops.n, dtype=torch.bool))
    found = 2 * regulariser(everything, torch.tensor([0.8, 0.5]))
    assert found.tolist() == pytest.approx([0.892574, 2.772589], abs=1e-6)


@given(st.floats(0.01, 1), st.floats(0.02, 1), st.sampled_from([1.0, 10.0]))
def test_the_regulariser_by_hand(r, q, slope) -> None:
    above, below = log(max(r, q + 0.005) / q), slope * log(q / min(r, q - 0.005))
    at = torch.tensor(r, dtype=torch.float64)
    assert float(regulariser(at, q, slope)) == pytest.approx(2 * (above if r > q else below), abs=1e-12)
    assert float(regulariser(at, q, slope, two_sided=False)) == pytest.approx(2 * log(max(r, q) / q), abs=1e-12)


def slope_of(r: float, q: float, **options: float) -> float:
    at = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(regulariser(at, q, **options), at)[0])


@pytest.mark.parametrize("r", [0.7951, 0.799, 0.8, 0.801, 0.8049])
def test_nothing_pulls_near_the_target(r) -> None:
    assert slope_of(r, 0.8) == 0


def test_it_pulls_to_the_target_from_both_sides_or_from_above_alone() -> None:
    assert slope_of(0.9, 0.8) == pytest.approx(2 / 0.9)
    assert slope_of(0.7, 0.8) == pytest.approx(-2 / 0.7)
    assert slope_of(0.7, 0.8, slope=10.0) == pytest.approx(-20 / 0.7)
    assert slope_of(0.9, 0.8, two_sided=False) == pytest.approx(2 / 0.9)
    assert slope_of(0.7, 0.8, two_sided=False) == 0


# ---- both terms, and the hypernetworks they pull


TOY = gated("resnet8", 12)[2]
TARGETS = torch.tensor([0.3, 0.5, 0.6])


class Pair:
    """Two hypernetworks for the small network, and three embeddings; every leaf wants its gradient."""

    def __init__(self) -> None:
        self.z = hypernetwork.orthogonal(len(TOY.widths), rng.key(0))
        self.base = leaves(hypernetwork.fresh(TOY.widths, rng.key(1), True))
        table = {"e": hypernetwork.embedding(len(TOY.widths), rng.key(3, torch.arange(3)))}
        self.client = leaves(hypernetwork.fresh(TOY.widths, rng.key(2), False) | table)

    def logits(self) -> tuple[Tensor, Tensor]:
        net = {key: value for key, value in self.client.items() if key != "e"}
        return hypernetwork.logits(self.base, self.z, TOY.widths), hypernetwork.logits(net, self.client["e"], TOY.widths)

    def terms(self, step: int) -> tuple[Tensor, Tensor]:
        """2 R of the base's share, and the clients' mean with the base held."""
        o, choice = self.logits()
        v = hard(o, rng.key(4, step))
        held = hard(o, rng.key(5, step, torch.arange(3))).detach()
        u = hard(choice, rng.key(6, step, torch.arange(3)), held > 0)
        mine = regulariser(TOY.share(held * gates.merge(held, u)), TARGETS)
        return 2 * regulariser(TOY.share(v), 0.8), 2 * mine.mean()


def leaves(tree: Tree) -> Tree:
    return {key: value.requires_grad_() for key, value in tree.items()}


def hard(o: Tensor, key: Tensor, within: Tensor | None = None) -> Tensor:
    y = gates.soft(o.expand(*key.shape, TOY.n), gates.gumbel(key, TOY.n), 0.4, 3.0)
    return gates.straight(y, TOY.widths, within)


def pulled(term: Tensor, tree: Tree) -> float:
    found = torch.autograd.grad(term, list(tree.values()), allow_unused=True, retain_graph=True)
    return max((float(g.abs().max()) for g in found if g is not None), default=0.0)


def test_each_constraint_pulls_its_own_hypernetwork() -> None:
    pair = Pair()
    base, client = pair.terms(0)
    assert pulled(base, pair.base) > 1e-4
    assert pulled(base, pair.client) == 0
    assert pulled(client, pair.client) > 1e-4
    assert pulled(client, pair.base) == 0


def test_the_budgets_are_reached() -> None:
    """The regulariser alone; gates by mean noise, those of the clients within the base."""
    pair = Pair()
    optimiser = torch.optim.Adam([*pair.base.values(), *pair.client.values()], 3e-3)
    for step in range(250):
        optimiser.zero_grad()
        torch.stack(pair.terms(step)).sum().backward()
        optimiser.step()
    o, choice = pair.logits()
    v = gates.mean(o, 3.0, TOY.widths)
    m = gates.mean(choice, 3.0, TOY.widths, v)
    assert abs(float(TOY.share(v)) - 0.8) < 0.02
    assert (TOY.share(m) - TARGETS).abs().max() < 0.02
