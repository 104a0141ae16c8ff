"""What FedTiny costs: bytes, FLOPs and memory by hand from the specification, and the bytes that are really alive in a probe."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from live_tensors import Alive
from small_federation import FLEETS, World, drawn, kept, masked, stored, world
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedsim import models
from fedsim.config.job import check
from fedsim.core import masks
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch, LocalTraining
from fedsim.costs import communication, flops, profile
from fedsim.costs.profile import ModelProfile
from fedsim.federated import verbs
from fedsim.federated.client_work import Train, TrainAndScore
from fedsim.federated.protocol import Work
from fedsim.fleet.cuda_graph.fleet import forget
from fedsim.fleet.messages import Pack, WorkOrder
from fedsim.fleet.registry import FLEETS as ENGINES
from fedsim.methods.fedtiny import FedTiny
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.pruning import mask_adjustment
from fedsim.simulation.experiment import Experiment, build_experiment

FIRST, FREE, STATISTICS = 36, 2 * (4 + 6) + 10 + 3, 2 * (4 + 6)  # floats of the small net: first layer, scales and biases, statistics
MASKED = {"conv2": 216, "fc1": 240, "fc2": 30}


# ---- bytes


def positions(now: Tree, before: Tree | None) -> int:
    """The cheapest of 4 · changed positions, 4 · ones, a bit for each; who never saw a mask holds ones everywhere."""
    total = 0
    for key, mask in under(now, "mask/").items():
        changed = int((~mask if before is None else mask ^ before[key]).sum())
        total += min(4 * changed, 4 * int(mask.sum()), -(-mask.numel() // 8))
    return total


def values(shared: Tree) -> int:
    return 4 * sum(kept(shared).values())


def bills(made: World, method: FedTiny, rounds: int) -> list[dict[int, tuple[int, int]]]:
    """(down, up) of every client in every round."""
    told, state = [], method.init(made.setting, None)
    for r in range(rounds + 1):
        made.fleet.open(r)
        state, _ = method.round(made.setting, state, made.fleet, r)
        told.append({k: (bill.bytes_down, bill.bytes_up) for k, bill in made.fleet.account.bills.items()})
    return told


@pytest.mark.parametrize("kind", FLEETS)
def test_check_13_bytes_of_selection_plain_and_adjusting_rounds(kind) -> None:
    """Four clients select among three candidates, two a round train: some come back after masks have changed twice."""
    made = world(stored(*drawn([6, 9, 5, 7])), kind=kind, training=LocalTraining(batch=4, momentum=0.9), cohort=2)
    told = bills(made, FedTiny(density=0.4, pool=3, adjust_every=2, stop_round=20, pretrain_epochs=0, blocks="all"), 10)
    pool = [seen.shared for seen in made.seen if type(seen.work).__name__ == "Statistics"]
    assert len(pool) == 3
    candidates = sum(values(shared) + positions(shared, before) for shared, before in zip(pool, [None, *pool[:-1]], strict=True))
    down = candidates + 4 * (FIRST + FREE + STATISTICS) + 3 * 4 * STATISTICS  # what is never masked once; then the agreed statistics
    assert told[0] == dict.fromkeys(range(4), (down, 3 * 4 * STATISTICS + 3 * 4))
    last, probed = dict.fromkeys(range(4), pool[-1]), []
    for seen in made.seen[6:]:
        plain = values(seen.shared) + 4 * (FIRST + FREE + STATISTICS)
        up = plain + 8 * sum(getattr(seen.work, "moves", {}).values())
        assert told[seen.r] == {k: (plain + positions(seen.shared, last[k]), up) for k in seen.clients}
        last |= dict.fromkeys(seen.clients, seen.shared)
        probed.append(up > plain)
    assert probed == [False, True] * 5


def test_check_13_the_bytes_are_those_of_the_tensors_that_are_encoded() -> None:
    made = world(stored(*drawn([6])), training=LocalTraining(batch=4), cohort=1)
    told = bills(made, FedTiny(density=0.4, adjust_every=2, stop_round=20, pretrain_epochs=0, selection="none"), 3)
    before: Tree = {}
    for seen in made.seen:
        broadcast = {key: value.float() if value.is_floating_point() else value for key, value in seen.shared.items()}
        payload, _ = communication.encode(broadcast, last=before)
        report = {key: value.float() for key, value in seen.reply.total.items()} | {key: value[0] for key, value in seen.reply.each.items()}
        sent, _ = communication.encode(report, held=under(seen.shared, "mask/"))
        assert told[seen.r] == {0: (len(payload), len(sent))}
        before = under(seen.shared, "mask/")
    assert [bool(under(seen.reply.each, "top/")) for seen in made.seen] == [False, True, False]


@pytest.fixture(scope="module")
def resnet18() -> ModelProfile:
    with torch.device("meta"):
        module = models.build(settings.ModelSettings("resnet18"), (3, 32, 32), 10, 0)
    return profiler.profile(module, (3, 32, 32))


def test_check_13_the_sizes_of_resnet18(resnet18) -> None:
    sizes = {layer.name: layer.weights for layer in resnet18.layers}
    assert (resnet18.weights, len(sizes)) == (11_164_352, 21)
    assert masks.budget(sizes, 0.01) + sizes["conv1"] == 111_643
    assert 4 * 111_643 == 446_572
    assert resnet18.free + resnet18.buffers == 19_210
    assert 4 * (resnet18.weights + resnet18.free + resnet18.buffers) == 44_734_248
    assert profile.positions_bytes(10_000, 320_000) == 4 * 10_000 == -(-320_000 // 8)  # at 1/32 both cost the same
    assert profile.positions_bytes(9_999, 320_000) == 4 * 9_999
    assert profile.positions_bytes(10_001, 320_000) == 40_000


# ---- FLOPs


def share(model_profile: ModelProfile, density: float) -> float:
    """f_S / f_D with the first layer dense and every other at `density`."""
    first, *rest = model_profile.layers
    return (first.flops + density * sum(layer.flops for layer in rest)) / flops.forward_flops(model_profile)


def test_check_12_flops_of_resnet18(resnet18) -> None:
    dense = flops.forward_flops(resnet18)
    assert dense == 2 * 555_422_720
    training = flops.feed_flops(resnet18, 5 * 5_000).total
    assert training == pytest.approx(8.3313e13, rel=1e-5)
    assert share(resnet18, 0.01) == pytest.approx(0.013154, abs=5e-7)
    assert share(resnet18, 0.0098467) == pytest.approx(0.013001, abs=5e-7)
    assert (2 * share(resnet18, 0.01) + 1) / 3 == pytest.approx(0.3421, abs=5e-5)
    counts = {layer.name: round(0.01 * layer.weights) for layer in resnet18.layers[1:]}
    batch = flops.feed_flops(resnet18, 64, counts, dense=("*",)).total
    local = flops.feed_flops(resnet18, 25_000, counts).total
    assert flops.training_flops(resnet18, counts, ("*",)) / (3 * dense) == pytest.approx(0.3421, abs=5e-5)
    assert (local + batch) / training == pytest.approx(0.01403, abs=5e-6)


def forward(counts: dict[str, int]) -> dict[str, int]:
    """2 · kept · output positions of each layer of the small net."""
    return {"conv1": 2 * FIRST * 16, "conv2": 2 * counts["conv2"] * 4, "fc1": 2 * counts["fc1"], "fc2": 2 * counts["fc2"]}


def where(counts: dict[str, int]) -> int:
    """Bytes of an index for each kept weight, or of a bit for every weight."""
    return sum(min(4 * counts[name], -(-size // 8)) for name, size in MASKED.items())


@pytest.mark.parametrize("growth", ["batch", "last_step"])
def test_check_12_a_clients_flops_and_memory_with_the_growth_batch(growth) -> None:
    """Clients of 3, 9 and 8 images in batches of 4: the last batch of two epochs holds 3, 1 and 4, a batch of its own 3, 4 and 4."""
    made = world(stored(*drawn([3, 9, 8])), training=LocalTraining(batch=4, epochs=2, momentum=0.9))
    before = masked(made.setting)
    method = FedTiny(density=0.6, adjust_every=1, stop_round=8, pretrain_epochs=0, selection="none", growth=growth)
    made.fleet.open(1)
    method.round(made.setting, before, made.fleet, 1)
    moves, counts = made.seen[0].work.moves, kept(before.shared)
    sparse, dense = forward(counts), forward(MASKED)
    assert list(moves) == ["fc2"]
    outside = sum(sparse.values()) - sparse["fc2"]
    for k, (n, own, last) in enumerate([(3, 3, 3), (9, 4, 1), (8, 4, 4)]):  # images: all, of the growth batch, of the last step
        local = 2 * n * 3 * sum(sparse.values())
        grown = 2 * sum(sparse.values()) + outside + dense["fc2"]
        expected = local + own * grown if growth == "batch" else local + last * (grown - 3 * sum(sparse.values()))
        bill = made.fleet.account.bills[k]
        assert bill.train_flops == expected
        assert bill.dense_flops == 2 * n * 3 * sum(dense.values())
        ones = sum(counts.values()) + FIRST
        fixed = 4 * (ones + FREE + STATISTICS) + where(counts) + 2 * 4 * (ones + FREE)  # weights, positions; gradients and a momentum
        model_profile = made.fleet.account.model_profile
        activations = min(n, 4) * model_profile.activations + model_profile.vectors
        assert bill.model_memory == fixed + 4 * MASKED["fc2"] + 8 * moves["fc2"]
        assert bill.memory == bill.model_memory + activations


def test_the_server_pays_for_pretraining_in_round_0() -> None:
    made, public = world(stored(*drawn([20, 45]))), stored(*drawn([9], seed=5)[:2])
    method, rows = FedTiny(density=0.4, selection="none", pretrain_epochs=3), []
    state = verbs.init(method, made.setting, public)
    for r in range(2):
        made.fleet.open(r)
        state, found = verbs.round(method, made.setting, state, made.fleet, r)
        rows.append(found["server_flops"])
    assert rows == [3 * 9 * 3 * sum(forward(MASKED).values()), 0]


@pytest.mark.parametrize(("selection", "passes"), [("bn", 10 + 1), ("vanilla", 1)])
def test_selection_costs_its_forward_passes_and_holds_the_pool_sparse(selection, passes) -> None:
    made = world(stored(*drawn([20, 45])), training=LocalTraining(batch=4, epochs=2))
    method = FedTiny(density=0.4, pool=3, pretrain_epochs=0, probe_share=0.2, selection=selection)
    method.round(made.setting, method.init(made.setting, None), made.fleet, 0)
    pool = [kept(seen.shared) for seen in made.seen if type(seen.work).__name__ == "Loss"]
    sparse = [sum(forward(counts).values()) for counts in pool]
    beside = sum(4 * sum(counts.values()) + where(counts) for counts in pool)
    for k, images in ((0, 4), (1, 9)):
        bill = made.fleet.account.bills[k]
        assert bill.train_flops == passes * images * sum(sparse)
        assert bill.samples == 0
    expanded = [4 * (sum(counts.values()) + FIRST + FREE + STATISTICS) + where(counts) for counts in pool]
    assert made.fleet.account.bills[0].memory == max(expanded) + beside


# ---- bytes alive


def counted(net: Net, tree: Tree, batch: Batch, layers: Sequence[str], clients: int = 1) -> list[tuple[str, dict[int, int]]]:
    """For every tap: its layer, and by size how many tensors as large as a tapped layer's gradients are alive beyond the forward pass's."""
    sizes = {layer: 4 * clients * tree[f"mask/{layer}.weight"].numel() for layer in layers}
    before, seen = dict.fromkeys(sizes.values(), 0), []

    def loss(logits: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
        before.update({size: alive.of_size(size) for size in before})
        return F.cross_entropy(logits, y)

    def tap(layer: str, g: Tensor) -> Tree:
        seen.append((layer, {size: alive.of_size(size) - count for size, count in before.items()}))
        index, value = masks.largest(g, tree[f"mask/{layer}.weight"], 3)
        return {f"top/index/{layer}": index, f"top/value/{layer}": value}

    def one(w: Tree, x: Tensor, y: Tensor) -> Tree:
        return net.gradient(tree | w, Batch(x, y, None, batch.t, batch.T), None, loss=loss, tap=tap, layers=layers)[3]

    w = under(tree, "w/")
    with Alive(*tree.values(), batch.x, batch.y) as alive:
        if clients == 1:
            one(w, batch.x, batch.y)
        else:
            rows = [value.expand(clients, *value.shape).clone() for value in w.values()]
            x, y = (value.expand(clients, *value.shape).clone() for value in (batch.x, batch.y))
            vmap(one)(dict(zip(w, rows, strict=True)), x, y)
    return seen[len(layers) :]  # the first look is at zeros, to learn what a tap gives


def pruned(net: Net, density: float = 0.1) -> Tree:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"mask/{layer}.weight": net.initial[f"w/{layer}.weight"].shape for layer in net.maskable}
    held = {key: torch.rand(shape, generator=generator) < density for key, shape in shapes.items()}
    return masks.apply(net.initial, held) | held


def images(count: int, shape: tuple[int, int, int], classes: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, classes, (count,), generator=generator)
    return Batch(torch.randn(count, *shape, generator=generator), y, None, torch.tensor(0), torch.tensor(1))


@pytest.mark.parametrize("clients", [1, 3])
def test_check_16_no_two_dense_gradients_are_alive_together(clients) -> None:
    """One client, and three at once under `vmap`; 5 images, so that no activation is as large as a weight."""
    net = Net(models.build(settings.ModelSettings("resnet8", width=4), (1, 4, 4), 3, 0))
    looks = counted(net if clients == 1 else net.under_vmap(), pruned(net, 0.3), images(5, (1, 4, 4), 3), net.maskable, clients)
    assert [layer for layer, _ in looks] == list(net.maskable)[::-1]
    for layer, more in looks:
        mine = 4 * clients * net.sizes[layer]
        assert more == {size: int(size == mine) for size in more}


@pytest.fixture(scope="module")
def resnet20() -> Net:
    return Net(models.build(settings.ModelSettings("resnet20"), (3, 32, 32), 10, 0))


def moves_of(net: Net, tree: Tree, layers: Sequence[str], alpha: float = 0.15) -> dict[str, int]:
    counts = kept(tree)
    return {layer: mask_adjustment.moves(counts[layer], net.sizes[layer], alpha, 10, 100) for layer in layers}


def peak_of_probe(net: Net, tree: Tree, batch: Batch, moves: dict[str, int], chunk: int) -> int:
    def tap(layer: str, g: Tensor) -> Tree:
        index, value = masks.largest(g, tree[f"mask/{layer}.weight"], moves[layer], chunk)
        return {f"top/index/{layer}": index, f"top/value/{layer}": value}

    with Alive(*tree.values(), batch.x, batch.y) as alive:
        net.gradient(tree, batch, None, tap=tap, layers=tuple(moves))
    return alive.peak


def peak_of_backward(net: Net, tree: Tree, batch: Batch, layers: Sequence[str]) -> int:
    """The same pass for a net whose layers have weights to be differentiated, gone back as far, without forming their gradients."""
    leaf = f"w/{layers[0]}.bias" if layers[0] == "fc" else f"w/{layers[0].replace('conv', 'norm')}.bias"
    with Alive(*tree.values(), batch.x, batch.y) as alive, torch.enable_grad():
        weights = net.effective(tree)
        leaves = {key: weights[key].detach().requires_grad_() for key in (leaf, *(f"w/{layer}.weight" for layer in layers))}
        with net.with_values(weights | leaves, tree, True, None):
            loss = F.cross_entropy(net.module(batch.x), batch.y)
        torch.autograd.grad(loss, leaves[leaf])
    return alive.peak


CHUNK = 512  # smaller than in use, so that what it takes does not hide a second gradient


def test_check_16_a_probe_needs_its_buffers_and_one_gradient_more_than_the_backward_pass(resnet20) -> None:
    """Each of the five blocks of a resnet20, and all layers at once.

    The bound: 40 bytes an entry of the buffers (8 it has; a float64 zero each for index and value behind it; two more that come
    back), the largest layer's gradient, its mask's complement at a byte a weight, and 48 bytes a position of a chunk. Two
    images are so few that the peak lies where the widest layers are tapped.
    """
    tree, batch = pruned(resnet20), images(2, (3, 32, 32), 10)
    for layers in (*mask_adjustment.groups(resnet20.maskable, 5), list(resnet20.maskable)):
        moves = moves_of(resnet20, tree, layers, alpha=0.02)  # few, so that the bound has no room for a second gradient
        more = peak_of_probe(resnet20, tree, batch, moves, CHUNK) - peak_of_backward(resnet20, tree, batch, layers)
        largest = max(resnet20.sizes[layer] for layer in layers)
        bound = 40 * sum(moves.values()) + 5 * largest + 48 * (max(CHUNK, largest // 64) + max(moves.values()))
        assert more <= bound
    assert bound < 4 * sum(resnet20.sizes.values())  # the dense gradient of the whole model would not fit


@pytest.fixture(scope="module")
def parts() -> Experiment:
    """Two clients."""
    table = {"data": {"name": "fake", "channels": 3, "image_size": 32, "classes": 10, "train_images": 20, "test_images": 10}}
    table |= {"partition": {"name": "iid", "clients": 2, "test": "global"}, "model": {"name": "resnet20"}}
    table |= {"train": {"batch": 5, "steps": 1, "lr": 0.05}, "execution": {"device": "cpu"}}
    return build_experiment(check(table | {"method": {"name": "fedtiny", "density": 0.1}}))


def peak_of_visit(parts: Experiment, work: Work, shared: Tree, engine: str) -> int:
    order = WorkOrder(work, parts.setting.net, shared, 1, 20)
    pack = Pack([0, 1], {}, [None, None], [[0, 0], *([i, i] for i in range(len(work.feeds)))])
    forget()  # programs of other works, which are kept as long as there is room
    with torch.no_grad(), Alive(*shared.values()) as alive:
        ENGINES[engine].carry_out(order, pack, parts.site)
    return alive.peak


@pytest.mark.parametrize("engine", ["packed", *(pytest.param(engine, marks=pytest.mark.full) for engine in ("serial", "cuda_graph"))])
def test_check_16_an_adjusting_round_needs_its_buffers_and_one_gradient_more_than_a_plain_one(parts, engine) -> None:
    """A whole visit of a resnet20, with the chunk in use: 8 bytes an entry and 4 a weight, of each client that is trained at once."""
    net, at_once = parts.setting.net, 1 if engine == "serial" else 2
    shared = pruned(net)
    peak_of_visit(parts, Train.at(parts.setting, 1), shared, engine)  # what is made once and kept
    plain = peak_of_visit(parts, Train.at(parts.setting, 1), shared, engine)
    for layers in mask_adjustment.groups(net.maskable, 5):
        moves = moves_of(net, shared, layers)
        adjusting = peak_of_visit(parts, TrainAndScore.growing(parts.setting, 1, moves), shared, engine)
        assert adjusting - plain <= at_once * (8 * sum(moves.values()) + 4 * max(net.sizes[layer] for layer in layers))
