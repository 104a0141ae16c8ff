"""FedDST: the checks of its specification (section 10), a round by hand, what it costs, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi
from pathlib import Path

import pytest
import torch
from captured_console import console
from small_federation import FLEETS, SLOW, World, batches, drawn, kept, loaded, masked, small, stored, world
from small_job import small_job
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config import job
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Train
from fedsim.methods.baselines.feddst import FedDST, TrainAndAdjust, best_held

ADAM = LocalTraining(batch=4, epochs=2, lr=0.01, decay=1e-3, optimiser="adam")
OFTEN = FedDST(density=0.45, adjust_every=1, stop_round=8, adjust_fraction=0.6)
SIZES = {"conv2": 216, "fc1": 240, "fc2": 30}
FIRST, FREE, STATISTICS = 36, 2 * (4 + 6) + 10 + 3, 2 * (4 + 6)  # floats of the small net: first layer, scales and biases, statistics


# ---- the average


def total(n: list[int], held: list[list[int]], w: list[list[float]]) -> Tree:
    """What clients with `n` images, these masks and these weights hand back of the layer fc, summed in plain Python."""
    rows = [[a * m * v for m, v in zip(*row, strict=True)] for a, *row in zip(n, held, w, strict=True)]
    weighted = [sum(a * m[i] for a, m in zip(n, held, strict=True)) for i in range(len(w[0]))]
    found = {"w/fc.weight": [sum(column) for column in zip(*rows, strict=True)], "vote/fc.weight": weighted}
    found["mask/fc.weight"] = [sum(column) for column in zip(*held, strict=True)]
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()} | {COUNT: torch.tensor(float(sum(n)))}


def merged(method: FedDST, found: Tree, kept: int) -> tuple[list[float], list[bool]]:
    """The layer fc of the server after the clients' reports, which keeps so many weights."""
    old = {"w/fc.weight": torch.zeros(len(found["w/fc.weight"])), "mask/fc.weight": torch.arange(len(found["w/fc.weight"])) < kept}
    shared = FedAvg().server({}, old, found, None)[0]  # type: ignore[arg-type]
    after = method.merged(shared, found)
    return after["w/fc.weight"].tolist(), after["mask/fc.weight"].tolist()


def test_check_two_clients_by_hand() -> None:
    """m = [1, 1] and [1, 0], w = [1, 2] and [3, -]: over those that hold a weight [2, 2], over zeros [2, 1]."""
    found = total([5, 5], [[1, 1], [1, 0]], [[1, 2], [3, 7]])
    assert merged(FedDST(average="cover"), found, kept=2) == ([2, 2], [True, True])
    assert merged(FedDST(average="zeros"), found, kept=2) == ([2, 1], [True, True])


def test_the_average_is_by_images_and_the_layer_keeps_as_many_weights_as_before() -> None:
    """4 positions, 2 kept; position 3 is held by nobody, position 1 by the client of 1 image alone."""
    found = total([3, 1], [[1, 0, 1, 0], [0, 1, 1, 0]], [[2, 9, 4, 9], [9, -5, 8, 9]])
    assert merged(FedDST(average="cover"), found, kept=2) == ([0, -5, 5, 0], [False, True, True, False])  # of 2, -5, (12 + 8) / 4
    assert merged(FedDST(average="zeros"), found, kept=2) == ([1.5, 0, 5, 0], [True, False, True, False])  # of 1.5, -1.25, 5
    assert merged(FedDST(average="cover", min_votes=2), found, kept=2) == ([0, -5, 5, 0], [False, True, True, False])
    assert merged(FedDST(average="cover", min_votes=2), found, kept=1) == ([0, 0, 5, 0], [False, False, True, False])


def test_of_equal_magnitudes_the_lower_position_stays_and_never_one_that_nobody_holds() -> None:
    w, holders = torch.tensor([0.0, 0, 3, 0, -3, 0]), torch.tensor([0, 1, 2, 2, 1, 1])
    assert best_held(w, holders, 3).tolist() == [False, True, True, False, True, False]
    assert best_held(w, holders, 3, min_votes=2).tolist() == [False, False, True, True, True, False]
    assert best_held(w, holders, 5, min_votes=2).tolist() == [False, True, True, True, True, True]
    assert best_held(w, holders, 5).tolist() == [False, True, True, True, True, True]


# ---- a round by hand


def gradient(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def adjust(module: nn.Module, optimiser: torch.optim.Optimizer, hidden: Tree, dense: Tree, moves: dict[str, int], regrow: bool) -> None:
    """Drops and grows in every layer by sorting Python lists; the optimiser forgets what it knew of these weights."""
    values = dict(module.named_parameters())
    for layer, k in moves.items():
        name = f"{layer}.weight"
        w, g, mask = (part.detach().flatten().tolist() for part in (values[name], dense[name], hidden[name]))
        dropped = sorted((i for i in range(len(w)) if mask[i]), key=lambda i: (abs(w[i]), i))[:k]
        able = [i for i in range(len(w)) if not mask[i] or (regrow and i in dropped)]
        grown = sorted(able, key=lambda i: (-abs(g[i]), i))[:k]
        for i, stays in [(i, False) for i in dropped] + [(i, True) for i in grown]:
            hidden[name].view(-1)[i] = stays
            values[name].data.view(-1)[i] = 0.0
            for state in optimiser.state[values[name]].values():
                if state is not None and state.shape == values[name].shape:
                    state.view(-1)[i] = 0.0


def client(made: World, shared: Tree, k: int, r: int, method: FedDST, moves: dict[str, int]) -> tuple[dict[str, Tensor], Tree]:
    """The state dict and the masks of client `k` at the end of round `r`, by torch's own optimisers."""
    module, hidden = loaded(small(), shared).train(), {key[5:]: mask.clone() for key, mask in under(shared, "mask/").items()}
    train, feed = made.setting.train, made.setting.train.feed()
    optimiser: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), train.lr, train.momentum, weight_decay=train.decay)
    if train.optimiser == "adam":
        optimiser = torch.optim.Adam(module.parameters(), train.lr, weight_decay=train.decay)
    before = train.epochs if method.adjust_epoch is None else method.adjust_epoch
    parts = [part for part in (before, "adjust", train.epochs - before) if part]
    for call, part in enumerate(parts):
        if part == "adjust":
            statistics = {name: value.clone() for name, value in module.named_buffers()}
            ((x, y),) = batches(made, replace(feed, epochs=0, steps=1), k, r, call)
            adjust(module, optimiser, hidden, gradient(module, x, y), moves, method.regrow)
            module.load_state_dict(statistics, strict=False)
            continue
        for x, y in batches(made, replace(feed, epochs=part), k, r, call):
            gradient(module, x, y)
            for name, value in module.named_parameters():
                value.grad += getattr(made.setting.aggregate, "fedprox_mu", 0) * (value.detach() - shared["w/" + name])
                value.grad *= hidden.get(name, 1)
            optimiser.step()
    return module.state_dict(), hidden


def round_by_hand(made: World, shared: Tree, r: int, method: FedDST, moves: dict[str, int]) -> Tree:
    visits = [client(made, shared, k, r, method, moves) for k in range(made.setting.clients)]
    n = [made.population.size(k) for k in range(made.setting.clients)]
    means = {key: sum(a * s[key.partition("/")[2]] for a, (s, _) in zip(n, visits, strict=True)) / sum(n) for key in under(shared, "w/")}
    after = means | {key: sum(a * s[key[4:]] for a, (s, _) in zip(n, visits, strict=True)) / sum(n) for key in under(shared, "buf/")}
    after |= {key: mask.clone() for key, mask in under(shared, "mask/").items()}
    for layer in moves:
        name = f"{layer}.weight"
        rows = [(a, state[name].flatten().tolist(), hidden[name].flatten().tolist()) for a, (state, hidden) in zip(n, visits, strict=True)]
        size, whole = len(rows[0][1]), sum(n)
        images = [sum(a for a, _, mask in rows if mask[i]) for i in range(size)]
        value = [sum(a * w[i] for a, w, mask in rows if mask[i]) / (images[i] or 1) for i in range(size)]
        if method.average == "zeros":
            value = [sum(a * w[i] for a, w, mask in rows if mask[i]) / whole for i in range(size)]
        votes = [sum(mask[i] for _, _, mask in rows) for i in range(size)]
        order = sorted((i for i in range(size) if votes[i]), key=lambda i: (votes[i] < method.min_votes, -abs(value[i]), i))
        stay = set(order[: int(shared["mask/" + name].sum())])
        shape = shared["w/" + name].shape
        after["w/" + name] = torch.tensor([value[i] if i in stay else 0.0 for i in range(size)], dtype=torch.float64).view(shape)
        after["mask/" + name] = torch.tensor([i in stay for i in range(size)]).view(shape)
    return after


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize(
    ("fields", "training", "aggregate"),
    [
        ({}, SLOW, FedAvg()),
        ({"adjust_epoch": 1, "regrow": False}, SLOW, FedProx(fedprox_mu=0.5)),
        ({"adjust_epoch": 1}, ADAM, FedAvg()),
        ({"adjust_epoch": 0, "average": "zeros"}, SLOW, FedAvg()),
        ({"adjust_epoch": 1, "min_votes": 2}, SLOW, FedAvg()),
    ],
    ids=["paper", "between", "adam", "library", "votes"],
)
def test_a_round_of_three_clients_is_the_one_by_hand(kind, fields, training, aggregate) -> None:
    """Clients of 5, 11 and 6 images, batches of 4, two epochs; every layer is adjusted by each client for itself."""
    made, r = world(stored(*drawn([5, 11, 6])), kind=kind, training=training), 2
    made.setting = replace(made.setting, aggregate=aggregate)
    before, method = masked(made.setting), replace(OFTEN, **fields)
    moves = {name: int(0.3 * (1 + cos(pi * r / 8)) * count) for name, count in kept(before.shared).items()}
    made.fleet.open(r)
    state, found = method.round(made.setting, before, made.fleet, r)
    expected = round_by_hand(made, before.shared, r, method, moves)
    assert min(moves.values()) >= 2
    assert state.shared.keys() == expected.keys()
    entered = 0
    for key, value in expected.items():
        if key.startswith("mask/"):
            assert torch.equal(state.shared[key], value), key
            entered += int((value & ~before.shared[key]).sum())
        else:
            assert torch.allclose(state.shared[key], value.double(), atol=1e-7), key
    assert found["weights_swapped"] == entered > 0


# ---- invariants


def test_every_client_and_the_server_keep_as_many_weights_and_the_server_only_what_a_client_keeps() -> None:
    made = world(stored(*drawn([5, 11, 6])))
    method = replace(OFTEN, adjust_epoch=1)
    state = method.init(made.setting, None)
    counts = kept(state.shared)
    assert sum(counts.values()) == int(0.45 * 522) - 36  # of all 522 weights, 36 of them dense
    for r in range(1, 7):
        moves = method.moves(made.setting, state.shared, r)
        made.fleet.open(r)
        alone: list[Tree] = []
        for k in range(3) if moves else ():
            work = TrainAndAdjust.at(made.setting, r, feeds=method.feeds(made.setting.train.feed(), tuple(moves)), moves=moves)
            alone.append(under(made.fleet.run(work, [k], state.shared).total, "mask/"))
            assert {key: int(mask.sum()) for key, mask in alone[k].items()} == {f"mask/{name}.weight": counts[name] for name in moves}
        made.fleet.open(r)
        state, found = method.round(made.setting, state, made.fleet, r)
        assert kept(state.shared) == counts
        for key in alone[0] if alone else ():
            union = torch.stack([row[key] for row in alone]).sum(0) > 0
            assert not (state.shared[key] & ~union).any()
        if alone:
            sums = [torch.stack([row[key] for row in alone]).sum(0) for key in alone[0]]
            all_hold, any_holds = (sum(int((count >= least).sum()) for count in sums) for least in (3, 1))
            assert found["mask_agreement"] == all_hold / any_holds < 1
        assert all(
            not value[~state.shared["mask/" + key[2:]]].any() for key, value in state.shared.items() if "mask/" + key[2:] in state.shared
        )


def test_a_permutation_of_the_clients_changes_nothing() -> None:
    """Each client sees all its images in one batch, so that its number decides nothing but the order of the sum."""
    x, y, owners = drawn([5, 11, 6])
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        made = world(stored(x, y, torch.tensor(order)[owners]), training=LocalTraining(batch=16, epochs=2, lr=0.1, augment=False))
        state, _ = made.play(replace(OFTEN, adjust_epoch=1), 4)  # type: ignore[arg-type]
        ends.append(state.shared)
    for key, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][key].double(), atol=1e-9), key


@pytest.mark.parametrize("average", ["cover", "zeros"])
@pytest.mark.parametrize("kind", FLEETS)
def test_without_moves_both_forms_are_fedavg_under_a_static_mask(average, kind) -> None:
    made = world(stored(*drawn([5, 11, 6])), kind=kind)
    method = replace(OFTEN, average=average, adjust_fraction=0.0)
    state, found = made.play(method, 3)  # type: ignore[arg-type]
    assert [row.get("weights_swapped") for row in found] == [None, 0, 0, 0]
    plain = world(stored(*drawn([5, 11, 6])), kind=kind)
    shared = method.init(plain.setting, None).shared
    for r in (1, 2, 3):
        plain.fleet.open(r)
        reply = plain.fleet.run(Train.at(plain.setting, r), range(3), shared)
        shared = shared | {key: reply.total[key] / reply.total[COUNT] for key in under(shared, "w/", "buf/")}
    assert all(torch.equal(value, state.shared[key]) for key, value in shared.items())


def test_where_all_clients_agree_both_averages_are_the_same() -> None:
    """One client: it alone holds its mask, so that covering it is the same as averaging over zeros."""
    ends = []
    for average in ("cover", "zeros"):
        made = world(stored(*drawn([9])))
        ends.append(made.play(replace(OFTEN, average=average), 4)[0].shared)  # type: ignore[arg-type]
    for key, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][key].double(), atol=1e-12), key


def test_at_density_1_nothing_moves() -> None:
    made = world(stored(*drawn([6, 5])))
    state, found = made.play(replace(OFTEN, density=1.0), 3)  # type: ignore[arg-type]
    assert kept(state.shared) == SIZES
    assert [row["weights_swapped"] for row in found[1:]] == [0, 0, 0]


# ---- when, and how many


def test_rounds_2_and_then_every_r_adj_up_to_r_end() -> None:
    made = world(stored(*drawn([6, 5])))
    setting = replace(made.setting, rounds=21)
    method = FedDST(density=0.45, adjust_every=3, adjust_fraction=1.0)
    shared = method.init(setting, None).shared
    counts = kept(shared)
    found = {r: method.moves(setting, shared, r) for r in range(22)}
    assert [r for r, moves in found.items() if moves] == [2, 5, 8]  # R_end = 10; 11 is beyond
    for r in (2, 5, 8):
        share = 0.5 * (1 + cos(pi * r / 10))
        wanted = {name: min(int(share * counts[name]), counts[name], size - counts[name]) for name, size in SIZES.items()}
        assert found[r] == {name: k for name, k in wanted.items() if k}
    assert not any(replace(method, stop_round=0).moves(setting, shared, r) for r in range(22))
    assert [r for r in range(22) if replace(method, stop_round=23).moves(setting, shared, r)] == [2, 5, 8, 11, 14, 17, 20]


# ---- costs


@pytest.mark.parametrize("kind", FLEETS)
def test_a_client_uploads_its_kept_weights_and_where_its_mask_differs(kind) -> None:
    made = world(stored(*drawn([6, 9])), kind=kind)
    method = replace(OFTEN, adjust_fraction=0.1, regrow=False)  # so that all that leave and enter are distinct
    state = method.init(made.setting, None)
    values = 4 * (sum(kept(state.shared).values()) + FIRST + FREE + STATISTICS)
    for r in (1, 2):
        before = state.shared
        made.fleet.open(r)
        state, _ = method.round(made.setting, state, made.fleet, r)
        bills = made.fleet.account.bills
        changed = 2 * sum(made.seen[-1].work.moves.values()) if r == 2 else 0
        mask = {
            name: min(4 * 2 * k, 4 * kept(before)[name], -(-SIZES[name] // 8))
            for name, k in getattr(made.seen[-1].work, "moves", {}).items()
        }
        assert (changed > 0) == (r == 2)
        assert [bills[k].bytes_up for k in (0, 1)] == [values + sum(mask.values())] * 2
    assert mask.keys() == {"conv2", "fc1"}  # a thirtieth of fc2 is less than one weight


def test_an_adjusting_client_pays_for_one_batch_with_dense_gradients_and_holds_what_moves() -> None:
    """Forward and the gradients of inputs are sparse, the gradient of every adjusted layer's weight is dense."""
    made = world(stored(*drawn([6, 9])))
    state = OFTEN.init(made.setting, None)
    bills = []
    for method in (OFTEN, replace(OFTEN, stop_round=0)):
        made.fleet.open(2)
        method.round(made.setting, state, made.fleet, 2)
        bills.append(dict(made.fleet.account.bills))
    places, counts = {"conv1": 16, "conv2": 4, "fc1": 1, "fc2": 1}, kept(state.shared)
    sparse = {layer: 2 * places[layer] * ones for layer, ones in ({"conv1": FIRST} | counts).items()}
    dense = {layer: 2 * places[layer] * size for layer, size in SIZES.items()}
    moves = OFTEN.moves(made.setting, state.shared, 2)
    image = 3 * sum(sparse.values()) + sum(dense[layer] - sparse[layer] for layer in moves)
    assert [bills[0][k].train_flops - bills[1][k].train_flops for k in (0, 1)] == [4 * image] * 2
    terms = bills[0][1].memory_terms
    assert terms["beside"] == 8 * sum(moves.values())
    assert terms["dense_gradient"] == 4 * max(SIZES[layer] for layer in moves)


# ---- what cannot be

SMOKE = small_job(4, method={"name": "feddst", "density": 0.4, "adjust_every": 1, "adjust_fraction": 0.3})


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    return console(SMOKE, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.density=0.001"], "conv1 stays dense with 36"),
        (["method.density=0"], "density = 0.0: should be above 0"),
        (["method.adjust_fraction=1.5"], "adjust_fraction = 1.5: should be from 0 to 1"),
        (["method.adjust_every=0"], "adjust_every = 0: should be at least 1"),
        (["method.min_votes=0"], "min_votes = 0: should be at least 1"),
        (["method.min_votes=5"], "min_votes = 5: should be at most 4, the clients of a round"),
        (["method.adjust_epoch=3"], "adjust_epoch = 3: should be at most train.epochs = 1"),
        (["method.average='union'"], 'average = "union": should be "cover" or "zeros"'),
        (["train.aggregate='scaffold'"], 'train.aggregate = "scaffold": feddst averages'),
        (["train.aggregate='fednova'"], 'take "fedavg" or "fedprox"'),
    ],
)
def test_what_cannot_be_is_reported_and_nothing_is_written(fedsim, tmp_path, settings, said) -> None:
    code, text = fedsim("run", *settings)
    assert code == 2
    assert said in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


def test_an_epoch_cannot_be_named_where_the_job_trains_by_steps() -> None:
    made = world(stored(*drawn([6, 5])), training=LocalTraining(batch=4, steps=3))
    for epoch in (1, 2):
        with pytest.raises(BadInput, match=rf"adjust_epoch = {epoch}: the job trains by train.steps = 3; take 0"):
            replace(OFTEN, adjust_epoch=epoch).init(made.setting, None)
    assert OFTEN.feeds(made.setting.train.feed(), ("fc1",))[0].steps == 3
    assert replace(OFTEN, adjust_epoch=0).feeds(made.setting.train.feed(), ("fc1",))[1].steps == 3


@pytest.mark.parametrize("aggregate", [FedNova(momentum=0.9), Scaffold(lr=0.1)])
def test_aggregations_that_need_one_mask_for_all_are_refused(aggregate) -> None:
    made = world(stored(*drawn([6, 5])))
    with pytest.raises(BadInput, match=r"train\.aggregate"):
        OFTEN.init(replace(made.setting, aggregate=aggregate), None)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "jobs").rglob("feddst*.toml")), ids=lambda path: path.stem)
def test_every_job_is_valid(path) -> None:
    for one in job.runs(job.load(path)):
        assert one.method.name == "feddst"
