"""Training, aggregation and batches against arithmetic by hand: the checks of FedAvg and FedProx in the baselines' specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_federation import FLEETS, linear, people
from torch import nn

from fedsim.core import tree
from fedsim.core.keys import COUNT
from fedsim.core.types import Feed, LocalOptimizer, LocalTraining
from fedsim.costs import profile
from fedsim.data.population import Population
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg, FedProx
from fedsim.federated.client_work import Evaluate, Loss, Statistics, Train
from fedsim.federated.protocol import Setting
from fedsim.fleet.accounting import ClientCosts, CostAccount
from fedsim.fleet.batches import Batches, Round
from fedsim.fleet.client_images import shown
from fedsim.fleet.messages import WorkerContext
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.packing import cut_cohort
from fedsim.fleet.serial import SerialFleet
from fedsim.nn.net import Net


def fleet(kind: type, population: Population, module: nn.Module, packs: int = 2):  # type: ignore[no-untyped-def]
    net = Net(module).to("cpu", torch.float64)
    account = CostAccount(profile.ModelProfile((), 0, 0, 0), population, LocalTraining().feed(), 0)
    account.charge = lambda order, clients, *_: [ClientCosts() for _ in clients]  # type: ignore[method-assign]
    made = kind(WorkerContext(net, population, 0, dtype=torch.float64), account, packs, lambda: 0.0)
    made.open(1)
    return made


def averaged(kind: type, sizes: list[int], work: Train, packs: int = 2) -> tree.Tree:
    made = fleet(kind, people(sizes), linear(), packs)
    shared = made.site.net.initial
    total = made.run(work, range(len(sizes)), shared).total
    setting = Setting(made.site.net, LocalTraining(), work.aggregate, 1, len(sizes), len(sizes), 0, None)
    return work.aggregate.server({}, shared, total, setting)[0]


@pytest.mark.parametrize("kind", FLEETS)
def test_full_batches_of_all_clients_are_gradient_descent_on_the_pooled_data(kind) -> None:
    sizes = [3, 8, 5]
    work = Train((Feed("train", epochs=1, batch=100, augment=False),), 0.5)
    model = averaged(kind, sizes, work)
    module, data = linear(), people(sizes).train
    x = (data.images(torch.arange(16)).double() / 255 - 0.5) / 0.25
    nn.functional.cross_entropy(module(x), data.labels(torch.arange(16))).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(model["w/" + name], parameter.detach() - 0.5 * parameter.grad, atol=1e-12)


@pytest.mark.parametrize("kind", FLEETS)
def test_the_mean_is_weighted_by_images(kind) -> None:
    """By hand from the totals: sum n_k w_k and sum n_k."""
    made = fleet(kind, people([2, 6]), linear())
    work = Train((Feed("train", epochs=1, batch=2, augment=False),), 0.3)
    both = made.run(work, [0, 1], made.site.net.initial).total
    alone = [fleet(kind, people([2, 6]), linear()).run(work, [k], made.site.net.initial).total for k in (0, 1)]
    assert both[COUNT].item() == 8
    for key in both:
        assert torch.allclose(both[key], alone[0][key] + alone[1][key], atol=1e-12)
    assert torch.allclose(alone[1]["w/1.bias"] / 6, tree.mean(alone[1], alone[1][COUNT], {"w/1.bias": torch.zeros(3).double()})["w/1.bias"])


@pytest.mark.parametrize("kind", FLEETS)
def test_permuting_the_cohort_and_cutting_other_packs_changes_no_bit_of_a_serial_sum(kind) -> None:
    work = Train((Feed("train", epochs=2, batch=2, augment=False),), 0.3, 0.9)
    made = fleet(kind, people([2, 6, 5, 3]), linear())
    forwards = made.run(work, [0, 1, 2, 3], made.site.net.initial).total
    other = fleet(kind, people([2, 6, 5, 3]), linear())
    backwards = other.run(work, [3, 1, 2, 0], made.site.net.initial).total
    assert all(torch.equal(value, backwards[key]) for key, value in forwards.items())
    if kind is SerialFleet:
        cut_finer = fleet(kind, people([2, 6, 5, 3]), linear(), packs=4).run(work, range(4), made.site.net.initial).total
        assert all(torch.equal(value, cut_finer[key]) for key, value in forwards.items())


@pytest.mark.parametrize("kind", FLEETS)
def test_fedprox_without_mu_is_fedavg_to_the_bit_and_its_first_step_always(kind) -> None:
    feed = Feed("train", epochs=1, batch=2, augment=False)
    plain, none = (averaged(kind, [4, 6], Train((feed,), 0.3, aggregate=kept)) for kept in (FedAvg(), FedProx(fedprox_mu=0.0)))
    assert all(torch.equal(value, none[key]) for key, value in plain.items())
    first = Feed("train", steps=1, batch=2, augment=False)
    one, strong = (averaged(kind, [4, 6], Train((first,), 0.3, aggregate=kept)) for kept in (FedAvg(), FedProx(fedprox_mu=5.0)))
    assert all(torch.equal(value, strong[key]) for key, value in one.items())


def test_fedprox_adds_its_term() -> None:
    shared, state = {"w/a": torch.tensor([1.0]), "buf/a": torch.tensor([0.0])}, {"w/a": torch.tensor([3.0]), "buf/a": torch.tensor([9.0])}
    from fedsim.federated.protocol import ClientInput

    sent = ClientInput(shared, {}, {}, torch.tensor(1), torch.tensor([1]), torch.tensor(0))
    assert FedProx(fedprox_mu=0.5).extra(sent, state) == {"w/a": torch.tensor([1.0])}


def test_many_fedprox_steps_reach_the_fixed_point() -> None:
    """For a loss a/2 (w - c)^2 the steps converge to (a c + mu w_t) / (a + mu)."""
    from fedsim.federated.protocol import ClientInput

    a, c, mu, start = 2.0, 5.0, 0.7, torch.tensor([1.0])
    sent = ClientInput({"w/a": start}, {}, {}, torch.tensor(1), torch.tensor([1]), torch.tensor(0))
    w = start.clone()
    for _ in range(400):
        w = w - 0.1 * (a * (w - c) + FedProx(fedprox_mu=mu).extra(sent, {"w/a": w})["w/a"])
    assert torch.allclose(w, torch.tensor([(a * c + mu * 1.0) / (a + mu)]))


def test_a_cohort_of_nobody_or_twice_the_same_is_refused() -> None:
    made = fleet(SerialFleet, people([2, 2]), linear())
    work = Train((Feed("train", epochs=1),), 0.1)
    for cohort, message in (([], "at least one client"), ([1, 1], "client 1 stands in the cohort twice")):
        with pytest.raises(ValueError, match=message):
            made.run(work, cohort, made.site.net.initial)


def test_test_images_are_for_evaluation_alone() -> None:
    made = fleet(SerialFleet, people([2, 2]), linear())
    with pytest.raises(ValueError, match="only Evaluate may see"):
        made.run(Train((Feed("test", epochs=1),), 0.1), [0], made.site.net.initial)
    with pytest.raises(ValueError, match="held-out images; set partition"):
        made.run(Train((Feed("held", epochs=1),), 0.1), [0], made.site.net.initial)


@pytest.mark.parametrize("kind", FLEETS)
def test_evaluation_counts_every_test_image_once(kind) -> None:
    class Method:
        def model_of(self, net, sent):  # type: ignore[no-untyped-def]
            return sent.tree({})

    population = people([10, 13])
    made = fleet(kind, population, linear())
    from fedsim.fleet.client_images import evaluation_shards

    shards = range(population.clients, population.clients + evaluation_shards(population))
    total = made.run(Evaluate.of(Method(), batch=4), shards, made.site.net.initial).total
    x = (population.test.images(torch.arange(23)).double() / 255 - 0.5) / 0.25
    logits, labels = linear()(x), population.test.labels(torch.arange(23))
    assert total["n/images"].item() == 23
    assert total["n/correct"].item() == (logits.argmax(-1) == labels).sum().item()
    assert torch.allclose(total["loss/sum"], nn.functional.cross_entropy(logits, labels, reduction="sum"), atol=1e-6)


@pytest.mark.parametrize("kind", FLEETS)
def test_statistics_move_by_the_closed_form_and_are_averaged_by_images(kind) -> None:
    """A full batch has constant statistics b, so j passes move s to b + (s - b) 0.9^j; the mean over clients is by images."""
    sizes, passes = [30, 10], 4
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).double()
    made = fleet(kind, people(sizes), module)
    work = Statistics((Feed("train", epochs=passes, batch=100, augment=False, cost="forward"),))
    total = made.run(work, [0, 1], made.site.net.initial).total
    x = (people(sizes).train.images(torch.arange(40)).double() / 255 - 0.5) / 0.25
    expected = torch.zeros(2, dtype=torch.float64)
    for part, n in ((x[:30], 30), (x[30:], 10)):
        b = torch.stack([part.mean(), part.var()])
        expected += n / 40 * (b + (torch.tensor([0.0, 1.0]) - b) * 0.9**passes)
    found = torch.stack([total[f"buf/0.running_{name}"].squeeze() / total[COUNT] for name in ("mean", "var")])
    assert torch.allclose(found, expected, atol=1e-8)
    assert total[COUNT].item() == passes * 40


@pytest.mark.parametrize("kind", FLEETS)
def test_loss_is_the_mean_over_all_images(kind) -> None:
    made = fleet(kind, people([7, 5]), linear())
    total = made.run(Loss((Feed("train", epochs=1, batch=3, augment=False, cost="forward"),)), [0, 1], made.site.net.initial).total
    x = (people([7, 5]).train.images(torch.arange(12)).double() / 255 - 0.5) / 0.25
    expected = nn.functional.cross_entropy(linear()(x), people([7, 5]).train.labels(torch.arange(12)))
    assert torch.allclose(total["loss/sum"] / total[COUNT], expected.detach(), atol=1e-12)


def order_of(batches: Batches, k: int) -> list[int]:
    return [int(batches.images[k, i]) for i in batches.plan[k].flatten() if i >= 0]


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(2, 0, [3, 3, 1, 3, 3, 1]), (0, 4, [3, 3, 1, 3])])
def test_batches_cover_every_image_once_an_epoch(epochs, steps, expected) -> None:
    feed = Feed("train", epochs=epochs, steps=steps, batch=3, augment=False)
    batches = Batches(people([7]), feed, [0], [0], Round(0, 1), "cpu", torch.float32)
    assert [step.x.shape[1] for step in batches] == expected
    assert sum(expected) == shown(feed, 7)
    seen = order_of(batches, 0)
    assert sorted(seen[:7]) == list(range(7))
    assert seen[:7] != seen[7 : 14 if epochs else 11] + [0] * (0 if epochs else 3)


def test_batches_are_a_function_of_seed_round_call_and_client_alone() -> None:
    feed = Feed("train", epochs=2, batch=3, augment=False)

    def order(clients: list[int], k: int, seed: int = 0, r: int = 1, call: int = 0) -> list[int]:
        return order_of(Batches(people([9, 9, 9]), feed, clients, [call] * len(clients), Round(seed, r), "cpu", torch.float32), k)

    assert order([0, 1, 2], 1) == order([1], 0) == order([2, 1], 1)
    assert len({tuple(order([1], 0, *key)) for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]}) == 4


def test_a_probe_share_is_fixed_and_at_least_a_batch() -> None:
    def probed(r: int, share: float, batch: int) -> list[int]:
        feed = Feed("probe", epochs=1, batch=batch, share=share, augment=False)
        return order_of(Batches(people([40]), feed, [0], [0], Round(0, r), "cpu", torch.float32), 0)

    assert sorted(probed(1, 0.5, 4)) == sorted(probed(9, 0.5, 4))
    assert probed(1, 0.5, 4) != probed(9, 0.5, 4)
    assert len(probed(1, 0.5, 4)) == 20
    assert len(set(probed(1, 0.05, 8))) == 8
    assert len(set(probed(1, 0.05, 100))) == 40


def test_a_pack_narrows_and_pads_only_where_clients_differ() -> None:
    batches = Batches(
        people([7, 5, 2]), Feed("train", epochs=1, batch=3, augment=False), [0, 1, 2], [0] * 3, Round(0, 1), "cpu", torch.float32
    )
    steps = list(batches)
    assert [step.active for step in steps] == [3, 2, 1]
    assert steps[0].real is not None
    assert steps[0].real.sum(1).tolist() == [3, 3, 2]
    assert steps[1].real is not None
    assert steps[1].real.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert steps[2].real is None
    assert steps[2].x.shape[:2] == (1, 1)


def test_clients_alone_see_what_they_see_in_the_pack() -> None:
    batches = Batches(people([7, 5]), Feed("train", epochs=1, batch=3), [0, 1], [0] * 2, Round(0, 1), "cpu", torch.float32)
    together = list(batches)
    for k in (0, 1):
        for step in batches.alone(k):
            assert torch.equal(step.x[0], together[step.t].x[k, : step.x.shape[1]])
            assert step.real is None


def test_cohorts_are_a_function_of_seed_and_round() -> None:
    made = fleet(SerialFleet, people([2] * 30), linear())
    picks = [made.pick(7, r) for r in range(5)]
    assert all(sorted(set(pick)) == pick and len(pick) == 7 for pick in picks)
    assert picks[3] == fleet(PackedFleet, people([2] * 30), linear()).pick(7, 3)
    assert len({tuple(pick) for pick in picks}) == 5


@pytest.mark.parametrize(("cohort", "packs", "sizes"), [(20, 8, [3, 3, 3, 3, 2, 2, 2, 2]), (3, 16, [1, 1, 1]), (4, 4, [1] * 4)])
def test_packs_differ_by_at_most_one(cohort, packs, sizes) -> None:
    assert [len(part) for part in cut_cohort(list(range(cohort)), packs)] == sizes


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 4),
        ("cosine", [1.0, 0.8535533906, 0.5, 0.1464466094]),
        ("exponential", [1, 0.1, 0.01, 0.001]),
        ("step", [1, 1, 0.1, 0.01]),
    ],
)
def test_schedules(schedule, expected) -> None:
    training = LocalTraining(lr=2.0, schedule=schedule, rounds=4)
    np.testing.assert_allclose([training.at(r).lr / 2.0 for r in (1, 2, 3, 4)], expected)
    assert training.at(1) == LocalOptimizer(2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "wrong", [{}, {"epochs": 1, "steps": 1}, {"epochs": 1, "split": "val"}, {"epochs": 1, "share": 0.0}, {"steps": -1}]
)
def test_a_feed_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="a feed"):
        Feed(**wrong)


@pytest.mark.parametrize(("split", "alike"), [("probe", True), ("train", False)])
def test_a_probe_sees_the_same_batches_at_every_call(split, alike) -> None:
    population, feed = people([9]), Feed(split, epochs=2, batch=2, augment=False)
    first, second = (Batches(population, feed, [0], [call], Round(0, 1), "cpu", torch.float64) for call in (0, 1))
    assert torch.equal(first.plan, second.plan) is alike


@pytest.mark.parametrize("fields", [{"dense_gradient_steps": -1, "dense_gradient_layers": ("fc",)}, {"dense_gradient_steps": 1}])
def test_a_feed_forms_dense_gradients_in_steps_that_it_has_layers_for(fields) -> None:
    with pytest.raises(ValueError, match="dense_gradient_steps >= 0, of its dense_gradient_layers"):
        Feed("train", epochs=1, **fields)


def test_a_cohort_of_more_clients_than_have_images_is_reported() -> None:
    made = fleet(SerialFleet, people([2, 2]), linear())
    with pytest.raises(BadInput, match=r"a cohort of 3 was asked for, but only 2 clients have training images; lower cohort.size"):
        made.pick(3, 1)
    assert made.pick(None, 1) == [0, 1]
