"""What clients do through gates, against plain torch: gradients of gates, training under gates, and the hypernetworks' own steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gated_federation import (
    SGD,
    WIDTHS,
    Precise,
    batches,
    by_hand,
    chain,
    descended,
    gated,
    hard,
    leaves,
    logits,
    mean_of,
    module_of,
    near,
    soft,
)
from small_federation import FLEETS
from torch.nn import functional as F

from fedsim.core import rng
from fedsim.core.keys import COUNT, EMBEDDING, GATE, GATE_GRADIENT, GATE_STEPS
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed
from fedsim.costs import flops
from fedsim.fleet.serial import SerialFleet
from fedsim.pruning import gates, hypernet_training
from fedsim.pruning.gated_training import ENERGY_UNIT, Energy, GateGradient, TrainGated

HELD = Feed("held", steps=1, batch=4, augment=False, cost="inputs")
TARGETS = [0.5, 0.3, 0.6, 0.5]


def some_gates(clients: int, seed: int = 1) -> torch.Tensor:
    """(K, 28) soft gates."""
    return torch.rand(clients, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closing(clients: int, steps: int, seed: int = 1) -> torch.Tensor:
    """(K, S, 28) hard gates, no group empty."""
    y = torch.rand(clients * steps, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([hard(row) for row in y]).bool().view(clients, steps, 28)


# ---- works


@pytest.mark.parametrize("kind", FLEETS)
def test_the_gradient_of_a_gate_is_that_of_autograd_the_mean_over_its_steps(kind) -> None:
    made, m = gated(kind=kind), some_gates(4)
    made.fleet.open(2)
    reply = made.fleet.run(GateGradient((replace(HELD, steps=2),)), range(4), made.setting.net.initial, {GATE: m})
    for k in range(4):
        gate = m[k].clone().requires_grad_()
        module = by_hand(module_of(), made.setting.net.initial, gate)
        steps = batches(made, replace(HELD, steps=2), k, 2)
        sum(F.cross_entropy(module(x), y) / 2 for x, y in steps).backward()
        assert torch.allclose(reply.each[GATE_GRADIENT][k], gate.grad, atol=1e-12)
    assert list(reply.total) == [COUNT]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", FLEETS)
def test_training_under_a_hard_gate_for_every_step_is_torchs_sgd_on_the_kept_channels(kind, uniform) -> None:
    """From the momentum that was sent; averages over clients alike, or by images."""
    made, u = gated(kind=kind), closing(4, 3)
    net = made.setting.net
    shared = net.initial | {f"opt/momentum/{key[2:]}": value / 50 for key, value in net.initial.items()}
    made.fleet.open(3)
    work = TrainGated((SGD.feed(),), 0.1, 0.9, 1e-3, made.setting.aggregate, uniform=uniform)
    total = made.fleet.run(work, range(4), shared, {GATE_STEPS: u}).total
    ends = []
    for k in range(4):
        w, momentum = under(shared, "w/"), under(shared, "opt/")
        for t, step in enumerate(batches(made, SGD.feed(), k, 3)):
            w, momentum = descended(made, by_hand(module_of(), w, u[k, t], u[k, t]), momentum, [step], 0.1)
        ends.append(w | momentum)
    n = [made.population.size(k) for k in range(4)]
    shares = None if uniform else [count / sum(n) for count in n]
    assert float(total[COUNT]) == (4 if uniform else sum(n))
    near({key: value / total[COUNT] for key, value in total.items() if key != COUNT}, mean_of(ends, shares), 1e-9)


@pytest.mark.parametrize("kind", FLEETS)
def test_norms_over_all_channels_see_the_closed_ones(kind) -> None:
    made, u = gated((9,), kind=kind), closing(1, 3)
    work = TrainGated((SGD.feed(),), 0.1, 0.9, 1e-3, norm_over="all")
    total = made.fleet.run(work, [0], made.setting.net.initial, {GATE_STEPS: u}).total
    w, momentum = dict(made.setting.net.initial), {}
    for t, step in enumerate(batches(made, SGD.feed(), 0, 0)):
        w, momentum = descended(made, by_hand(module_of(), w, u[0, t]), momentum, [step], 0.1)
    near({key: value for key, value in total.items() if key != COUNT}, w | momentum, 1e-9)


@pytest.mark.parametrize("kind", FLEETS)
def test_under_a_soft_gate_weights_train_and_its_mean_gradient_comes_back(kind) -> None:
    made, m = gated((9, 12), kind=kind), some_gates(2)
    reply = made.fleet.run(TrainGated((SGD.feed(),), 0.1, 0.9, 1e-3), range(2), made.setting.net.initial, {GATE: m})
    ends = []
    for k in range(2):
        gate = m[k].clone().requires_grad_()
        end = descended(made, by_hand(module_of(), made.setting.net.initial, gate), {}, batches(made, SGD.feed(), k, 0), 0.1)
        ends.append(end[0] | end[1])
        assert torch.allclose(reply.each[GATE_GRADIENT][k], gate.grad / 3, atol=1e-12)  # autograd sums over the three steps
    near({key: value / 2 for key, value in reply.total.items() if key != COUNT}, mean_of(ends), 1e-9)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("kind", FLEETS)
def test_the_energy_of_channels_is_summed_over_images_and_positions(kind, power) -> None:
    """Batches of 4 of 9, 11 and 5 images: a small last batch counts by its images."""
    made = gated((9, 11, 5), kind=kind, holdout=0.0)
    feed = Feed("train", epochs=1, batch=4, augment=False, cost="forward")
    total = made.fleet.run(Energy((feed,), power), range(3), made.setting.net.initial).total
    x = torch.cat([x for k in range(3) for x, _ in batches(made, feed, k, 0)])
    found = []
    module = by_hand(module_of(), made.setting.net.initial)
    for stage in (1, 2, 3):
        relu = module.get_submodule(f"layer{stage}.0.relu1")
        relu.register_forward_hook(lambda _, __, out: found.append((out.abs() ** power).sum((0, 2, 3))))
    module(x)
    assert float(total[COUNT]) == 25
    assert torch.allclose(total["loss/energy"] * ENERGY_UNIT, torch.cat(found), atol=1e-9)


@pytest.mark.parametrize("kind", FLEETS)
def test_a_lone_image_goes_through_a_lone_channel_at_a_lone_position(kind) -> None:
    """Its norm gives the shift: nothing deviates from its own mean."""
    made = gated((5,), kind=kind, training=replace(SGD, batch=1), holdout=0.0)
    gate = torch.cat([torch.arange(width) == 0 for width in WIDTHS]).expand(1, 3, 28)
    reply = made.fleet.run(TrainGated((replace(SGD, batch=1).feed(),), 0.1, 0.9, 1e-3), [0], made.setting.net.initial, {GATE_STEPS: gate})
    assert bool(reply.total["w/layer3.0.norm1.bias"].isfinite().all())


# ---- the whole chain


def world_and_rule(kind: type = SerialFleet):  # type: ignore[no-untyped-def]
    made = gated(kind=kind)
    method = Precise(flops_share=0.8, client_flops_share=tuple(TARGETS), bias=0.5)
    return made, method.controller(made.setting)


def at_once(made, controller, clients: list[int], when: tuple[int, int], masks) -> Tree:  # type: ignore[no-untyped-def]
    """The whole loss's gradient in both hypernetworks and the embeddings, by autograd through the clients' networks."""
    key = rng.key(0, "learn", *when)
    keys, rows = rng.fold(key, torch.tensor(clients)), masks.table.of(clients, controller.rule.embeddings(0, torch.tensor(clients)))
    w = leaves(under(masks.hyper, "w/") | {EMBEDDING: rows[EMBEDDING]})
    data = [batches(made, HELD, k, when[0])[0] for k in clients]

    def loss(i: int, gate: torch.Tensor) -> torch.Tensor:
        x, y = data[i]
        return F.cross_entropy(by_hand(module_of(), made.setting.net.initial, gate)(x), y)

    targets = [TARGETS[k] for k in clients]
    chain(w, w[EMBEDDING], controller.rule.z(0), key, keys, targets, 0.8, 0.5, loss).backward()
    return {key: value.grad * (len(clients) if key == EMBEDDING else 1) for key, value in w.items()}


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("clients", [[0, 1, 2, 3], [1, 3]])
def test_check_7_the_servers_chain_is_one_graph(kind, clients) -> None:
    """Two steps, on gradients by one autograd pass through hypernetworks, masks and the clients' networks."""
    made, controller = world_and_rule(kind)
    masks = controller.begin()
    for r in (1, 2):
        made.fleet.open(r)
        found = at_once(made, controller, clients, (r, 0), masks)
        assert max(float(g.abs().max()) for g in found.values()) > 1e-3
        before = masks
        masks = controller.step_on_server(masks, made.fleet, made.setting.net.initial, clients, (r, 0), HELD, 0.01)
        for key in under(masks.hyper, "w/"):  # the first moment is a known function of the gradient
            first = before.hyper["opt/first/" + key[2:]] * 0.9 + 0.1 * found[key]
            assert torch.allclose(masks.hyper["opt/first/" + key[2:]], first, rtol=1e-6, atol=1e-12), key
        old = before.table.of(clients, controller.rule.embeddings(0, torch.tensor(clients)))["opt/first/embedding"]
        assert torch.allclose(masks.table.rows["opt/first/embedding"], old * 0.9 + 0.1 * found[EMBEDDING], rtol=1e-6, atol=1e-12)


def test_soft_gates_are_sent_from_both_hypernetworks() -> None:
    """v * merge(v, u) of the formulas, with logits of torch's own layers."""
    made, controller = world_and_rule()
    masks = controller.begin()
    made.fleet.open(1)
    controller.step_on_server(masks, made.fleet, made.setting.net.initial, [0, 2], (1, 0), HELD, 0.01)
    keys = rng.fold(rng.key(0, "learn", 1, 0), torch.tensor([0, 2]))
    base = {key[7:]: value for key, value in under(masks.hyper, "w/base/").items()}
    client = {key[9:]: value for key, value in under(masks.hyper, "w/client/").items()}
    o, choice = logits(base, controller.rule.z(0))[0], logits(client, controller.rule.embeddings(0, torch.tensor([0, 2]))[EMBEDDING])
    for i in range(2):
        v, u = soft(o, keys[i], "v", 0.5), soft(choice[i], keys[i], "u", 0.5)
        assert torch.allclose(made.seen[0].own[GATE][i], torch.where(v >= 0.5, v * u, v), atol=1e-12)
    assert 0 < int((made.seen[0].own[GATE] < 0.5).sum()) < 56


# ---- AdamW


def test_steps_of_both_hypernetworks_and_of_each_embedding_are_those_of_torchs_adamw() -> None:
    """Five steps in float64; embeddings take part in some of them, and keep steps of their own."""
    rule = world_and_rule()[1].rule
    hyper, rows = rule.fresh(0), rule.embeddings(0, torch.arange(4))
    table = hypernet_training.Table.empty()
    theirs = {key: value.clone().requires_grad_() for key, value in under(hyper, "w/").items()}
    embedding = [rows[EMBEDDING][k].clone().requires_grad_() for k in range(4)]
    base = torch.optim.AdamW([value for key, value in theirs.items() if "/base/" in key], 0.01, weight_decay=0.02)
    client = torch.optim.AdamW([value for key, value in theirs.items() if "/client/" in key], 0.03, weight_decay=0.02)
    each = [torch.optim.AdamW([row], 0.03, weight_decay=0.02) for row in embedding]
    generator = torch.Generator().manual_seed(0)
    for visited in ([0, 2], [0, 1], [2], [0, 3], [0, 2]):
        mine = table.of(visited, {key: value[visited] for key, value in rows.items()})
        found = {key: torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in theirs.items()}
        found[EMBEDDING] = torch.randn(len(visited), 192, generator=generator, dtype=torch.float64)
        before = {key: value.clone() for key, value in (hyper | mine).items()}
        new, moved = hypernet_training.step(hyper, mine, found, 0.01, 0.03, 0.02)
        assert all(torch.equal(value, before[key]) for key, value in under(hyper | mine, "w/", "opt/").items())
        hyper, table = new, table.put(visited, moved)
        for key, value in theirs.items():
            value.grad = found[key]
        for i, k in enumerate(visited):
            embedding[k].grad = found[EMBEDDING][i]
            each[k].step()
        base.step()
        client.step()
    for key, value in theirs.items():
        assert torch.allclose(hyper[key], value, atol=1e-12), key
    assert table.clients.tolist() == [0, 1, 2, 3]
    assert torch.allclose(table.rows[EMBEDDING], torch.stack(embedding), atol=1e-12)
    assert table.rows["n/steps"].flatten().tolist() == [4, 1, 3, 1]


# ---- draws


def test_draws_do_not_depend_on_the_company_and_differ_in_every_round_step_and_client() -> None:
    made, controller = world_and_rule()
    masks = controller.begin()
    whole = controller.steps(masks, [0, 1, 2, 3], 5, 4)
    assert whole.shape == (4, 4, 28)
    assert torch.equal(controller.steps(masks, [1, 3], 5, 4), whole[[1, 3]])
    assert torch.equal(controller.steps(masks, [3, 0, 1], 5, 2), whole[[3, 0, 1], :2])
    every = torch.cat([whole.flatten(0, 1), controller.steps(masks, [0, 1, 2, 3], 6, 4).flatten(0, 1)])
    assert len(every.unique(dim=0)) == 32
    sent = []
    for r, j in ((1, 0), (1, 1), (2, 0)):
        made.fleet.open(r)
        controller.step_on_server(masks, made.fleet, made.setting.net.initial, [0, 1, 2, 3], (r, j), HELD, 0.01)
        sent.append(made.seen[-1].own[GATE])
    assert len(torch.cat(sent).unique(dim=0)) == 12
    made.fleet.open(1)
    controller.step_on_server(masks, made.fleet, made.setting.net.initial, [2], (1, 0), HELD, 0.01)
    assert torch.allclose(made.seen[-1].own[GATE][0], sent[0][2], atol=1e-12)


def test_hard_draws_are_inside_the_base_of_the_same_draw_and_as_likely_as_they_should_be() -> None:
    """P(v) = 1 - exp(-exp(o + b)), of both together the product; in ten thousand local steps."""
    _, controller = world_and_rule()
    masks = controller.begin()
    found = controller.steps(masks, [0], 1, 10_000)[0].double().mean(0)
    o, choice = controller._logits(masks, [0])
    p = [1 - torch.exp(-torch.exp(value + 0.5)) for value in (o, choice[0])]
    wide = slice(4, None)  # groups that are practically never empty
    assert torch.allclose(found[wide], (p[0] * p[1])[wide], atol=0.02)


def test_never_empty_where_nothing_would_be_kept() -> None:
    rule = replace(world_and_rule()[1].rule, bias=-10.0)
    o, choice = torch.zeros(28), torch.zeros(3, 28)
    keys = rng.key(0, torch.arange(3))
    v = rule.mean(o)
    for gate in (v, rule.mean(choice, v), rule.hard(o, None, keys), rule.hard(o, choice, keys), rule.hard(None, choice, keys, v)):
        for part in gate.view(-1, 28).split([4, 8, 16], 1):
            assert bool((part.sum(1) == 1).all())
    assert gates.EULER == 0.57721


def test_a_feed_longer_than_its_gates_is_charged_at_the_last_of_them() -> None:
    """9 images in batches of 4: steps of 4, 4, 1 and 4 images; gates for two of them."""
    made = gated((9,), holdout=0.0)
    account, net = made.fleet.account, made.setting.net
    few, many = (net.channels.used([width, 8, 16]) for width in (1, 3))
    f, g = (flops.forward_flops(account.model_profile, used) for used in (few, many))
    assert account.prices.flops_of(Feed("train", steps=4, batch=4), 9, [few, many]) == 3 * (4 * f + (4 + 1 + 4) * g)
    assert account.prices.flops_of(Feed("train", steps=4, batch=4, cost="inputs"), 9, [few, many]) == 2 * (4 * f + (4 + 1 + 4) * g)
