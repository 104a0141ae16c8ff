"""DWFNP after the cut: what is left of the network, fine-tuning of it by hand in plain torch, and which model is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gated_federation import (
    QUICK,
    SGD,
    SHAPE,
    Precise,
    batches,
    by_hand,
    descended,
    gated,
    leaves,
    logits,
    mean_of,
    module_of,
    near,
    penalty,
    same,
    soft,
    states,
    straight,
    theta,
)
from small_federation import World
from torch.nn import functional as F

from fedsim.core import rng
from fedsim.core.keys import COUNT, EMBEDDING, GATE, GATE_GRADIENT, GATE_STEPS
from fedsim.core.tree import under
from fedsim.federated.protocol import ClientInput
from fedsim.methods.dwfnp import DWFNP, State


def cut_world(kind: type[DWFNP], **fields):  # type: ignore[no-untyped-def]
    """Two clients, the cut after round 4: the world, the method and the states after every round up to 5."""
    made = gated((9, 12), rounds=8)
    method = kind(cotrain=4, flops_share=0.6, client_flops_share=0.4, **QUICK | {"hyper_lr": 0.05} | fields)
    return made, method, states(made, method, 5)


def test_fine_tuning_under_soft_gates_trains_the_weights_and_the_clients_hypernetwork() -> None:
    """By hand on the whole network whose closed channels stay at 0; the base's hypernetwork is as it was."""
    made, method, found = cut_world(DWFNP)
    before, after, order = found[4], found[5], made.seen[-1]
    base, controller = before.masks.base, method.controller(made.setting)
    assert 3 < int((~base).sum()) < 25
    assert order.net is made.setting.net.cut(before.kept)
    whole = next(seen.reply.total for seen in made.seen if seen.r == 4 and type(seen.work).__name__ == "TrainGated")
    whole = {key: (value / whole[COUNT]) for key, value in under(whole, "w/").items()}
    keys = rng.fold(rng.key(0, "finetune", 5), torch.arange(2))
    old = before.masks.table.rows
    w = leaves({key: value.double() for key, value in (theta(before, "client") | {EMBEDDING: old[EMBEDDING]}).items()})
    o = logits({key[9:]: value for key, value in under(w, "w/client/").items()}, w[EMBEDDING])
    u = [soft(o[i], keys[i], "u", 0.5) for i in range(2)]
    ends, told = [], torch.zeros(())
    for k in (0, 1):
        gate = (u[k].detach() * base).requires_grad_()
        end = descended(made, by_hand(module_of(), whole, gate, base), {}, batches(made, SGD.feed(), k, 5), order.work.lr)
        ends.append(made.setting.net.channels.cut(end[0] | end[1], before.kept))
        assert torch.allclose(order.reply.each[GATE_GRADIENT][k].double(), gate.grad[base] / 3, atol=1e-6)
        told = told + (gate.grad / 3 * base * u[k]).sum() / 2
        told = told + penalty(base * straight(soft(o[k], keys[k], "client", 0.5), base.double()), 0.4) / 2
    near(after.shared, mean_of(ends), 1e-5)
    told.backward()
    assert same(theta(before, "base"), theta(after, "base"))
    hyper = before.masks.hyper
    for key in theta(after, "client"):
        first = hyper["opt/first/" + key[2:]] * 0.9 + 0.1 * w[key].grad
        assert torch.allclose(after.masks.hyper["opt/first/" + key[2:]], first.float(), rtol=1e-4, atol=1e-7), key
        assert not torch.equal(after.masks.hyper[key], hyper[key])
    first = (old["opt/first/embedding"] * 0.9 + 0.2 * w[EMBEDDING].grad).float()
    assert torch.allclose(after.masks.table.rows["opt/first/embedding"], first, rtol=1e-4, atol=1e-7)
    assert torch.equal(after.masks.base, base)
    assert controller.rule.keep == 0.6


def test_static_fine_tuning_keeps_the_clients_gates_and_trains_under_them() -> None:
    made, method, found = cut_world(Precise, finetune="static")
    before, after, order = found[4], found[5], made.seen[-1]
    assert same(before.masks.hyper, after.masks.hyper)
    assert same(before.masks.table.rows, after.masks.table.rows)
    gates = method.deploy(made.setting, before, made.fleet, [0, 1])[1][GATE]
    assert gates.dtype == torch.bool
    assert torch.equal(order.own[GATE], gates)
    assert torch.equal(method.deploy(made.setting, after, made.fleet, [0, 1])[1][GATE], gates)
    assert GATE_GRADIENT not in order.reply.each
    closed = torch.zeros(28, dtype=torch.bool).index_copy(0, before.masks.base.nonzero().flatten(), ~gates.any(0))
    assert closed.any()
    key = "w/layer3.0.conv1.weight"  # rows that no client uses decay and nothing else
    rows = ~gates.any(0).split([len(index) for index in before.kept.values()])[2]
    lr, decay = order.work.lr, 1e-3
    left, momentum = before.shared[key][rows], torch.zeros_like(before.shared[key][rows])
    for _ in range(3):
        momentum = 0.9 * momentum + decay * left
        left = left - lr * momentum
    assert torch.allclose(after.shared[key][rows], left, rtol=1e-9)


@pytest.mark.parametrize("hypernet", ["server", "client"])
def test_a_base_alone_has_no_gates_of_clients(hypernet) -> None:
    made = gated((9, 12), rounds=6)
    method = DWFNP(personal=False, flops_share=0.5, hypernet=hypernet, cotrain=3, **QUICK)
    state, told = made.play(method, 5)
    assert method.deploy(made.setting, state, made.fleet, [0, 1])[1] == {}
    assert not theta(state, "client")
    assert len(state.masks.table.clients) == 0
    training = [seen for seen in made.seen if type(seen.work).__name__ == "TrainGated"]
    assert [set(seen.own) for seen in training] == [{GATE_STEPS}] * 3 + [set()] * 2
    assert told[5]["base_flops_share"] == told[3]["base_flops_share"] < 1


# ---- the model that is reported


def test_the_best_model_on_held_out_images_is_reported() -> None:
    """Of the second half of fine-tuning; training goes on from the last one."""
    made, plain = (gated((30, 30), training=replace(SGD, lr=0.8), rounds=12) for _ in range(2))
    method = DWFNP(cotrain=4, checkpoint_choice="best", finetune_schedule="constant", **QUICK)
    state, best, shared = method.init(made.setting, None), [], {}
    for r in range(13):
        made.fleet.open(r)
        state, _ = method.round(made.setting, state, made.fleet, r)
        scored = [seen for seen in made.seen if seen.r == r and type(seen.work).__name__ == "Loss"]
        assert bool(scored) == (r > 8)
        if scored:
            total = scored[0].reply.total
            assert float(total[COUNT]) == sum(made.population.shards["held"].size(k) for k in (0, 1))
            best.append(float(total["n/correct"] / total[COUNT]))
            shared[r] = under(state.shared, "w/", "buf/")
    winner = 9 + best.index(max(best))
    assert winner < 12
    assert same(method.deploy(made.setting, state, made.fleet, [])[0], shared[winner])
    last = plain.play(replace(method, checkpoint_choice="last"), 12)[0]
    assert same(last.shared, state.shared)


def test_the_best_model_is_judged_by_the_same_clients_in_every_round() -> None:
    """Whoever took part."""
    made = gated((12, 9, 10), rounds=6, cohort=1, holdout=0.3)
    made.play(DWFNP(cotrain=4, checkpoint_choice="best", unseen_clients="accept", **QUICK), 6)
    scored = [seen for seen in made.seen if type(seen.work).__name__ == "Loss"]
    assert [seen.clients for seen in scored] == [[0, 1, 2]]
    assert {tuple(seen.clients) for seen in made.seen} > {(0, 1, 2)}


def test_the_memory_of_a_client_with_hypernetworks_counts_them() -> None:
    server, client = (gated((12, 9), rounds=3) for _ in range(2))
    for made, where in ((server, "server"), (client, "client")):
        made.play(DWFNP(cotrain=3, hypernet=where, **QUICK), 2)
    hyper = next(seen.shared for seen in client.seen if type(seen.work).__name__ == "HypernetStep")
    held = sum(value.numel() for key, value in hyper.items() if "/base/" in key or "/client/" in key)
    learned = sum(value.numel() for key, value in hyper.items() if key.startswith(("w/base/", "w/client/")))
    assert client.fleet.account.bills[0].memory >= 4 * (held + learned) > server.fleet.account.bills[0].memory


# ---- the cut itself


def outputs(made: World, method: DWFNP, state: State, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's logits by the deployed model, and the gates it uses."""
    shared, own, net = method.deploy(made.setting, state, made.fleet, [0, 1])
    one = ClientInput(shared, {key: value[k] for key, value in own.items()}, {}, *(torch.zeros(()) for _ in range(3)))
    net = net or made.setting.net
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return net(method.model_of(net, one), x)[0], one.own[GATE]


def before_and_after(**fields):  # type: ignore[no-untyped-def]
    """The same state after round 4 with and without its cut."""
    made = gated((9, 12), module_of(standardise=True), rounds=8)
    method = DWFNP(cotrain=4, flops_share=0.6, client_flops_share=0.4, **QUICK | {"hyper_lr": 0.05} | fields)
    after = states(made, method, 4)[4]
    reply = next(seen.reply.total for seen in made.seen if seen.r == 4 and type(seen.work).__name__ == "TrainGated")
    shared = {key: value / reply[COUNT] for key, value in under(reply, "w/").items()}
    before = State(shared, {}, replace(after.masks, cut=False, base=torch.ones(28, dtype=torch.bool)))
    return made, method, before, after


@pytest.mark.parametrize("fields", [{}, {"mask_eval": "sample"}], ids=["mean", "sample"])
def test_check_13_the_cut_changes_nothing_but_the_size(fields) -> None:
    """The masked network before it and the smaller one after it give a client the same outputs; no momentum is left."""
    made, method, before, after = before_and_after(**fields)
    base = after.masks.base
    assert torch.equal(method.controller(made.setting).base(before.masks), base)
    for k in (0, 1):
        masked, gate = outputs(made, method, before, k)
        cut, left = outputs(made, method, after, k)
        assert torch.equal(gate[base], left)
        assert not gate[~base].any()
        assert all(part.any() for part in gate.split((4, 8, 16)))
        assert torch.allclose(masked, cut, atol=1e-9)
    assert not under(after.shared, "opt/")
    for key, value in made.setting.net.channels.cut(before.shared, after.kept).items():
        assert torch.equal(after.shared[key], value)
    assert [index.tolist() for index in after.kept.values()] == [part.nonzero().flatten().tolist() for part in base.split((4, 8, 16))]


def test_sampled_gates_are_one_draw_that_stays() -> None:
    made = gated((9, 12))
    controller = DWFNP(mask_eval="sample", bias=0.5).controller(made.setting)
    masks = controller.begin()
    base, drawn = controller.base(masks), controller.choices(masks, [0, 1])
    assert torch.equal(base, controller.base(masks))
    assert torch.equal(drawn[1:], controller.choices(masks, [1]))
    assert bool((drawn <= base).all())
    assert bool(replace(controller, sample=False).base(masks).all())
    assert not base.all()
    same_rows = {key: value[:1].expand(2, -1) for key, value in controller.rule.embeddings(0, torch.arange(2)).items()}
    drawn = controller.choices(replace(masks, table=masks.table.put([0, 1], same_rows)), [0, 1])
    assert not torch.equal(drawn[0], drawn[1])  # of equal embeddings


def test_norms_over_all_channels_are_those_of_float_gates() -> None:
    """Before the cut a closed channel is in the statistics of its norm; the filters cut forget it. So the two differ."""
    made, method, before, after = before_and_after(norm_over="all")
    for k in (0, 1):
        masked, gate = outputs(made, method, before, k)
        cut, left = outputs(made, method, after, k)
        x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.allclose(masked, by_hand(module_of(standardise=True), before.shared, gate)(x), atol=1e-9)
        assert not torch.allclose(masked, cut, atol=1e-3)
        assert torch.equal(gate[after.masks.base], left)
    assert set(after.shared) == set(before.shared)


def test_folded_filters_are_standardised_before_they_are_cut() -> None:
    _, _, before, after = before_and_after(norm_over="all", fold_ws=True)
    for stage, index in zip((1, 2, 3), after.kept.values(), strict=True):
        w = before.shared[f"w/layer{stage}.0.conv2.weight"]
        std, mean = torch.std_mean(w, (1, 2, 3), keepdim=True)
        assert torch.allclose(after.shared[f"w/layer{stage}.0.conv2.weight"], ((w - mean) / (std + 1e-5))[:, index], atol=1e-9)


def test_the_best_model_is_judged_as_it_is_used() -> None:
    """Under norm_over = "all" closed channels are in the statistics of norms on held-out images too; images are not augmented."""
    made = gated((30, 30), training=replace(SGD, lr=0.3), rounds=6)
    method = DWFNP(cotrain=2, checkpoint_choice="best", finetune="static", norm_over="all", **QUICK | {"hyper_lr": 0.1})
    state, _ = made.play(method, 6)
    assert state.best is not None
    scored = [seen for seen in made.seen if type(seen.work).__name__ == "Loss"]
    assert not any(feed.augment for seen in scored for feed in seen.work.feeds)
    seen, loss = scored[-1], 0.0
    for k in (0, 1):
        held = seen.shared | {GATE: seen.own[GATE][k].double()}
        loss += sum(float(F.cross_entropy(seen.net(held, x)[0], y, reduction="sum")) for x, y in batches(made, seen.work.feeds[0], k, 6))
    assert float(seen.reply.total["loss/sum"]) == pytest.approx(loss, abs=1e-6)
