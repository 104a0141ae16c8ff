"""Pruning at initialisation: masks against brute force, the clients' scores against plain torch, costs, and what cannot be."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from captured_console import console
from small_federation import FLEETS, World, batches, drawn, kept, loaded, small, stored, world
from small_job import small_job
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsim.config import job
from fedsim.core.tree import Tree, under
from fedsim.data.image_sets import Stored
from fedsim.errors import BadInput
from fedsim.federated import pretraining
from fedsim.federated.aggregation import FedNova, FedProx, Scaffold
from fedsim.federated.averaged_round import AveragedState
from fedsim.fleet.serial import SerialFleet
from fedsim.methods.baselines.at_init import AtInit
from fedsim.methods.fedavg import FedAvg
from fedsim.nn.net import Net
from fedsim.pruning.sparsity import saliency
from fedsim.pruning.sparsity.layer_densities import kept_counts
from fedsim.pruning.sparsity.masked_averaging import drawn as drawn_masks
from fedsim.simulation.experiment import build_experiment

JOBS = Path(__file__).parents[2] / "jobs"
SIZES = {"conv1": 36, "conv2": 216, "fc1": 240, "fc2": 30}
PUBLIC = stored(*drawn([12], seed=9)[:2])
HALF = floor(0.5 * 522) - 36  # weights that the masked layers keep at density 0.5
FORMS = {
    "magnitude": AtInit(density=0.5),
    "random": AtInit(density=0.5, score="random"),
    "snip": AtInit(density=0.5, score="snip"),
    "snip-20": AtInit(density=0.5, score="snip", iterations=20),
    "clients": AtInit(density=0.5, score="snip", data="clients"),
    "synflow": AtInit(density=0.5, score="synflow", iterations=7),
    "grasp": AtInit(density=0.5, score="grasp"),
}


def plain() -> nn.Module:
    """The small net without norms."""
    return nn.Sequential(*(layer for layer in small() if not isinstance(layer, nn.BatchNorm2d)))


def made(kind: type = FLEETS[0], sizes: tuple[int, ...] = (6, 9, 5), module: nn.Module | None = None) -> World:
    one = world(stored(*drawn(list(sizes))), module, kind)
    one.setting = replace(one.setting, image_shape=(1, 4, 4))
    return one


def begun(method: AtInit, one: World | None = None, public: Stored = PUBLIC) -> Tree:
    """The model after round 0."""
    return (one or made()).play(method, 0, public)[0].shared


def masks_of(shared: Tree) -> dict[str, np.ndarray]:
    return {key[5:].removesuffix(".weight"): mask.numpy() for key, mask in under(shared, "mask/").items()}


def largest(scores: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """One ranking of all layers, by plain NumPy; of equals the first stays."""
    flat = np.concatenate([score.ravel() for score in scores.values()])
    mask = np.zeros(len(flat), bool)
    mask[np.lexsort((np.arange(len(flat)), -flat))[:k]] = True
    parts = np.split(mask, np.cumsum([score.size for score in scores.values()])[:-1])
    return {layer: part.reshape(score.shape) for (layer, score), part in zip(scores.items(), parts, strict=True)}


def gradient_of(module: nn.Module, tree: Tree, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """By plain torch in training mode."""
    model = loaded(module, tree).train()
    F.cross_entropy(model(x), y).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def seen(public: Stored) -> torch.Tensor:
    return (public.x.double() / 255 - public.mean[0]) / public.std[0]


# ---- masks


@pytest.mark.parametrize("method", FORMS.values(), ids=FORMS)
def test_counts_are_exact_and_the_first_layer_stays_dense(method) -> None:
    shared = begun(method)
    counts = kept(shared)
    assert list(counts) == ["conv2", "fc1", "fc2"]
    assert sum(counts.values()) == HALF
    for key, mask in under(shared, "mask/").items():
        assert not bool(shared["w/" + key[5:]][~mask].any())
        assert bool(shared["w/" + key[5:]][mask].all())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_keeps_the_largest_of_each_scope(scope) -> None:
    one = made()
    held = masks_of(begun(AtInit(density=0.5, scope=scope), one))
    w = {layer: one.setting.net.initial[f"w/{layer}.weight"].abs().numpy() for layer in held}
    groups = [list(held)] if scope == "global" else [[layer] for layer in held]
    for group in groups:
        inside, outside = (np.concatenate([w[layer][held[layer] == side] for layer in group]) for side in (True, False))
        assert not len(outside) or inside.min() >= outside.max()
    if scope == "layer":
        counts = kept_counts(one.setting.net, one.setting.net.maskable, 0.5, "erk")
        assert {layer: int(mask.sum()) for layer, mask in held.items()} == counts


def test_published_scopes_are_the_defaults() -> None:
    one = made()
    erk = kept_counts(one.setting.net, one.setting.net.maskable, 0.5, "erk")
    for name, method in FORMS.items():
        counts = kept(begun(method))
        same = counts == kept(begun(replace(method, scope="layer" if name in ("magnitude", "random") else "global")))
        assert same, name
        assert (counts == erk) == (name in ("magnitude", "random")), name


def test_random_masks_by_layer_are_those_that_other_methods_draw() -> None:
    one = made()
    wanted = drawn_masks(one.setting.net, kept_counts(one.setting.net, one.setting.net.maskable, 0.5), 0)
    assert all(torch.equal(value, begun(FORMS["random"], one)[key]) for key, value in wanted.items())


@pytest.mark.parametrize("method", FORMS.values(), ids=FORMS)
def test_masks_never_move_and_pruned_weights_stay_zero(method) -> None:
    one = made()
    first, _ = one.play(method, 0, PUBLIC)
    last, _ = one.play(method, 2, state=first)
    assert all(torch.equal(value, last.shared[key]) for key, value in under(first.shared, "mask/").items())
    assert all(not bool(last.shared["w/" + key[5:]][~mask].any()) for key, mask in under(last.shared, "mask/").items())
    assert any(not torch.equal(value, last.shared[key]) for key, value in under(first.shared, "w/").items())


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("method", [FORMS[name] for name in ("magnitude", "clients", "synflow", "grasp")])
def test_density_1_is_fedavg_to_the_bit(method, kind) -> None:
    ends = [made(kind).play(one, 2, PUBLIC)[0].shared for one in (replace(method, density=1.0), FedAvg())]
    assert all(torch.equal(value, ends[0][key]) for key, value in ends[1].items())
    assert set(ends[0]) - set(ends[1]) == {f"mask/{layer}.weight" for layer in ("conv2", "fc1", "fc2")}


@pytest.mark.parametrize("aggregate", [FedProx(fedprox_mu=0.3), FedNova(0.9), Scaffold(0.1)], ids=lambda one: type(one).__name__)
def test_every_aggregation_begins_with_the_pruned_model(aggregate) -> None:
    ends = []
    for data in ("server", "clients"):
        one = made(sizes=(4,))
        one.setting = replace(one.setting, aggregate=aggregate)
        state, _ = one.play(AtInit(density=0.5, score="snip", data=data), 2, PUBLIC)
        ends.append(state)
    for state in ends:
        assert sum(kept(state.shared).values()) == HALF
        assert all(not bool(state.shared["w/" + key[5:]][~mask].any()) for key, mask in under(state.shared, "mask/").items())


def test_a_ranking_of_all_layers_may_empty_one_and_says_so() -> None:
    """The weights of fc2 are a thousandth of the others'."""
    module = small()
    with torch.no_grad():
        module.fc2.weight.mul_(1e-3)
    for scope, empty in (("global", 1), ("layer", 0)):
        state, columns = made(module=module).play(AtInit(density=0.3, scope=scope), 1)
        assert columns[0] == {"empty_layers": empty}
        assert "empty_layers" not in columns[1]
        assert (kept(state.shared)["fc2"] == 0) == bool(empty)
    state, columns = made(module=module).play(AtInit(density=0.3, scope="global", class_weights=2), 0)
    assert columns[0] == {"empty_layers": 0}
    assert state.shared["mask/fc2.weight"].sum(1).tolist() == [2, 2, 2]
    assert sum(kept(state.shared).values()) == floor(0.3 * 522) - 36


def test_a_layer_whose_share_grows_as_the_budget_falls_gets_it_all_the_same() -> None:
    """By rounding, fc1 keeps 10 of 20 weights in the last step but one, and 11 of 19 in the last."""
    one = made()
    net, method = one.setting.net, AtInit(density=55.2 / 522, score="synflow", scope="layer")
    before, last = (kept_counts(net, net.maskable, d)["fc1"] for d in (method.density**0.99, method.density))
    assert (before, last) == (10, 11)
    assert kept(begun(method, one)) == kept_counts(net, net.maskable, method.density)


# ---- SNIP and SSFL


def test_snip_ranks_w_times_g_of_all_public_images() -> None:
    one = made(module=plain())
    tree = one.setting.net.initial
    g = gradient_of(plain(), tree, seen(PUBLIC), PUBLIC.y)
    layers = one.setting.net.maskable
    wanted = largest({layer: (tree[f"w/{layer}.weight"] * g[f"{layer}.weight"]).abs().numpy() for layer in layers}, HALF)
    held = masks_of(begun(replace(FORMS["snip"], images_per_class=12), one))
    assert all((held[layer] == mask).all() for layer, mask in wanted.items())


def test_iterated_snip_by_hand() -> None:
    """Densities 0.5^(1/2) and 0.5, the second score under the first mask."""
    one = made(module=plain())
    tree, layers = dict(one.setting.net.initial), one.setting.net.maskable
    held = {layer: np.ones(tree[f"w/{layer}.weight"].shape, bool) for layer in layers}
    for k in (floor(0.5**0.5 * 522) - 36, HALF):
        g = gradient_of(plain(), tree, seen(PUBLIC), PUBLIC.y)
        scores = {layer: (tree[f"w/{layer}.weight"] * g[f"{layer}.weight"]).abs().numpy() for layer in layers}
        held = largest({layer: np.where(held[layer], score, -1.0) for layer, score in scores.items()}, k)
        tree |= {f"w/{layer}.weight": tree[f"w/{layer}.weight"] * torch.tensor(mask) for layer, mask in held.items()}
    found = masks_of(begun(replace(FORMS["snip"], iterations=2, images_per_class=12), made(module=plain())))
    once, one_step = (masks_of(begun(replace(FORMS["snip"], iterations=t, images_per_class=12), made(module=plain()))) for t in (None, 1))
    for layer, mask in held.items():
        assert (found[layer] == mask).all()
        assert (once[layer] == one_step[layer]).all()


@pytest.mark.parametrize("kind", FLEETS)
def test_clients_scores_by_hand(kind) -> None:
    """sum of n_k |w g_k|, each of one local batch: the absolute values are summed, not the gradients."""
    one = made(kind)
    state, _ = one.play(FORMS["clients"], 0)
    (order,) = one.seen
    tree, layers = one.setting.net.initial, one.setting.net.maskable
    assert order.clients == [0, 1, 2]
    assert not order.work.feeds[0].augment
    total = {layer: np.zeros(tree[f"w/{layer}.weight"].shape) for layer in layers}
    for k, n in enumerate((6, 9, 5)):
        ((x, y),) = batches(one, order.work.feeds[0], k, 0, 0)
        assert len(y) == 4
        g = gradient_of(small(), tree, x, y)
        for layer in layers:
            total[layer] += n * (tree[f"w/{layer}.weight"] * g[f"{layer}.weight"]).abs().numpy()
    for layer in layers:
        np.testing.assert_allclose(order.reply.total[f"loss/score/{layer}.weight"].numpy(), total[layer], rtol=1e-9, atol=1e-15)
    held = masks_of(state.shared)
    assert all((held[layer] == mask).all() for layer, mask in largest(total, HALF).items())
    assert all(torch.equal(value, tree[key]) for key, value in under(state.shared, "buf/").items())


@pytest.mark.parametrize("kind", FLEETS)
def test_one_client_prunes_as_the_server_does_by_the_same_batch(kind) -> None:
    x, y, _ = drawn([4])
    held = []
    for method in (FORMS["clients"], replace(FORMS["snip"], images_per_class=4)):
        held.append(masks_of(begun(method, made(kind, (4,)), stored(x, y))))
    assert all((mask == held[1][layer]).all() for layer, mask in held[0].items())


def test_clients_send_a_number_for_each_masked_weight_and_are_sent_the_dense_model() -> None:
    one = made()
    one.play(FORMS["clients"], 0)
    bills = one.fleet.account.bills.values()
    assert {bill.bytes_up for bill in bills} == {4 * (216 + 240 + 30)}
    assert {bill.bytes_down for bill in bills} == {
        4 * (522 + (10 + 10) + (10 + 3) + 2 * 10)
    }  # norms' scales and shifts, biases, statistics
    forward = 2 * (36 * 16 + 216 * 4 + 240 + 30)
    assert {bill.train_flops for bill in bills} == {3 * forward * 4}
    one.play(replace(FORMS["clients"], scoring_clients=2), 0)
    assert len(one.seen[-1].clients) == 2


# ---- what the server does, and what it costs


def test_public_images_are_balanced() -> None:
    one = made()
    public = stored(*drawn([50], seed=4)[:2])
    parts = pretraining.balanced(one.setting, public, 5)
    y = torch.cat([batch.y for batch in parts])
    assert torch.bincount(y).tolist() == [5, 5, 5]
    assert [len(batch.y) for batch in parts] == [4, 4, 4, 3]
    known = {tuple(x.flatten().tolist()): int(label) for x, label in zip(seen(public), public.y, strict=True)}
    chosen = [tuple(x.flatten().tolist()) for batch in parts for x in batch.x]
    assert len(set(chosen)) == 15
    assert [known[x] for x in chosen] == y.tolist()
    assert len(torch.cat([batch.y for batch in pretraining.balanced(one.setting, public, 100)])) == 50


def test_magnitude_of_the_pretrained_model_which_training_starts_from() -> None:
    one = made()
    shared = begun(AtInit(density=0.5, scope="global", pretrain_epochs=2), one)
    wanted = pretraining.pretrained(made().setting, PUBLIC, 2)
    held = largest({layer: wanted[f"w/{layer}.weight"].abs().numpy() for layer in one.setting.net.maskable}, HALF)
    assert all((mask == held[layer]).all() for layer, mask in masks_of(shared).items())
    assert torch.equal(shared["w/conv1.weight"], wanted["w/conv1.weight"])
    assert torch.equal(shared["w/fc1.weight"], wanted["w/fc1.weight"] * torch.tensor(held["fc1"]))


def test_the_server_is_charged_three_dense_passes_an_image_and_step() -> None:
    positions = {"conv1": 16, "conv2": 4, "fc1": 1, "fc2": 1}
    dense = 3 * sum(2 * SIZES[layer] * positions[layer] for layer in SIZES)
    for name, images in (("magnitude", 0), ("random", 0), ("snip", 12), ("grasp", 48)):
        one = made()
        begun(replace(FORMS[name], images_per_class=12) if images else FORMS[name], one)
        assert one.setting.server.take().get("server_flops_scoring", 0) == images * dense, name
    one = made()
    begun(replace(FORMS["synflow"], iterations=7), one)
    assert one.setting.server.take()["server_flops_scoring"] == 7 * dense
    one = made()
    begun(replace(FORMS["snip"], images_per_class=12, iterations=3), one)
    assert one.setting.server.take()["server_flops_scoring"] == 3 * 12 * dense


def test_grasps_passes_agree_with_torchs_counter() -> None:
    torch.manual_seed(0)
    wide = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    net = Net(nn.Sequential(*wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    forward = 4 * 2 * (64 * (3 * 16 + 16 * 32 + 32 * 32) * 9 + 32 * 5)
    batch = saliency.Batch(x, y, None, torch.tensor(0), torch.tensor(1))
    with FlopCounterMode(display=False) as counter:
        saliency.grasp(net, net.initial, tuple(net.sizes), [batch], 200.0)
    assert counter.get_total_flops() / (3 * forward) == pytest.approx(saliency.GRASP_PASSES, rel=0.1)


def test_filters_that_a_layer_normalises_can_be_scored() -> None:
    for model in ({"norm": "nsconv"}, {"norm": "group", "standardise": True}):
        for score in ("snip", "synflow", "grasp"):
            fields = {"method": {"name": score, "density": 0.3}, "model": {"name": "cnn", "width": 4} | model, "partition": {"public": 3}}
            parts = build_experiment(job.check(tomllib.loads(small_job(1, **fields))))
            state: AveragedState = parts.job.method.use.init(parts.setting, parts.population.public())
            counts = kept(state.shared)
            assert sum(counts.values()) + parts.setting.net.sizes["conv1"] == floor(0.3 * parts.setting.model_profile.weights)


def test_a_model_of_one_layer_can_be_pruned_where_the_first_may_be() -> None:
    for score in ("magnitude", "random", "synflow"):
        one = made(module=nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
        state, _ = one.play(AtInit(score=score, density=0.3, mask_first=True, class_weights=2), 1)
        mask = state.shared["mask/1.weight"]
        assert int(mask.sum()) == floor(0.3 * 48)
        assert bool((mask.sum(1) >= 2).all())


# ---- jobs, and what cannot be

SMOKE = small_job(2, method={"name": "snip", "density": 0.3}, partition={"public": 3})


@pytest.mark.parametrize("score", ["magnitude", "random", "snip", "synflow", "grasp"])
def test_a_score_is_a_name_in_a_job(score) -> None:
    (one,) = job.runs(job.load(JOBS / f"{score}_digits.toml"))
    assert one.method.name == score
    assert one.method.use.score == score
    assert isinstance(one.method.use, AtInit)


@pytest.mark.parametrize("command", ["run", "estimate"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["partition.public=0"], 'snip scores weights by public images: set partition.public = 10 (a class), or method.data = "clients"'),
        (["partition.public=0", "method.name='grasp'"], "grasp scores weights by public images: set partition.public = 10"),
        (["partition.public=0", "method.name='magnitude'", "method.pretrain_epochs=1"], "pretrain_epochs needs public images"),
        (["method.density=0.001"], "conv1 stays dense with 36"),
        (["method.density=0.001", "method.iterations=20"], "density = 0.001 leaves 0 of"),
        (["method.density=0"], "density = 0"),
        (["method.iterations=0"], "iterations = 0: should be at least 1"),
        (["method.temperature=0"], "temperature = 0"),
        (["method.images_per_class=0"], "images_per_class = 0: should be at least 1"),
        (["method.temperature=2.0"], "temperature = 2.0: read for grasp alone; leave it out"),
        (["method.name='synflow'", "method.images_per_class=5"], "images_per_class = 5: read for snip and grasp alone; leave it out"),
        (["method.data='clients'", "method.iterations=3"], "iterations = 3: clients score once"),
        (["method.scoring_clients=2"], 'scoring_clients = 2: clients score where data = "clients" alone'),
        (["method.data='clients'", "method.name='synflow'"], 'data = "clients": clients score for "snip" alone, not for \'synflow\''),
        (["method.data='clients'", "method.scoring_clients=9"], "scoring_clients: of 4 clients at most 4 can score"),
        (["method.density=0.03", "method.class_weights=100"], "class_weights = 100 for 4 outputs of fc2, whose ranking keeps"),
        (["method.score='grasp'"], "means method.score = 'snip'"),
        (["method.name='at_init'", "method.score='l1'"], 'score = "l1": should be'),
    ],
)
def test_what_cannot_be_is_reported_and_nothing_is_written(tmp_path, monkeypatch, capfd, command, settings, said) -> None:
    code, text = console(SMOKE, tmp_path, monkeypatch, capfd)(command, *settings)
    assert code == 2, text
    assert said in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


def test_clients_cannot_keep_more_for_each_class_than_there_is() -> None:
    with pytest.raises(BadInput, match=r"class_weights = 9 for 3 outputs of fc2, whose ranking keeps 16 weights; take at most 5"):
        made().play(replace(FORMS["clients"], density=0.1, class_weights=9), 0)
    assert sum(kept(begun(replace(FORMS["clients"], density=0.1, class_weights=5))).values()) == 16


def test_synflow_needs_no_image_and_no_round_charges_the_server_again() -> None:
    one = made(SerialFleet, module=plain())
    state, _ = one.play(FORMS["synflow"], 0)
    one.setting.server.take()
    one.play(FORMS["synflow"], 1, state=state)
    assert one.setting.server.take() == {"server_flops": 0}
