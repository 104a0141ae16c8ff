"""ADP's rounds (specification, 3.2, 3.4, checks 6, 9, 10 and 17): what is averaged, what travels, and what a client measures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adp_federation import (
    CLASSES,
    GATES,
    KEPT,
    SHAPE,
    SIZES,
    WIDTHS,
    first_of,
    having,
    mean_of,
    measured,
    module_of,
    near,
    owned,
    pixels,
    seen,
    states,
    used,
    visit,
    weights,
)
from small_federation import FLEETS, World, world
from torch import Tensor

from fedsim import models
from fedsim.core import keys
from fedsim.core.keys import FOLDED_GATE, FREQUENCY, MEAN_GATE
from fedsim.core.tree import under
from fedsim.core.types import LocalTraining
from fedsim.costs import communication, flops
from fedsim.errors import BadInput
from fedsim.fleet.client_images import shown
from fedsim.methods import fedavg
from fedsim.methods.adp import ADP
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.net import Net

NONE = ADP(export="none")


# ---- 6: gates that are 1 and stay so


class Frozen(Net):
    """Its gates do not learn."""

    def gradient(self, *arguments, **named):  # type: ignore[no-untyped-def]
        loss, gradient, buffers, taps = super().gradient(*arguments, **named)
        still = {key: torch.zeros_like(value) for key, value in gradient.items() if key.startswith("w/gates.")}
        assert still
        return loss, gradient | still, buffers, taps


@pytest.mark.parametrize("kind", FLEETS)
def test_under_gates_of_1_that_stay_so_it_is_fedavg(kind) -> None:
    """d = 1, U = 0, c = 1, and no decay, which would move the gates."""
    module = module_of(keep=1.0)
    for name, value in module.named_parameters():
        if name.startswith("gates."):
            value.data.fill_(float(name.endswith("bias")))
    made, plain = having(kind=kind, module=module, decay=0.0), having(kind=kind, module=module_of(keep=None), decay=0.0)
    net = Frozen(module).to("cpu", torch.float64)
    made.setting, made.fleet.site = replace(made.setting, net=net), replace(made.fleet.site, net=net)
    found, state = states(made, NONE)[0], fedavg.FedAvg().init(plain.setting, None)
    for r in (1, 2):
        plain.fleet.open(r)
        state, _ = fedavg.FedAvg().round(plain.setting, state, plain.fleet, r)
        mine = {key: value for key, value in found[r].shared.items() if key not in GATES}
        near(mine, state.shared, 0 if kind is FLEETS[0] else 1e-12)
        assert all((found[r].shared[key] == float(key.endswith("bias"))).all() for key in GATES)


# ---- 9: the mean


@pytest.mark.parametrize("kind", FLEETS)
def test_clients_of_30_and_10_images_weigh_3_to_1_gates_and_statistics_as_well(kind) -> None:
    made = having([30, 10], kind=kind)
    found = states(made, NONE)[0]
    for r in (1, 2):
        ends = [visit(made, found[r - 1].shared, k, r) for k in (0, 1)]
        expected = {key: 0.75 * value + 0.25 * ends[1][key] for key, value in ends[0].items()}
        near(found[r].shared, expected)
        moved = [key for key in GATES if not torch.allclose(expected[key], ends[0][key], atol=1e-5)]
        assert moved == GATES


def test_counters_are_no_part_of_what_is_averaged() -> None:
    made = having()
    found = states(made, NONE)[0][-1].shared
    counters = {f"buf/{name}" for name, value in module_of().named_buffers() if not value.is_floating_point()}
    assert counters == {"buf/norm1.num_batches_tracked", "buf/norm2.num_batches_tracked"}
    assert not counters & found.keys()
    assert all(value.is_floating_point() for value in found.values())
    assert made.setting.net.plain(found).norm1.num_batches_tracked.dtype == torch.int64


# ---- 10: frequencies

LEVELS = torch.tensor([10, 40, 70, 100, 130, 160, 190, 220, 250])  # grey of image i, all over it


def graded(kind: type, keep: float = 1.0, moved: bool = False) -> World:
    """One client with grey images; the first layer's gates open above or below a grey, the second's always or never."""
    x = LEVELS.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    y, owner = torch.arange(len(x)) % CLASSES, torch.zeros(len(x), dtype=torch.int64)
    module = module_of(keep=keep)
    with torch.no_grad():
        module.gates.conv1.weight.copy_(torch.tensor([[4.0, 0.0], [4.0, 0.0], [-4.0, 0.0], [4.0, 0.0]]))
        sign = torch.tensor([1.0, 1.0, -1.0, 1.0])
        module.gates.conv1.bias.copy_(-4 * sign * sigmoid_of(torch.tensor([115.0, 205.0, 55.0, 300.0])))
        module.gates.conv2.weight.zero_()
        module.gates.conv2.bias.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -0.5, 3.0, -3.0]))
    made = world(owned(x, y, owner), module, kind, LocalTraining(batch=4, epochs=1, lr=0.0))
    made.setting = replace(made.setting, rounds=1, model_profile=profiler.profile(module, SHAPE))
    if moved:
        crop = replace(made.population, augment=("crop", "flip"), crop_pad=3)
        made.population, made.fleet.site = crop, replace(made.fleet.site, population=crop)
    return made


def sigmoid_of(level: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-(level / 255 - 0.5) / 0.25))


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("moved", [False, True])
def test_known_images_open_known_channels(kind, moved) -> None:
    """Above 115 five of nine images, above 205 two, below 55 two, above 300 none; whether or not training moves images."""
    made = graded(kind, moved=moved)
    states(made, ADP())
    kept = made.fleet.kept[0]
    assert torch.equal(kept[FREQUENCY], torch.tensor([5, 2, 2, 0, *[9, 0, 0, 9, 9, 0, 9, 0]]) / 9)
    expected = [(1.0, 5), (0.0, 0), (0.0, 0), (2.0, 9), (0.5, 9), (0.0, 0), (3.0, 9), (0.0, 0)]
    assert torch.allclose(kept[MEAN_GATE][4:], torch.tensor([value for value, _ in expected]))
    s, level = sigmoid_of(LEVELS.double()), sigmoid_of(torch.tensor([115.0, 205.0, 55.0], dtype=torch.float64))
    slopes = [4 * (s - level[0]).clamp(min=0).mean(), 4 * (s - level[1]).clamp(min=0).mean(), 4 * (level[2] - s).clamp(min=0).mean()]
    assert torch.allclose(kept[MEAN_GATE][:3].double(), torch.stack(slopes), rtol=1e-5)


def test_under_a_share_a_channel_is_open_where_it_is_among_the_largest() -> None:
    """At most two of four are open at once here; the mask prefers the third to the second, as often open, for its larger mean."""
    made = graded(FLEETS[0], keep=0.5)
    state = states(made, ADP())[0][-1]
    assert torch.equal(made.fleet.kept[0][FREQUENCY], torch.tensor([5, 2, 2, 0, *[9, 0, 0, 9, 9, 0, 9, 0]]) / 9)
    assert used(made, ADP(), state, 0)[keys.GATE].tolist() == [
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("kind", FLEETS)
def test_a_client_s_frequencies_and_mask_are_those_of_its_own_images(kind) -> None:
    """Of clients whose last batches are not full; the mask is the start of a full sort."""
    made = having(kind=kind)
    state, found = states(made, ADP())[0][-1], []
    for k in range(4):
        kept, (f, g) = made.fleet.kept[k], measured(state.shared, pixels(made, k))
        assert torch.equal(kept[FREQUENCY], f.float())
        assert torch.allclose(kept[MEAN_GATE].double(), g, rtol=1e-5)
        model = used(made, ADP(), state, k)
        assert torch.equal(model[keys.GATE], first_of(f, g))
        near(weights(model), weights(state.shared), 0)
        found.append(tuple(model[keys.GATE].tolist()))
    assert len(set(found)) > 1


def test_every_client_with_images_measures_after_the_last_round_and_before_it_none() -> None:
    made = having(cohort=2, rounds=3)
    states(made, ADP())
    assert [(order.r, len(order.clients)) for order in made.seen] == [(1, 2), (2, 2), (3, 2), (3, 4)]
    assert all(FREQUENCY in made.fleet.kept[k] for k in range(4))


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("align", [1, 3])
def test_folded_gates_are_means_under_the_client_s_own_mask(kind, align) -> None:
    method, counts = ADP(export_gate="folded", align=align), {1: KEPT, 3: (3, 6)}[align]
    made = having(kind=kind)
    state, x = states(made, method)[0][-1], torch.randn(6, *SHAPE, dtype=torch.float64)
    for k in range(4):
        mask = first_of(*measured(state.shared, pixels(made, k)), counts)
        expected = seen(state.shared, pixels(made, k), mask)[1].mean(0)
        assert torch.allclose(made.fleet.kept[k][FOLDED_GATE].double(), expected, rtol=1e-5)
        model = used(made, method, state, k)
        assert [int(part.sum()) for part in model[keys.GATE].split(WIDTHS)] == list(counts)
        assert torch.allclose(made.setting.net(model, x)[0], seen(state.shared, x, mask, expected)[0], rtol=1e-5, atol=1e-6)


def test_one_mask_for_all_is_that_of_the_summed_frequencies() -> None:
    """Every client's alike, however many images it has: by images it would be another."""
    method, sizes = ADP(export="global"), [3, 3, 30]
    made = having(sizes, rounds=1)
    state = states(made, method)[0][-1]
    each = [measured(state.shared, pixels(made, k)) for k in range(3)]
    expected = first_of(*(sum(part[i] for part in each) for i in (0, 1)))
    by_images = first_of(*(sum(n * part[i] for n, part in zip(sizes, each, strict=True)) for i in (0, 1)))
    assert not torch.equal(expected, by_images)
    shared, own, net = method.deploy(made.setting, state, made.fleet, [0, 1])
    assert torch.equal(shared[keys.GATE], expected)
    assert (own, net) == ({}, None)
    assert all(torch.equal(used(made, method, state, k)[keys.GATE], expected) for k in range(3))


def test_without_export_gates_go_on_choosing_by_the_image() -> None:
    made, x = having(), torch.randn(5, *SHAPE, dtype=torch.float64)
    state = states(made, NONE)[0][-1]
    model = used(made, NONE, state, 1)
    assert keys.GATE not in model
    assert torch.allclose(made.setting.net(model, x)[0], seen(state.shared, x)[0], atol=1e-10)


# ---- 17: bytes


def test_the_gated_vgg16_is_as_many_bytes_as_published() -> None:
    initial = Net(models.build(settings.ModelSettings("vgg16", gate_keep=0.7), (3, 32, 32), 10, 0)).initial
    assert communication.length(under(initial, "w/")) == 4 * 35_281_162
    assert communication.length(initial) == 141_158_440


@pytest.mark.parametrize("method", [ADP(), ADP(export_gate="folded"), NONE])
def test_the_last_round_and_its_export_cost_what_every_round_costs(method) -> None:
    """What a client measures stays with it."""
    made, values = having(rounds=1), sum(value.numel() for value in module_of().parameters()) + 2 * 12
    states(made, method)
    assert {(bill.bytes_up, bill.bytes_down) for bill in made.fleet.account.bills.values()} == {(4 * values,) * 2}


@pytest.mark.parametrize(("method", "times"), [(ADP(), 1), (ADP(export_gate="folded"), 2), (ADP(personalise=2), 1 + 2 * 3)])
def test_what_clients_do_after_training_is_billed_to_nobody_but_counted(method, times) -> None:
    made = having(rounds=1, cohort=2)
    states(made, method)
    account, trained = made.fleet.account, made.seen[0].clients
    assert sorted(account.bills) == trained
    images = sum(made.population.size(k) for k in range(4))
    assert account.deployed == times * images * flops.forward_flops(made.setting.model_profile)
    for k, bill in account.bills.items():
        assert bill.samples == shown(made.setting.train.feed(), made.population.size(k))
        assert bill.train_flops == 3 * bill.samples * flops.forward_flops(made.setting.model_profile)


# ---- what is recorded


@pytest.mark.parametrize("kind", FLEETS)
def test_shares_are_counted_by_hand(kind) -> None:
    """Multiply-adds on 4x4 images: 9 · 2 · c1 · 16 and 9 · c1 · c2 · 4; gates 2 · 4 + 4 · 8; behind them 8 · 128 + 128 · 3."""
    dense = 9 * 2 * 4 * 16 + 9 * 4 * 8 * 4
    gates_of, behind = 8 + 32, 8 * 128 + 128 * 3
    for method, kept, gated in ((ADP(), KEPT, 2 * 2 + 2 * 4), (ADP(align=3), (3, 6), 2 * 3 + 3 * 6), (ADP(export_gate="folded"), KEPT, 0)):
        made = having(kind=kind)
        found, told = states(made, method)
        nominal = 9 * 2 * 2 * 16 + 9 * 2 * 4 * 4
        assert told[0]["nominal_convs_share"] == pytest.approx(nominal / dense)
        assert told[0]["nominal_share"] == pytest.approx((nominal + gates_of + behind) / (dense + behind))
        convs = []
        for k in range(4):
            active = seen(found[-1].shared, pixels(made, k))[1] > 0
            convs += [9 * 2 * int(row[:4].sum()) * 16 + 9 * int(row[:4].sum()) * int(row[4:].sum()) * 4 for row in active]
        assert len(convs) == sum(SIZES)
        mean = sum(convs) / len(convs)
        assert told[-1]["active_convs_share"] == pytest.approx(mean / dense)
        assert told[-1]["active_share"] == pytest.approx((mean + gates_of + behind) / (dense + behind))
        assert told[-1]["active_convs_share"] <= nominal / dense + 1e-12
        small = 9 * 2 * kept[0] * 16 + 9 * kept[0] * kept[1] * 4 + gated + kept[1] * 128 + 128 * 3
        assert told[-1]["export_share"] == pytest.approx(small / (dense + behind))
        assert "active_share" not in told[1]
    assert "export_share" not in states(having(), NONE)[1][-1]


def test_channels_that_vary_are_open_for_some_of_a_client_s_images_but_not_for_all() -> None:
    made = having()
    found, told = states(made, ADP())
    shares = []
    for k, n in enumerate(SIZES):
        f = measured(found[-1].shared, pixels(made, k))[0]
        shares += [float(((f > 0) & (f < 1)).double().mean())] * n
    assert told[-1]["varying_share"] == pytest.approx(sum(shares) / len(shares))
    assert 0 < told[-1]["varying_share"] < 1


# ---- bad input


@pytest.mark.parametrize("fields", [{"align": 0}, {"personalise": -1}])
def test_fields_that_cannot_be_are_refused(fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ADP(**fields)


@pytest.mark.parametrize("export", ["global", "none"])
def test_folded_gates_are_a_client_s_own(export) -> None:
    with pytest.raises(BadInput, match='needs export = "client"'):
        ADP(export=export, export_gate="folded")


def test_models_that_it_cannot_train_are_reported() -> None:
    plain = having(module=module_of(keep=None))
    with pytest.raises(BadInput, match=r"set model.gate_keep"):
        ADP().init(plain.setting, None)
    for norm in ("group", "none"):
        made = having(module=module_of(norm=norm))
        with pytest.raises(BadInput, match=r"needs batch norms"):
            ADP(bn="local").init(made.setting, None)
        assert ADP(gates="local").init(made.setting, None).shared


def test_ends_of_clients_are_weighed_in_partial_cohorts() -> None:
    made = having(cohort=2)
    found = states(made, NONE)[0]
    for r in (1, 2):
        cohort = made.fleet.pick(2, r)
        ends = [visit(made, found[r - 1].shared, k, r) for k in cohort]
        near(found[r].shared, mean_of(ends, [SIZES[k] for k in cohort]))
