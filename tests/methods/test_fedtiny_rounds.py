"""FedTiny's training rounds: one of them redone by hand in plain torch, and what must hold in all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil, cos, floor, pi

import pytest
import torch
from small_federation import FLEETS, SLOW, World, batches, drawn, kept, loaded, masked, small, stored, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import models
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalTraining
from fedsim.errors import ClientFault
from fedsim.federated import pretraining
from fedsim.federated.aggregation import FedAvg, FedProx
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Train, TrainAndScore
from fedsim.methods import fedavg
from fedsim.methods.fedtiny import FedTiny
from fedsim.models import settings

ADAM = LocalTraining(batch=4, epochs=2, lr=0.01, decay=1e-3, optimiser="adam")
ALWAYS = FedTiny(density=0.6, adjust_every=1, stop_round=8, pretrain_epochs=0, selection="none")


# ---- a round by hand


def gradient(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def trained(made: World, shared: Tree, k: int, r: int, growth: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """What client `k` holds after its local training, and the dense gradients it looks at."""
    module, hidden = loaded(small(), shared).train(), {key[5:]: mask for key, mask in under(shared, "mask/").items()}
    train = made.setting.train
    optimiser: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), train.lr, train.momentum, weight_decay=train.decay)
    if train.optimiser == "adam":
        optimiser = torch.optim.Adam(module.parameters(), train.lr, weight_decay=train.decay)
    feed = train.feed()
    for x, y in batches(made, feed, k, r, 0):
        dense = {name: g.clone() for name, g in gradient(module, x, y).items()}
        for name, value in module.named_parameters():
            value.grad += getattr(made.setting.aggregate, "fedprox_mu", 0) * (value.detach() - shared["w/" + name])
            value.grad *= hidden.get(name, 1)
        optimiser.step()
    assert all(bool((value[~hidden[name]] == 0).all()) for name, value in module.named_parameters() if name in hidden)
    if growth == "batch":
        statistics = {name: value.clone() for name, value in module.named_buffers()}
        ((x, y),) = batches(made, replace(feed, epochs=0, steps=1), k, r, 1)
        dense = gradient(module, x, y)
        module.load_state_dict(statistics, strict=False)
    return module, dense


def round_by_hand(made: World, shared: Tree, r: int, growth: str, shares: list[float], moves: dict[str, int]) -> tuple[Tree, Tree]:
    """Weights, running statistics and masks after round `r`, and the votes; `shares` of the clients in a vote."""
    visits = [trained(made, shared, k, r, growth) for k in range(made.setting.clients)]
    n = [made.population.size(k) for k in range(made.setting.clients)]
    states = [module.state_dict() for module, _ in visits]
    after = {key: sum(a * s[key.partition("/")[2]] for a, s in zip(n, states, strict=True)) / sum(n) for key in under(shared, "w/", "buf/")}
    after |= {key: mask.clone() for key, mask in under(shared, "mask/").items()}
    votes = {}
    for layer, k in moves.items():
        name = f"{layer}.weight"
        mask, w = after["mask/" + name].flatten(), after["w/" + name].flatten()
        score = [0.0] * w.numel()
        for (_, dense), share in zip(visits, shares, strict=True):
            g = dense[name].flatten().tolist()
            for i in sorted((i for i in range(len(g)) if not mask[i]), key=lambda i: (-abs(g[i]), i))[:k]:
                score[i] += share * g[i]
        grow = sorted((i for i in range(len(score)) if score[i] != 0), key=lambda i: (-abs(score[i]), i))[:k]
        drop = sorted((i for i in range(len(score)) if mask[i]), key=lambda i: (abs(float(w[i])), i))[: len(grow)]
        for i, stays in [(i, True) for i in grow] + [(i, False) for i in drop]:
            mask[i], w[i] = stays, 0.0
        votes[layer] = torch.tensor(score)
    return after, votes


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("aggregate", [FedAvg(), FedProx(fedprox_mu=0.5)])
@pytest.mark.parametrize(("growth", "uniform", "training"), [("batch", False, SLOW), ("batch", True, ADAM), ("last_step", False, SLOW)])
def test_a_round_of_two_clients_is_the_one_by_hand(kind, aggregate, growth, uniform, training) -> None:
    """Clients of 5 and 11 images, batches of 4, two epochs of SGD with momentum and decay or of Adam, every layer adjusted."""
    made = world(stored(*drawn([5, 11])), kind=kind, training=training)
    made.setting = replace(made.setting, aggregate=aggregate)
    before, r = masked(made.setting), 2
    method = replace(ALWAYS, blocks="all", growth=growth, uniform=uniform)
    moves = {name: floor(0.15 * (1 + cos(pi * r / 8)) * count) for name, count in kept(before.shared).items()}
    made.fleet.open(r)
    state, found = method.round(made.setting, before, made.fleet, r)
    shares = [0.5, 0.5] if uniform else [5 / 16, 11 / 16]
    expected, votes = round_by_hand(made, before.shared, r, growth, shares, moves)
    assert min(moves.values()) >= 2
    assert found["weights_swapped"] == sum(moves.values())
    assert state.shared.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith("mask/"):
            assert torch.equal(state.shared[key], value), key
        else:
            assert torch.allclose(state.shared[key], value, atol=1e-7), key
    each = made.seen[0].reply.each
    for layer, k in moves.items():
        assert each[f"top/index/{layer}"].shape == each[f"top/value/{layer}"].shape == (2, k)
        found_votes = torch.zeros(len(votes[layer]))
        for index, value, share in zip(each[f"top/index/{layer}"], each[f"top/value/{layer}"], shares, strict=True):
            found_votes[index.long()] += share * value
        assert torch.allclose(found_votes, votes[layer], atol=1e-5)


def test_the_probe_changes_nothing_that_is_trained() -> None:
    """Weights and running statistics before the swap are those of a plain round."""
    totals = []
    for method in (ALWAYS, replace(ALWAYS, growth="last_step"), replace(ALWAYS, stop_round=0)):
        made = world(stored(*drawn([5, 11])))
        made.fleet.open(2)
        method.round(made.setting, masked(made.setting), made.fleet, 2)
        totals.append(made.seen[0].reply.total)
    for other in totals[1:]:
        assert other.keys() == totals[0].keys()
        assert all(torch.equal(value, other[key]) for key, value in totals[0].items())


@pytest.mark.parametrize("last_step", [False, True])
def test_where_nothing_moves_a_probing_round_is_a_plain_one(last_step) -> None:
    made = world(stored(*drawn([5, 11])))
    shared = masked(made.setting).shared
    for work in (Train.at(made.setting, 2), TrainAndScore.growing(made.setting, 2, {"fc1": 0}, last_step)):
        made.fleet.open(2)
        made.fleet.run(work, [0, 1], shared)
    plain, probing = (seen.reply for seen in made.seen)
    assert all(torch.equal(value, probing.total[key]) for key, value in plain.total.items())
    assert list(probing.each) == ["n/images"]


@pytest.mark.parametrize("moves", [{"conv9": 1}, {"fc2": 10_000}])
def test_moves_that_cannot_be_are_named(moves) -> None:
    made = world(stored(*drawn([5, 11])))
    with pytest.raises(ClientFault, match=f"moves of layer '{next(iter(moves))}'; there can be 1 to its pruned weights, of layers conv2"):
        made.fleet.run(TrainAndScore.growing(made.setting, 2, moves), [0, 1], masked(made.setting).shared)


# ---- many rounds


def toy() -> nn.Module:
    """A resnet8: seven masked layers in five blocks of 2, 2, 1, 1 and 1."""
    return models.build(settings.ModelSettings("resnet8", width=4), (1, 4, 4), 3, 0)


BLOCKS = [["layer1.0.conv1", "layer1.0.conv2"], ["layer2.0.conv1", "layer2.0.conv2"], ["layer3.0.conv1"], ["layer3.0.conv2"], ["fc"]]


def test_check_10_invariants_of_25_rounds() -> None:
    made = world(stored(*drawn([6, 9, 12, 5])), toy(), training=LocalTraining(batch=6, lr=0.2, momentum=0.9, decay=1e-3), cohort=3)
    method = FedTiny(density=0.3, pool=3, adjust_every=2, stop_round=60, pretrain_epochs=0)
    state, found = made.play(method, 25)
    whole, first = sum(made.setting.net.sizes.values()), next(iter(made.setting.net.sizes))
    sent = [seen.shared for seen in made.seen if seen.r > 0] + [state.shared]
    assert len(sent) == 26
    counts, adjusted = kept(sent[0]), []
    for r, (before, after) in enumerate(pairwise(sent), start=1):
        assert kept(after) == counts
        assert (sum(counts.values()) + made.setting.net.sizes[first]) / whole <= 0.3
        assert f"mask/{first}.weight" not in after  # dense: no mask is a mask of ones
        assert bool((after[f"w/{first}.weight"] != 0).all())
        grown = 0
        for key, mask in under(after, "mask/").items():
            w, held = after["w/" + key[5:]], before[key]
            assert bool((w[~mask] == 0).all())
            assert bool((w[mask & ~held] == 0).all())
            assert int((mask & ~held).sum()) == int((held & ~mask).sum())
            grown += int((mask & ~held).sum())
        assert found[r]["weights_swapped"] == grown  # none that left came back, or fewer positions would have changed
        adjusted.append(grown)
    assert [r for r, count in enumerate(adjusted, start=1) if count] == list(range(2, 25, 2))


def test_check_11_blocks_from_the_output_to_the_input_and_round_again() -> None:
    made = world(stored(*drawn([8, 8])), toy(), training=LocalTraining(batch=8, lr=0.1))
    state, found = made.play(replace(ALWAYS, stop_round=100), 7, state=masked(made.setting))
    assert [told["adjusted_block"] for told in found] == [5, 4, 3, 2, 1, 5, 4]
    sent = [seen.shared for seen in made.seen] + [state.shared]
    for block, before, after in zip([5, 4, 3, 2, 1, 5, 4], sent[:-1], sent[1:], strict=True):
        changed = [key[5:].removesuffix(".weight") for key in under(after, "mask/") if not torch.equal(before[key], after[key])]
        assert changed == BLOCKS[block - 1]


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"order": "forward"}, [BLOCKS[i] for i in (0, 1, 2, 3, 4, 0, 1)]),
        ({"blocks": "layer"}, [[name] for block in BLOCKS for name in block][::-1]),
        ({"blocks": "all"}, [[name for block in BLOCKS for name in block]] * 3),
        ({"blocks": "stages"}, [[*BLOCKS[2], *BLOCKS[3], *BLOCKS[4]], BLOCKS[1], BLOCKS[0], [*BLOCKS[2], *BLOCKS[3], *BLOCKS[4]]]),
        ({"blocks": 2, "order": "forward"}, [[*BLOCKS[0], *BLOCKS[1]], [*BLOCKS[2], *BLOCKS[3], *BLOCKS[4]]]),
        ({"adjust_every": 2}, [[], BLOCKS[4], [], BLOCKS[3], [], BLOCKS[2]]),
        ({"adjust_every": 2, "stop_round": 3}, [[], BLOCKS[4], [], []]),
    ],
)
def test_other_blocks_other_orders_and_other_rounds(fields, blocks) -> None:
    made = world(stored(*drawn([8, 8])), toy(), training=LocalTraining(batch=8, lr=0.1))
    made.play(replace(ALWAYS, **{"stop_round": 100} | fields), len(blocks), state=masked(made.setting))
    assert [list(getattr(seen.work, "moves", {})) for seen in made.seen] == blocks


@pytest.mark.parametrize(("rounding", "rule"), [("floor", floor), ("ceil", ceil)])
def test_the_moves_of_every_layer_follow_its_own_kept_weights(rounding, rule) -> None:
    made = world(stored(*drawn([8, 8])))
    counts = kept(masked(made.setting).shared)
    made.play(replace(ALWAYS, blocks="all", rounding=rounding, stop_round=11, adjust_fraction=0.2), 11, state=masked(made.setting))
    for r, seen in enumerate(made.seen[:10], start=1):
        share = 0.2 * (1 + cos(pi * r / 11))
        assert {name: rule(share * count) for name, count in counts.items() if rule(share * count)} == dict(getattr(seen.work, "moves", {}))
    assert type(made.seen[10].work).__name__ == "Train"


@pytest.mark.parametrize("kind", FLEETS)
def test_check_15_without_selection_and_adjustment_it_is_masked_fedavg(kind) -> None:
    """From candidate 1, which a full sort finds: bit for bit."""
    public = stored(*drawn([9], seed=5)[:2])
    made = world(stored(*drawn([6, 9, 5])), kind=kind, cohort=2)
    state, _ = made.play(FedTiny(density=0.4, selection="none", adjust_every=9), 8, public)
    other = world(stored(*drawn([6, 9, 5])), kind=kind, cohort=2)
    shared = pretraining.pretrained(other.setting, public, 3)
    for name, count in kept(made.seen[0].shared).items():
        order = sorted(range(shared[f"w/{name}.weight"].numel()), key=lambda i: (-abs(float(shared[f"w/{name}.weight"].flatten()[i])), i))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:count]] = True
        shared[f"mask/{name}.weight"] = mask.view(shared[f"w/{name}.weight"].shape)
        shared[f"w/{name}.weight"] = shared[f"w/{name}.weight"] * shared[f"mask/{name}.weight"]
    plain = AveragedState(shared, {})
    for r in range(1, 9):
        other.fleet.open(r)
        plain, _ = fedavg.FedAvg().round(other.setting, plain, other.fleet, r)
    assert plain.shared.keys() == state.shared.keys()
    assert all(torch.equal(value, state.shared[key]) for key, value in plain.shared.items())


def test_check_14_serial_and_packed_fleets_agree() -> None:
    """In float64, so that no score is near another."""
    ends = []
    for kind in FLEETS:
        made = world(stored(*drawn([6, 9, 12, 5])), toy(), kind, LocalTraining(batch=5, epochs=2, lr=0.1))
        ends.append(made.play(FedTiny(density=0.3, pool=3, adjust_every=1, pretrain_epochs=0), 7))
    (serial, told), (packed, other) = ends
    assert [one["weights_swapped"] for one in told[1:]] == [one["weights_swapped"] for one in other[1:]]
    assert told[0]["chosen_candidate"] == other[0]["chosen_candidate"]
    for key, value in serial.shared.items():
        if key.startswith("mask/"):
            assert torch.equal(value, packed.shared[key]), key
        else:
            assert torch.allclose(value, packed.shared[key], atol=1e-6), key
