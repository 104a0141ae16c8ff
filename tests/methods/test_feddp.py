"""FedDP (ADP's specification, 3.5 and check 16): against torch's own optimiser and schedule, which every client keeps for good."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from aggregation_by_hand import SIZES, having, mean_of, shares_of
from small_federation import FLEETS, SLOW, World, batches, loaded, small
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.tree import Tree, renamed, under
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg as Mean
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.protocol import ClientInput
from fedsim.methods import fedavg
from fedsim.methods.feddp import KEPT_OPTIMISER, FedDP, TrainZeroing

CONVS = ("conv1", "conv2")
COUNTS = {"conv1": 36, "conv2": 216}
OTHERS = 240 + 10 + 30 + 3 + 2 * 2 * (4 + 6)  # linear layers, and every norm's two tensors and two statistics
THETA = 0.05


class Person:
    """A client by hand: one torch.optim.SGD and one schedule for as long as it lives."""

    def __init__(self, made: World, k: int, fall: float = 1.0, theta: float = 0.0, share: float = 0.0, mu: float = 0.0) -> None:
        train = made.setting.train
        self.made, self.k, self.theta, self.share, self.mu = made, k, theta, share, mu
        self.module = small().double().train()
        self.optimiser = torch.optim.SGD(self.module.parameters(), train.lr, train.momentum, weight_decay=train.decay)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimiser, fall)

    def visit(self, shared: Tree, r: int) -> tuple[Tree, list[Tree]]:
        """What it holds at the end of round `r`, and at the end of each epoch."""
        loaded(self.module, {key: value.clone() for key, value in shared.items()})
        ends, feed = [], self.made.setting.train.feed()
        steps = batches(self.made, feed, self.k, r, 0)
        each = len(steps) // feed.epochs
        for epoch in range(feed.epochs):
            for conv in CONVS:
                weakest_off(self.module.get_submodule(conv).weight, self.share)
            for x, y in steps[epoch * each : (epoch + 1) * each]:
                self.step(x, y, shared)
            self.schedule.step()
            for conv in CONVS:
                weight = self.module.get_submodule(conv).weight
                weight.data[weight.data.abs() <= self.theta] = 0
            ends.append(values_of(self.module))
        return ends[-1], ends

    def step(self, x: Tensor, y: Tensor, shared: Tree) -> None:
        self.optimiser.zero_grad()
        loss = F.cross_entropy(self.module(x), y)
        for name, value in self.module.named_parameters():
            loss = loss + self.mu / 2 * (value - shared[f"w/{name}"]).square().sum()
        loss.backward()
        self.optimiser.step()


def weakest_off(weight: nn.Parameter, share: float) -> None:
    """The filters of smallest L1 norm become 0; half a filter is rounded to even."""
    order = sorted(range(len(weight)), key=lambda i: float(weight.data[i].abs().sum()))
    for i in order[: round(share * len(weight))]:
        weight.data[i] = 0


def values_of(module: nn.Module) -> Tree:
    after = {f"w/{name}": value.detach().clone() for name, value in module.named_parameters()}
    return after | {f"buf/{name}": value.clone() for name, value in module.named_buffers() if value.is_floating_point()}


def constant(kind: type = FLEETS[0], sizes: list[int] = SIZES, **fields: Any) -> World:
    return having(fields.pop("aggregate", Mean()), kind, sizes, **({"schedule": "constant"} | fields))


def played(made: World, method: Any, rounds: int) -> tuple[list[Tree], list[dict[str, float]]]:
    """Broadcasts from the first on, and what every round records."""
    state = method.init(made.setting, None)
    shared, told = [state.shared], []
    for r in range(1, rounds + 1):
        made.fleet.open(r)
        state, row = method.round(made.setting, state, made.fleet, r)
        shared.append(state.shared)
        told.append(row)
    return shared, told


def by_hand(made: World, rounds: int, **fields: Any) -> tuple[list[Tree], list[dict[int, Tree]], list[dict[int, list[Tree]]]]:
    """Broadcasts, and of every round what its clients end with, and end their epochs with."""
    people = {k: Person(made, k, **fields) for k in range(made.setting.clients)}
    shared, ends, epochs = [made.setting.net.initial], [], []
    for r in range(1, rounds + 1):
        cohort = made.fleet.pick(made.setting.cohort, r)
        visits = {k: people[k].visit(shared[-1], r) for k in cohort}
        ends.append({k: end for k, (end, _) in visits.items()})
        epochs.append({k: every for k, (_, every) in visits.items()})
        shared.append(mean_of(list(ends[-1].values()), shares_of([made.population.size(k) for k in cohort])))
    return shared, ends, epochs


def near(one: Tree, other: Tree, within: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert torch.allclose(one[key].double(), value, rtol=within, atol=within), key


def convs(tree: Tree) -> Tree:
    return {key: value for key, value in tree.items() if value.dim() == 4}


# ---- rate and momentum


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("fields", [{"momentum": 0.0}, {"momentum": 0.0, "decay": 0.0}])
def test_without_threshold_and_fall_it_is_fedavg(kind, fields) -> None:
    mine, plain = (played(constant(kind, **fields), method, 4)[0] for method in (FedDP(theta=0.0, lr_decay_per_epoch=1.0), fedavg.FedAvg()))
    for one, other in zip(mine, plain, strict=True):
        near(one, other, 1e-7)  # its rate is a float32


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("fall", [1.0, 0.8])
@pytest.mark.parametrize("aggregate", [Mean(), FedProx(fedprox_mu=0.7)])
def test_a_client_s_optimiser_and_schedule_last_from_visit_to_visit(kind, fall, aggregate) -> None:
    """Cohorts of two of four clients: their schedules stand at different places."""
    made = constant(kind, aggregate=aggregate)
    cohorts = [made.fleet.pick(2, r) for r in range(1, 6)]
    visits = [sum(k in cohort for cohort in cohorts) for k in range(4)]
    assert len(set(visits)) > 1
    assert max(visits) > 2
    found, (expected, _, _) = (
        played(made, FedDP(theta=0.0, lr_decay_per_epoch=fall), 5)[0],
        by_hand(made, 5, fall=fall, mu=getattr(aggregate, "fedprox_mu", 0)),
    )
    for one, other in zip(found, expected, strict=True):
        near(one, other)
    if fall < 1:
        fresh = played(constant(kind, aggregate=aggregate), fedavg.FedAvg(), 5)[0][-1]
        assert not torch.allclose(found[-1]["w/fc2.weight"], fresh["w/fc2.weight"], atol=1e-4)


def test_the_job_s_own_schedule_falls_as_well() -> None:
    made = constant(schedule="exponential", factor=0.5)
    told = played(made, FedDP(theta=0.0, lr_decay_per_epoch=0.9), 3)[1]
    assert [row["lr"] for row in told] == pytest.approx([0.1, 0.05, 0.025])


# ---- small weights


@pytest.mark.parametrize("kind", FLEETS)
def test_small_weights_of_convolutions_are_zero_at_every_epoch_s_end(kind) -> None:
    made = constant(kind)
    found, (expected, _, _) = played(made, FedDP(theta=THETA, lr_decay_per_epoch=0.9), 4)[0], by_hand(made, 4, fall=0.9, theta=THETA)
    for one, other in zip(found, expected, strict=True):
        near(one, other)


def epoch_by_epoch(made: World, work: TrainZeroing, k: int, kept: Tree | None = None) -> tuple[list[Tree], Tree]:
    """The client's weights after each epoch of the work itself, carried out by hand, and what it keeps."""
    net, n = made.setting.net, torch.tensor(made.population.size(k))
    steps = batches(made, work.feeds[0], k, 1, 0)
    sent = ClientInput(made.setting.net.initial, {}, {}, n, torch.tensor([len(steps)]), torch.tensor(0))
    sent = replace(sent, kept=work.init_kept(net, sent) | (kept or {}))
    with torch.no_grad():
        state = {key: value.clone() for key, value in work.init_state(net, sent).items()}
        ends, each = [], len(steps) // work.feeds[0].epochs
        for t, (x, y) in enumerate(steps):
            state, _ = work.step(net, sent, state, batch_of(x, y, t, len(steps)))
            if (t + 1) % each == 0:
                ends.append({key: value.clone() for key, value in state.items()})
        return ends, work.finish(net, sent, state).keep


def batch_of(x: Tensor, y: Tensor, t: int, steps: int) -> Any:
    from fedsim.core.types import Batch

    return Batch(x, y, None, torch.tensor(t), torch.tensor(steps))


def test_epoch_by_epoch_no_weight_is_small_and_some_come_back() -> None:
    made = constant()
    train = replace(SLOW, epochs=6).feed()
    ends, keep = epoch_by_epoch(made, TrainZeroing((train,), 0.1, 0.9, 1e-3, theta=THETA), 1)
    assert len(ends) == 6
    for state in ends:
        for key, value in convs(under(state, "w/")).items():
            assert not ((value != 0) & (value.abs() <= THETA)).any(), key
    assert float(keep["n/epochs"]) == 6
    zero = [torch.cat([value.flatten() == 0 for value in convs(under(state, "w/")).values()]) for state in ends]
    assert zero[0].any()
    assert (zero[0] & ~zero[-1]).any()  # came back
    assert any((under(ends[-1], "w/")[key].abs() <= THETA).any() for key in ("w/fc1.weight", "w/fc2.weight"))  # the classifier may be small
    assert keep.keys() == {"n/epochs", *renamed(under(made.setting.net.initial, "w/"), "w/", KEPT_OPTIMISER + "momentum/")}


def test_a_first_epoch_leaves_all_but_the_convolutions_as_training_left_it() -> None:
    made = constant()
    train = replace(SLOW, epochs=1).feed()
    (plain,), (zeroing,) = (epoch_by_epoch(made, TrainZeroing((train,), 0.1, 0.9, 1e-3, theta=theta), 1)[0] for theta in (0.0, 0.3))
    changed = {key for key, value in plain.items() if not torch.equal(value, zeroing[key])}
    assert changed == {f"w/{name}.weight" for name in CONVS}
    for key in changed:
        assert torch.equal(zeroing[key], torch.where(plain[key].abs() > 0.3, plain[key], 0.0))


def test_a_weight_that_is_exactly_theta_goes() -> None:
    """One step of rate 0: what was sent, small weights gone."""
    made = constant(sizes=[3, 3])
    first = made.setting.net.initial["w/conv1.weight"]
    theta = float(first.abs().flatten().sort().values[17])
    (end,), _ = epoch_by_epoch(made, TrainZeroing((replace(SLOW, epochs=1).feed(),), 0.0, theta=theta), 0)
    assert int((end["w/conv1.weight"] == 0).sum()) == 18
    assert torch.equal(end["w/conv1.weight"][end["w/conv1.weight"] != 0], first[first.abs() > theta])


def test_the_server_prunes_nothing() -> None:
    """Its model is the plain mean of what clients send, in which some weights are small."""
    made = constant()
    found = played(made, FedDP(theta=THETA, lr_decay_per_epoch=1.0), 1)[0][1]
    _, (ends,), _ = by_hand(made, 1, theta=THETA)
    mean = mean_of(list(ends.values()), shares_of([made.population.size(k) for k in ends]))
    near(found, mean)
    small_ones = [(value != 0) & (value.abs() <= THETA) for value in convs(found).values()]
    assert any(part.any() for part in small_ones)


# ---- soft filter pruning


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("share", [0.3, 0.75])  # 1.2 and 1.8 filters, and 3 and 4.5, of 4 and 6
def test_weak_filters_are_zero_before_every_epoch(kind, share) -> None:
    made = constant(kind)
    initial = made.setting.net.initial
    for name, weight in (("1", 1.0), ("2", 1.5)):
        initial[f"w/norm{name}.bias"] += 0.5  # at 0 the ReLU behind an empty filter would let none come back
        initial[f"w/conv{name}.weight"][2] = 0.0
        initial[f"w/conv{name}.weight"][2, 0, 0, 0] = weight  # the smallest L1 norm, and the largest L2 norm
    method = FedDP(theta=0.0, filters=share, lr_decay_per_epoch=0.9)
    found, (expected, _, _) = played(made, method, 4)[0], by_hand(made, 4, fall=0.9, share=share)
    for one, other in zip(found, expected, strict=True):
        near(one, other)


def test_filters_may_come_back_and_of_equal_ones_the_first_goes() -> None:
    made = constant(sizes=[3, 3])
    initial = made.setting.net.initial
    initial["w/conv1.weight"] = torch.ones_like(initial["w/conv1.weight"])
    initial["w/norm1.bias"] = torch.ones_like(initial["w/norm1.bias"])
    work = TrainZeroing((replace(SLOW, epochs=1).feed(),), 0.0, filters=0.5)
    (still,), _ = epoch_by_epoch(made, work, 0)
    assert [bool(part.any()) for part in still["w/conv1.weight"]] == [False, False, True, True]
    (moved,), _ = epoch_by_epoch(made, replace(work, lr=0.1), 0)
    assert all(bool(part.any()) for part in moved["w/conv1.weight"][:2])


# ---- what is recorded


def test_densities_and_bytes_are_counted() -> None:
    made = constant()
    shared, told = played(made, FedDP(theta=THETA, lr_decay_per_epoch=0.9), 3)
    _, ends, _ = by_hand(made, 3, fall=0.9, theta=THETA)
    for r in range(3):
        left = [{name: int((end[f"w/{name}.weight"] != 0).sum()) for name in CONVS} for end in ends[r].values()]
        sent, after = ({name: int((shared[i][f"w/{name}.weight"] != 0).sum()) for name in CONVS} for i in (r, r + 1))
        by_weights = [sum(one.values()) / 252 for one in (*left, after)]
        by_layers = [(one["conv1"] / 36 + one["conv2"] / 216) / 2 for one in (*left, after)]
        row = told[r]
        assert row["client_conv_density"] == pytest.approx(sum(by_weights[:2]) / 2, abs=1e-12)
        assert row["client_conv_density_layers"] == pytest.approx(sum(by_layers[:2]) / 2, abs=1e-12)
        assert row["server_conv_density"] == pytest.approx(by_weights[2], abs=1e-6)
        assert row["server_conv_density_layers"] == pytest.approx(by_layers[2], abs=1e-6)
        assert row["bytes_up_indexed"] == sum(8 * sum(one.values()) + 4 * OTHERS for one in left)
        assert row["bytes_down_indexed"] == 2 * (8 * sum(sent.values()) + 4 * OTHERS)
        assert by_weights[0] < 0.95
    assert sum(COUNTS.values()) + OTHERS == sum(value.numel() for value in under(shared[0], "w/", "buf/").values())


def test_what_travels_is_dense_and_nothing_of_the_optimiser() -> None:
    made = constant()
    played(made, FedDP(theta=THETA), 2)
    for order in made.seen:
        assert order.shared.keys() == made.setting.net.initial.keys()
        assert order.reply.total.keys() == {*made.setting.net.initial, "n/images"}
    bills = made.fleet.account.bills.values()
    assert {(bill.bytes_up, bill.bytes_down) for bill in bills} == {(4 * (252 + OTHERS),) * 2}


# ---- bad input


@pytest.mark.parametrize(
    "fields", [{"theta": -1e-3}, {"filters": -0.1}, {"filters": 1.1}, {"lr_decay_per_epoch": 0.0}, {"lr_decay_per_epoch": 1.01}]
)
def test_fields_that_cannot_be_are_refused(fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        FedDP(**fields)


def test_jobs_that_it_cannot_do_are_reported() -> None:
    made = constant()
    steps = replace(made.setting, train=replace(made.setting.train, epochs=0, steps=3))
    with pytest.raises(BadInput, match=r"set train.epochs"):
        FedDP().init(steps, None)
    for aggregate in (FedNova(0.9), Scaffold(0.1)):
        with pytest.raises(BadInput, match=r'use aggregate = "fedavg" or "fedprox", or method.lr_decay_per_epoch = 1'):
            FedDP().init(replace(made.setting, aggregate=aggregate), None)
        shared, rows = played(constant(aggregate=aggregate), FedDP(lr_decay_per_epoch=1), 2)
        assert len(rows) == 2
        assert all(value.isfinite().all() for value in shared[-1].values())
    assert isinstance(FedDP().init(replace(made.setting, aggregate=FedProx(0.1)), None), AveragedState)
