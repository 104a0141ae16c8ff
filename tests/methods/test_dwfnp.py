"""DWFNP as a whole: what it may not be asked for, what travels and what it costs, budgets, and whose images it looks at."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_console import console
from gated_federation import FULL, QUICK, WIDTHS, batches, cost, gated, module_of, states
from small_job import small_job
from torch import nn

from fedsim.config import job
from fedsim.core.keys import GATE, GATE_STEPS
from fedsim.core.types import Feed, LocalTraining
from fedsim.errors import BadInput
from fedsim.federated import verbs
from fedsim.methods.dwfnp import DWFNP, State
from fedsim.simulation import estimate
from fedsim.simulation.experiment import Experiment, build_experiment
from fedsim.simulation.planning.idle_fleet import IdleFleet

ONE = torch.cat([torch.arange(width) == 0 for width in WIDTHS])
LEAST = f"{float(cost(ONE)) / FULL:.4f}"  # of the FLOPs of the gated layers


# ---- what cannot be


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"flops_share": 0.1},
            f"[method] flops_share = 0.1 cannot be reached: with one channel left in every group the model still has {LEAST}",
        ),
        (
            {"client_flops_share": 0.1},
            f"[method] client_flops_share = 0.1 cannot be reached: with one channel left in every group the model still has {LEAST}",
        ),
        ({"client_flops_share": (0.5, 0.1, 0.5, 0.5)}, "[method] client_flops_share = 0.1 cannot be reached"),
        ({"client_flops_share": (0.5, 0.5, 0.5, 0.5, 0.5)}, "client_flops_share has 5 shares for 4 clients"),
        ({"flops_share": 0.4}, "[method] client_flops_share = 0.5: a client uses part of the base, which keeps 0.4"),
        ({"cotrain": 5}, "[method] cotrain = 5: the cut comes after the last of 4 rounds"),
        ({"warmup": 2}, "[method] the hypernetworks would never be trained: the cut comes after round 2; take warmup < 2, not 2"),
        (
            {"hyper_interval": 9},
            "[method] the hypernetworks would never be trained: no round from 1 to 2 has a number of steps divisible by hyper_interval = 9",
        ),
    ],
)
def test_what_the_method_refuses(fields, said) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        DWFNP(**{"hyper_interval": 1} | fields).init(gated().setting, None)


def test_what_the_messages_advise_is_taken() -> None:
    for fields in (
        {"flops_share": 0.19, "client_flops_share": 0.19},
        {"client_flops_share": (0.2, 0.3, 0.4, 0.8)},
        {"cotrain": 4},
        {"flops_share": 0.4, "personal": False},
        {"hyper_interval": 6},
    ):
        state = DWFNP(**{"hyper_interval": 1} | fields).init(gated().setting, None)
        assert not state.masks.cut


def test_one_share_in_a_list_is_for_all_clients() -> None:
    made = gated()
    one, same = (DWFNP(client_flops_share=share).controller(made.setting) for share in (0.5, (0.5,)))
    assert one == same
    assert one._targets([0, 2]).tolist() == [0.5, 0.5]
    assert DWFNP(client_flops_share=(0.2, 0.3, 0.4, 0.5)).controller(made.setting)._targets([1, 3]).tolist() == pytest.approx([0.3, 0.5])


def test_what_the_job_must_bring() -> None:
    with pytest.raises(BadInput, match=re.escape("set train.steps = 5, in place of epochs")):
        DWFNP(hyper_interval=1).init(gated(training=LocalTraining(epochs=2, batch=4)).setting, None)
    with pytest.raises(BadInput, match=re.escape('set partition.holdout = 0.1, or hyper_split = "overlap"')):
        DWFNP(hyper_interval=1).init(gated(holdout=0.0).setting, None)
    DWFNP(hyper_interval=1, hyper_split="overlap").init(gated(holdout=0.0).setting, None)
    with pytest.raises(BadInput, match=r"\[model\]"):
        DWFNP(hyper_interval=1).init(gated(module=nn.Sequential(nn.Flatten(), nn.Linear(16, 3))).setting, None)
    with pytest.raises(BadInput, match=r'model\.norm = "nsconv" normalises a filter over all its channels, so that gates cannot cut any'):
        DWFNP(hyper_interval=1).init(gated(module=module_of(norm="nsconv")).setting, None)
    with pytest.raises(BadInput, match="needs norm_over"):
        DWFNP(fold_ws=True)


SMOKE = small_job(
    4,
    partition={"holdout": 0.2},
    cohort={"size": 2},
    train={"steps": 2},
    method={"name": "dwfnp", "hyper_interval": 1, "warmup": 0, "cotrain": 1},
)


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    return console(SMOKE, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_client_that_no_cohort_contains_while_masks_learn_is_named_and_nothing_is_left(fedsim, tmp_path, command) -> None:
    code, message = fedsim(command)
    assert code == 2
    assert "2 of 4 clients (the first: " in message
    assert 'unseen_clients = "accept"' in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["smoke.toml"]


@pytest.mark.parametrize("setting", ["method.unseen_clients='accept'", "cohort.size=4", "method.personal=false"])
def test_what_that_message_advises_runs(fedsim, setting) -> None:
    assert fedsim("run", setting) == (0, "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("method.flops_share=0.0", "flops_share = 0.0: should be above 0 and at most 1"),
        ("method.client_flops_share=[0.5, 0.5]", "client_flops_share has 2 shares for 4 clients"),
        ("method.hypernet='both'", '"both": should be "server" or "client"'),
        ("method.tau=0", "tau"),
        ("method.hyperlr=1", "has no field 'hyperlr'"),
    ],
)
def test_what_a_job_may_not_ask_for(fedsim, tmp_path, setting, said) -> None:
    code, message = fedsim("run", setting, "method.unseen_clients='accept'")
    assert (code, said in message, "Traceback" in message) == (2, True, False), message
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


# ---- FLOPs of hypernetworks


@pytest.mark.parametrize(
    ("fields", "server", "client"),
    [
        ({}, [0, 4 * 5, 4 * 5 + 1, 3 * 4, 3 * 4], 0),
        ({"hyper_steps": 2}, [0, 7 * 5, 7 * 5 + 1, 3 * 4, 3 * 4], 0),
        ({"finetune": "static"}, [0, 4 * 5, 4 * 5 + 1, 4, 4], 0),
        ({"personal": False}, [0, 4, 4 + 1, 0, 0], 0),
        ({"hypernet": "client"}, [0, 5, 5 + 1, 3 * 4, 3 * 4], 3 * 2),
        ({"freeze_weights": True}, [0, 3 * 5, 3 * 5 + 1, 3 * 4, 3 * 4], 0),
    ],
    ids=["server", "two-steps", "static", "base-alone", "clients", "one-shot"],
)
def test_who_runs_hypernetworks_pays_for_them(fields, server, client) -> None:
    """In forward passes, of 4 clients in the cohort: learning 3 a network and input, hard gates 1, the cut 1 of the base."""
    made = gated()
    method = DWFNP(cotrain=2, **QUICK | fields)
    f = method.controller(made.setting).rule.forward_flops
    state, told, extra = verbs.init(method, made.setting, None), [], []
    for r in range(5):
        made.fleet.open(r)
        state, found = verbs.round(method, made.setting, state, made.fleet, r)
        told.append(found["server_flops"])
        extra.append({bill.extra_flops for bill in made.fleet.account.bills.values()})
    assert told == [passes * f for passes in server]
    assert extra[1:] == [{client * f}, {client * f}, {0}, {0}]


# ---- bytes


def resnet56(**method: Any) -> Experiment:
    table = {
        "rounds": 8,
        "data": {"name": "fake", "channels": 3, "image_size": 32, "classes": 10, "train_images": 400, "test_images": 20},
        "partition": {"name": "iid", "clients": 10, "holdout": 0.1},
        "model": {"name": "resnet56", "norm": "group", "standardise": True},
        "train": {"epochs": None, "steps": 5, "batch": 25, "lr": 0.1, "momentum": 0.9},
        "method": {"name": "dwfnp", "cotrain": 7, "warmup": 1} | method,
        "execution": {"plan": "reference", "device": "cpu"},
    }
    return build_experiment(job.check(table))


def bytes_of(parts: Experiment) -> tuple[list[set[tuple[int, int]]], State]:
    """(down, up) of clients, round after round, of a run that trains nothing."""
    fleet = IdleFleet(parts.site, parts.account(), 1, lambda: 0.0)
    state, told = parts.method.init(parts.setting, None), []
    for r in range(parts.setting.rounds + 1):
        fleet.open(r)
        state, _ = parts.method.round(parts.setting, state, fleet, r)
        assert len(fleet.account.bills) in (0, 10)
        told.append({(bill.bytes_down, bill.bytes_up) for bill in fleet.account.bills.values()})
    return told, state


W, BOTH, SOFT, HARD = 853_018 * 4, 6_824_144, 4_032, 630


def test_check_17_bytes_of_resnet56() -> None:
    """After the cut what is left of the weights alone, and soft gates of it. What came once in a round comes no more."""
    parts = resnet56(hyper_lr=0.05, hyper_steps=2)
    told, state = bytes_of(parts)
    assert told[0] == set()
    assert told[1] == {(W, BOTH)}
    assert told[2:8] == [{(BOTH + 2 * SOFT + HARD, BOTH + 2 * SOFT)}] * 6
    lost = removed = 0
    for layer, index in enumerate(state.kept.values()):
        leave = 16 << layer // 9
        enter = leave // 2 if layer in (9, 18) else leave
        lost += (leave - len(index)) * (9 * enter + 2 + 9 * leave)  # a filter, its scale and shift, the columns that read it
        removed += 3 * leave * (len(index) < leave)  # what standardised filters go on counting of lost columns
    n = int(state.masks.base.sum())
    assert n < 1000
    left = 4 * (853_018 - lost)
    assert told[8] == {(left + 4 * removed + 4 * n, 2 * left + 4 * removed + 4 * n)}


def test_check_17_with_hypernetworks_on_the_clients() -> None:
    """Both with their moments each way, the fixed input never; an embedding's row moves with its owner, whose gates are its own."""
    parts = resnet56(hypernet="client", finetune="static")
    parts = replace(parts, setting=replace(parts.setting, rounds=3), method=replace(parts.method, cotrain=2))
    told, state = bytes_of(parts)
    base, client = 4_902_720, 3 * 4 * (424_832 - 10 * 1728)
    both = base + client + 3 * 4 * 1728
    assert told[1:] == [{(W, BOTH)}, {(BOTH + both + HARD, BOTH + both)}, {(W + 126, BOTH)}]
    assert bool(state.masks.base.all())


def test_gates_that_a_client_has_in_this_round_are_not_sent_again_to_choose_the_best_model() -> None:
    """The new weights are, and one loss comes back."""
    parts = resnet56(finetune="static", checkpoint_choice="best")
    parts = replace(parts, setting=replace(parts.setting, rounds=3), method=replace(parts.method, cotrain=2))
    assert bytes_of(parts)[0][3] == {(W + 126 + W, BOTH + 4)}


# ---- FLOPs


def forward(c: list[int]) -> int:
    """FLOPs of the resnet8 with so many inner channels."""
    blocks = zip(c, (4, 4, 8), WIDTHS, (16, 4, 1), strict=True)
    return 2 * (9 * 4 * 16 + sum(9 * width * (enter + leave) * positions for width, enter, leave, positions in blocks) + 16 * 3)


def open_in(gate: torch.Tensor) -> list[int]:
    return [int(part.sum()) for part in gate.split(WIDTHS)]


@pytest.mark.parametrize("finetune", ["dynamic", "static"])
def test_flops_are_those_of_the_open_channels_step_after_step(finetune) -> None:
    """Clients that train on 8, 6 and 10 images in batches of 4; a mask's gradient costs two passes of the whole network."""
    made = gated(kind=IdleFleet, sizes=(12, 9, 14))
    method = DWFNP(finetune=finetune, cotrain=2, **QUICK | {"hyper_lr": 0.05})
    after = states(made, method, 2)[2]
    bills, whole = made.fleet.account.bills, forward(list(WIDTHS))
    gates = next(seen.own[GATE_STEPS] for seen in made.seen if seen.r == 2 and GATE_STEPS in seen.own)
    for k, shown in enumerate([(4, 4, 4), (4, 2, 4), (4, 4, 2)]):
        held = min(4, made.population.shards["held"].size(k))
        trained = sum(3 * n * forward(open_in(gate)) for n, gate in zip(shown, gates[k], strict=True))
        assert bills[k].train_flops == trained + 2 * held * whole
        assert bills[k].dense_flops == 3 * sum(shown) * whole
        assert bills[k].samples == sum(shown)
    made.fleet.open(3)
    method.round(made.setting, after, made.fleet, 3)
    own = method.controller(made.setting).choices(after.masks, [0, 1, 2])
    for k, n in enumerate((12, 10, 10)):
        used = after.masks.base if finetune == "dynamic" else own[k]
        assert made.fleet.account.bills[k].train_flops == 3 * n * forward(open_in(used))


# ---- budgets


def test_check_14_budgets_are_reached_by_the_regulariser_alone() -> None:
    """Nothing is trained, so that no client's loss has a say; a budget of its own for every client."""
    targets = (0.5, 0.3, 0.6, 0.4)
    made = gated(kind=IdleFleet, rounds=160, dtype=torch.float32)
    method = DWFNP(client_flops_share=targets, cotrain=150, **QUICK | {"hyper_lr": 0.005, "bias": 3.0})
    state = states(made, method, 150)[-1]
    shared, own, net = method.deploy(made.setting, state, made.fleet, [0, 1, 2, 3])
    share = method.controller(made.setting).rule.flops.share
    assert GATE not in shared
    assert net is made.setting.net.cut(state.kept)
    assert abs(float(share(state.masks.base)) - 0.8) < 0.04  # a channel of the narrow net is up to 0.07 of its FLOPs
    full = torch.zeros(4, 28, dtype=torch.bool).index_copy(1, state.masks.base.nonzero().flatten(), own[GATE])
    assert (share(full) - torch.tensor(targets, dtype=torch.float64)).abs().max() < 0.04


# ---- images


@pytest.mark.parametrize("fields", [{"hypernet": "server"}, {"hypernet": "client", "embed_sync": "mean"}, {"checkpoint_choice": "best"}])
def test_cohorts_without_a_held_out_image_leave_every_number_finite(fields) -> None:
    made = gated(sizes=(1, 1, 1, 1, 12), cohort=2)
    method = DWFNP(**QUICK | {"cotrain": 2, "unseen_clients": "accept"} | fields)
    found = states(made, method, 4)
    learning = [seen.clients for seen in made.seen if any(feed.split == "held" for feed in seen.work.feeds)]
    assert any(4 not in clients for clients in learning)
    for state in found:
        assert all(
            bool(value.isfinite().all()) for part in (state.shared, state.masks.hyper, state.masks.table.rows) for value in part.values()
        )


def test_check_18_masks_learn_from_images_that_weights_never_see() -> None:
    """Or, with overlap, from a tenth that they do; test images are in neither."""
    made = gated((40, 30))
    for split, share in (("held", 1.0), ("overlap", 0.1)):
        made.play(DWFNP(hyper_split=split, **QUICK), 1)
        (feed,) = next(seen.work.feeds for seen in made.seen[-2:] if type(seen.work).__name__ == "GateGradient")
        assert (feed.split, feed.share, feed.steps, feed.cost) == ("held" if split == "held" else "probe", share, 1, "inputs")
        seen = [x for k in (0, 1) for x, _ in batches(made, replace(feed, augment=False), k, 1)]
        local = [x for k in (0, 1) for x, _ in batches(made, Feed("train", epochs=1, batch=64, augment=False), k, 1)]
        among = [bool((image == torch.cat(local)).flatten(1).all(1).any()) for image in torch.cat(seen)]
        assert set(among) == {split == "overlap"}
    for k in (0, 1):
        train, held = (set(made.population.shards[name].of(k).tolist()) for name in ("train", "held"))
        assert len(train) + len(held) == (40, 30)[k]
        assert not train & held
        assert train
        assert held


@pytest.mark.parametrize(("change", "lines"), [(0.0, ["0 to 3"]), (0.04, ["0 to 3"]), (0.06, ["0 to 1", "2 to 3"])])
def test_an_estimate_tells_a_cost_anew_where_it_changes_by_more_than_a_twentieth(change, lines) -> None:
    first = {"bytes_up": 1e6, "bytes_down": 1e6, "max_client_flops": 1e9, "max_client_memory": 1e6, "density": 0.5}
    later = first | {"max_client_flops": 1e9 * (1 + change)}
    table = estimate._table([first, first, later, later], 10)
    assert list(table.columns[0].cells) == lines
