"""DWFNP's rounds: what learns in which of them and from what, by hand in plain torch, and what must hold in all."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gated_federation import (
    QUICK,
    SGD,
    Precise,
    batches,
    by_hand,
    chain,
    descended,
    gated,
    leaves,
    mean_of,
    module_of,
    near,
    same,
    states,
)
from small_federation import FLEETS, World
from torch.nn import functional as F

from fedsim.core import rng
from fedsim.core.keys import COUNT, EMBEDDING, GATE_GRADIENT, GATE_STEPS
from fedsim.core.tree import under
from fedsim.core.types import Feed
from fedsim.federated.aggregation import FedProx
from fedsim.federated.averaged_round import AveragedState
from fedsim.methods import fedavg
from fedsim.methods.dwfnp import DWFNP

SIZES = (12, 9, 14)
HELD = Feed("held", steps=1, batch=4, cost="inputs")


def works(made: World) -> list[tuple[int, str]]:
    return [(seen.r, type(seen.work).__name__) for seen in made.seen]


# ---- when masks learn


@pytest.mark.parametrize(
    ("fields", "learn"),
    [
        ({"warmup": 0, "hyper_interval": 1}, [1, 2, 3, 4, 5, 6]),
        ({"warmup": 2, "hyper_interval": 3}, [3, 4, 5, 6]),
        ({"warmup": 2, "hyper_interval": 6}, [4, 6]),
        ({"warmup": 0, "hyper_interval": 5}, [5]),
        ({"warmup": 0, "hyper_interval": 9, "hyper_steps": 2}, [3, 3, 6, 6]),
        ({"hyper_interval": 1, "cotrain": 2}, [1, 2]),
    ],
)
def test_masks_learn_after_the_warm_up_where_steps_are_a_multiple_of_the_interval_until_the_cut(fields, learn) -> None:
    """Three local steps a round; every round trains the weights, also that of the cut."""
    made = gated((5,), rounds=8)
    made.play(DWFNP(**{"cotrain": 6} | fields), 8)
    assert [r for r, name in works(made) if name == "GateGradient"] == learn
    assert [r for r, name in works(made) if name == "TrainGated"] == list(range(1, 9))
    assert [name for r, name in works(made) if r == learn[0]][-1] == "TrainGated"


def test_check_11_each_step_leaves_the_others_parameters_alone() -> None:
    """Step A of the hypernetworks moves no weight; a round without it moves no hypernetwork."""
    made = gated(rounds=6)
    method = DWFNP(warmup=1, hyper_interval=6, cotrain=4)
    after = states(made, method, 4)
    moved = [not same(one.masks.hyper, other.masks.hyper) for one, other in pairwise(after)]
    assert moved == [False, True, False, True]
    order, training = (seen for seen in made.seen if seen.r == 2)
    assert all(training.shared[key] is value for key, value in order.shared.items())
    assert list(order.reply.total) == [COUNT]
    assert list(order.reply.each) == [GATE_GRADIENT]
    frozen = states(gated(rounds=6), replace(method, freeze_weights=True), 4)
    assert same(frozen[2].shared, frozen[1].shared)
    assert same(frozen[2].masks.hyper, after[2].masks.hyper)


def test_freeze_trains_weights_in_the_warm_up_and_after_the_cut_alone() -> None:
    made = gated((5, 5), rounds=6)
    made.play(DWFNP(warmup=2, hyper_interval=1, cotrain=4, freeze_weights=True), 6)
    learn, train = "GateGradient", "TrainGated"
    assert works(made) == [(1, train), (2, train), (3, learn), (4, learn), (5, train), (6, train)]


# ---- learning


def test_check_9_with_one_client_server_and_client_learn_the_same() -> None:
    """In float64 but for the unit of sums over clients, 2^-68: squares of gradients of 1e-9 and less are lost in it."""
    ends = []
    for where in ("server", "client"):
        made = gated((20,))
        state, _ = made.play(Precise(hypernet=where, cotrain=4, **QUICK), 3)
        ends.append(state)
    server, client = ends
    begin = Precise(**QUICK).controller(made.setting).begin().hyper
    assert all(not torch.equal(server.masks.hyper[key], value) for key, value in under(begin, "w/").items())
    near(under(server.masks.hyper, "opt/", "n/"), under(client.masks.hyper, "opt/", "n/"), 1e-8)
    near(under(server.masks.hyper, "w/"), under(client.masks.hyper, "w/"), 5e-5)
    near(server.masks.table.rows, client.masks.table.rows, 1e-9)
    near(server.shared, client.shared, 1e-9)


@pytest.mark.parametrize("kind", FLEETS)
def test_clients_that_learn_copies_average_them_and_their_moments(kind) -> None:
    """Each by torch's AdamW on its own whole chain; the embedding stays with its owner."""
    made, clients = gated(kind=kind), [0, 1, 2, 3]
    method = Precise(hypernet="client", cotrain=4, client_flops_share=0.5, **QUICK)
    controller, state = method.controller(made.setting), method.init(made.setting, None)
    made.fleet.open(1)
    state, _ = method.round(made.setting, state, made.fleet, 1)
    begin, key = controller.begin(), rng.key(0, "learn", 1, 0)
    rows, ends, own = controller.rule.embeddings(0, torch.tensor(clients)), [], []
    for k in clients:
        w = leaves(under(begin.hyper, "w/") | {EMBEDDING: rows[EMBEDDING][k]})
        x, y = batches(made, HELD, k, 1)[0]

        def loss(_: int, gate: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return F.cross_entropy(by_hand(module_of(), made.setting.net.initial, gate)(x), y)

        keys = rng.fold(key, torch.tensor([k]))
        chain(w, w[EMBEDDING].unsqueeze(0), controller.rule.z(0), key, keys, [0.5], 0.8, 0.5, loss).backward()
        optimiser = torch.optim.AdamW(list(w.values()), 0.02, weight_decay=0.01)
        optimiser.step()
        found = {name: value.detach() for name, value in w.items()}
        found |= {f"opt/first/{name[2:]}": optimiser.state[value]["exp_avg"] for name, value in w.items()}
        found |= {f"opt/second/{name[2:]}": optimiser.state[value]["exp_avg_sq"] for name, value in w.items()}
        own.append({name: value for name, value in found.items() if name.endswith("embedding")})
        ends.append({name: value for name, value in found.items() if not name.endswith("embedding")})
    near({name: value for name, value in state.masks.hyper.items() if name != "n/steps"}, mean_of(ends), 1e-9)
    assert float(state.masks.hyper["n/steps"]) == 1
    near(under(state.masks.table.rows, "w/", "opt/"), {name: torch.stack([one[name] for one in own]) for name in own[0]}, 1e-9)


def test_an_averaged_table_moves_by_a_share_of_each_clients_step() -> None:
    ends = []
    for sync in ("owner", "mean"):
        made = gated()
        ends.append(made.play(Precise(hypernet="client", embed_sync=sync, cotrain=4, **QUICK), 1)[0].masks)
    first = Precise().controller(made.setting).rule.embeddings(0, torch.arange(4))
    assert same(ends[0].hyper, ends[1].hyper)
    owner, mean = ({EMBEDDING: end.table.rows[EMBEDDING] - first[EMBEDDING]} for end in ends)
    near(mean, {EMBEDDING: owner[EMBEDDING] / 4}, 1e-12)


@pytest.mark.parametrize("hypernet", ["server", "client"])
def test_check_10_rows_outside_of_the_cohort_stay_bit_for_bit(hypernet) -> None:
    """Four clients have rows; then {0, 2} learn: of both others neither row nor moments nor steps change."""
    made = gated()
    method = DWFNP(hypernet=hypernet, cotrain=4, **QUICK)
    controller = method.controller(made.setting)
    learn = controller.step_on_server if hypernet == "server" else controller.step_on_clients
    made.fleet.open(1)
    before = learn(controller.begin(), made.fleet, made.setting.net.initial, [0, 1, 2, 3], (1, 0), HELD, 0.01)
    made.fleet.open(2)
    after = learn(before, made.fleet, made.setting.net.initial, [0, 2], (2, 0), HELD, 0.01)
    assert after.table.clients.tolist() == [0, 1, 2, 3]
    assert set(before.table.rows) == {EMBEDDING, "opt/first/embedding", "opt/second/embedding", "n/steps"}
    for key, old in before.table.rows.items():
        unlike = (after.table.rows[key] != old).any(1)
        assert unlike.tolist() == [True, False, True, False], key


def test_an_embedding_moves_with_its_own_client_alone() -> None:
    """Another client's target changes nothing of the row, and its gradient is not divided by the number of clients."""
    rows = []
    for targets, clients in (((0.5, 0.5, 0.5, 0.5), [0, 1, 2, 3]), ((0.5, 0.5, 0.3, 0.2), [0, 1, 2, 3]), ((0.5, 0.5, 0.5, 0.5), [1])):
        made = gated()
        controller = Precise(client_flops_share=targets, bias=0.5).controller(made.setting)
        made.fleet.open(1)
        table = controller.step_on_server(controller.begin(), made.fleet, made.setting.net.initial, clients, (1, 0), HELD, 0.01).table
        rows.append(table.rows["opt/first/embedding"])
    near({"1": rows[0][1]}, {"1": rows[1][1]}, 1e-12)
    assert not torch.allclose(rows[0][2], rows[1][2])
    near({"1": rows[0][1]}, {"1": rows[2][0]}, 1e-12)


# ---- weights


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_warm_up_is_fedavg_with_averaged_momentum(norm, weights) -> None:
    """Round after round in float32, up to the unit that sums over clients are rounded to."""
    made = gated(SIZES, module_of(norm=norm, standardise=True), dtype=torch.float32, rounds=8)
    found = states(made, DWFNP(warmup=3, hyper_interval=1, weights=weights), 3)
    n = [made.population.size(k) for k in range(3)]
    shares = [count / sum(n) if weights == "samples" else 1 / 3 for count in n]
    for r in (1, 2, 3):
        before, ends = found[r - 1].shared, []
        for k in range(3):
            module = by_hand(module_of(norm=norm, standardise=True), before)
            end = descended(made, module, under(before, "opt/"), batches(made, SGD.feed(), k, r), 0.1)
            ends.append(end[0] | end[1])
        near(found[r].shared, mean_of(ends, shares), 2e-7)
    assert under(found[3].shared, "opt/")


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_by_images_and_without_sent_momentum_the_warm_up_is_fedavg_bit_for_bit(norm) -> None:
    """The method that averages weights and does nothing else, on the same draws."""
    made, other = (gated(SIZES, module_of(norm=norm, standardise=True), dtype=torch.float32, rounds=8) for _ in range(2))
    state = states(made, DWFNP(warmup=3, hyper_interval=1, weights="samples", momentum="reset"), 3)[3]
    plain = AveragedState(under(other.setting.net.initial, "w/", "buf/"), {})
    for r in (1, 2, 3):
        other.fleet.open(r)
        plain, _ = fedavg.FedAvg().round(other.setting, plain, other.fleet, r)
    assert same(state.shared, plain.shared)


def test_momentum_that_is_reset_begins_at_zero_in_every_round() -> None:
    made = gated((9, 12))
    found = states(made, DWFNP(warmup=2, hyper_interval=1, momentum="reset", cotrain=3), 2)
    assert not under(found[2].shared, "opt/")
    ends = [descended(made, by_hand(module_of(), found[1].shared), {}, batches(made, SGD.feed(), k, 2), 0.1)[0] for k in (0, 1)]
    near(found[2].shared, mean_of(ends), 1e-9)


def test_co_training_is_sgd_under_the_drawn_gates() -> None:
    """A round after masks have learned: every step under another sub-network, from the averaged momentum."""
    made = gated((9, 12), rounds=8)
    found = states(made, DWFNP(cotrain=4, **QUICK), 3)
    ends, gate = [], made.seen[-1].own[GATE_STEPS]
    assert gate.dtype == torch.bool
    assert not gate.all()
    for k in (0, 1):
        w, momentum = under(found[2].shared, "w/"), under(found[2].shared, "opt/")
        for t, step in enumerate(batches(made, SGD.feed(), k, 3)):
            w, momentum = descended(made, by_hand(module_of(), w, gate[k, t], gate[k, t]), momentum, [step], 0.1)
        ends.append(w | momentum)
    near(found[3].shared, mean_of(ends))


def test_the_jobs_aggregation_holds_under_gates() -> None:
    """FedProx pulls back towards the broadcast."""
    distance = []
    for aggregate in (None, FedProx(fedprox_mu=5.0)):
        made = gated((9, 12), rounds=8)
        made.setting = replace(made.setting, aggregate=aggregate or made.setting.aggregate)
        found = states(made, DWFNP(cotrain=4, **QUICK), 2)
        moved = (found[2].shared[key] - value for key, value in under(found[1].shared, "w/").items())
        distance.append(sum(float(by.square().sum()) for by in moved))
    assert distance[1] < 0.7 * distance[0]


def test_learning_rates_of_both_phases() -> None:
    """A step schedule over the eight rounds before the cut, a cosine with a warm-up of two rounds over the six after it."""
    made = gated((5,), training=replace(SGD, schedule="step"), rounds=14)
    told = made.play(DWFNP(cotrain=8, finetune_lr=0.3, finetune_warmup=2), 14)[1]
    cosine = [0.3 * (1 + torch.cos(torch.tensor(torch.pi * i / 6, dtype=torch.float64)).item()) / 2 for i in range(6)]
    expected = [0.1] * 4 + [0.01] * 2 + [0.001] * 2 + [cosine[0] / 3, cosine[1] * 2 / 3, *cosine[2:]]
    assert [row["lr"] for row in told[1:]] == pytest.approx(expected)


def test_the_base_learns_at_a_tenth_in_the_second_half_of_co_training() -> None:
    rates = []
    made = gated((5,), rounds=8)

    class Told(DWFNP):
        def controller(self, setting):  # type: ignore[no-untyped-def]
            made_of = super().controller(setting)

            class Noting(type(made_of)):  # type: ignore[misc]
                def step_on_server(self, masks, fleet, shared, clients, when, feed, lr):  # type: ignore[no-untyped-def]
                    rates.append((when, lr))
                    return super().step_on_server(masks, fleet, shared, clients, when, feed, lr)

            return Noting(**vars(made_of))

    made.play(Told(cotrain=6, **QUICK), 6)
    assert rates == [((r, 0), pytest.approx(0.02 if r <= 3 else 0.002)) for r in range(1, 7)]
