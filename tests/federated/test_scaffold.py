"""SCAFFOLD against rounds redone by hand in plain torch; and both aggregations where masks move and networks are cut."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from aggregation_by_hand import begun, having, hiding, mean_of, played, shares_of, visit, weights
from gated_federation import SGD, gated, near, same
from small_federation import FLEETS, World, masked
from torch import Tensor

from fedsim.core import masks
from fedsim.core.keys import COUNT, FEDNOVA_MOVE, SCAFFOLD_CHANGE, SCAFFOLD_CONTROL, SCAFFOLD_OWN
from fedsim.core.tree import Tree, clone, renamed, under, zeros
from fedsim.errors import ClientFault
from fedsim.federated.aggregation import FedAvg, FedNova, Scaffold
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Train
from fedsim.methods.dwfnp import DWFNP
from fedsim.methods.fedtiny import FedTiny
from fedsim.methods.structured import Structured
from fedsim.pruning.extrusion import ExtrudeAndProbe, beta, marked, norm_of
from fedsim.pruning.gated_training import TrainGated

# ---- SCAFFOLD


class ByHand:
    """Controls of the server and of all clients, and what a round makes of them. Where a weight is pruned, all of them are 0 at once."""

    def __init__(self, made: World, shared: Tree) -> None:
        self.made, self.c = made, zeros(under(shared, "w/"))
        self.own = {k: zeros(under(shared, "w/")) for k in range(made.setting.clients)}

    def round(self, shared: Tree, r: int) -> Tree:
        hidden, cohort = hiding(shared), self.made.fleet.pick(self.made.setting.cohort, r)
        c = {key: value * hidden[key] for key, value in self.c.items()}
        self.own = {k: {key: value * hidden[key] for key, value in own.items()} for k, own in self.own.items()}
        ends, changes = [], zeros(c)
        for k in cohort:
            own = self.own[k]
            end, steps = visit(self.made, shared, k, r, {key: c[key] - own[key] for key in c})
            way = steps * self.made.setting.train.at(r).lr
            self.own[k] = {key: own[key] - c[key] + (shared[key] - end[key]) / way for key in c}
            changes = {key: changes[key] + self.own[k][key] - own[key] for key in c}
            ends.append(end)
        self.c = {key: c[key] + changes[key] / self.made.setting.clients for key in c}
        return mean_of(ends, shares_of([self.made.population.size(k) for k in cohort]))


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize(("rho", "hidden"), [(0.9, False), (0.0, False), (0.9, True)])
def test_scaffold_of_partial_cohorts_is_the_one_by_hand(kind, rho, hidden) -> None:
    """Rates fall from round to round; after the second round some masks move, and weights are pruned and kept again within two rounds."""
    made = having(Scaffold(9.9), kind, momentum=rho)  # the round's rate counts
    state = begun(made, hidden)
    hand = ByHand(made, state.shared)
    for r in range(1, 10 if hidden else 6):
        if r >= 3 and hidden:
            other = masked(made.setting, seed=r % 3).shared
            moved = {key: mask for key, mask in under(other, "mask/").items() if key != "mask/fc2.weight"}
            state = replace(state, shared=masks.apply(state.shared, moved) | moved)
        expected = hand.round(state.shared, r)
        state = played(made, state, r)
        near(weights(state.shared), expected, 1e-9)
        near(renamed(state.memory, SCAFFOLD_CONTROL, "w/"), hand.c, 1e-9)
        near(hand.c, mean_of(list(hand.own.values()), [1 / len(hand.own)] * len(hand.own)), 1e-9)
        for k in made.seen[-1].clients:
            near(renamed(made.fleet.kept[k], SCAFFOLD_OWN, "w/"), hand.own[k], 1e-9)
    assert 1 < len(made.fleet.kept) == len({k for seen in made.seen for k in seen.clients})
    assert len({tuple(seen.clients) for seen in made.seen}) > 2


@pytest.mark.parametrize("kind", FLEETS)
def test_the_first_round_of_scaffold_is_fedavg_and_the_second_is_not(kind) -> None:
    made, plain = having(Scaffold(0.1), kind, cohort=4), having(FedAvg(), kind, cohort=4)
    first, same_first = (played(one, begun(one), 1) for one in (made, plain))
    assert same(first.shared, same_first.shared)
    second, other = played(made, first, 2), played(plain, AveragedState(first.shared, {}), 2)
    assert not torch.allclose(second.shared["w/fc1.weight"], other.shared["w/fc1.weight"], atol=1e-4)


@pytest.mark.parametrize("kind", FLEETS)
def test_one_client_of_one_is_the_server(kind) -> None:
    """c = c_k after each round, so that nothing is corrected, and training is FedAvg's."""
    made, plain = having(Scaffold(0.1), kind, [11], 1), having(FedAvg(), kind, [11], 1)
    state, other = begun(made), begun(plain)
    for r in (1, 2, 3):
        state, other = played(made, state, r), played(plain, other, r)
        near(renamed(state.memory, SCAFFOLD_CONTROL, SCAFFOLD_OWN), made.fleet.kept[0], 1e-12)
        assert any(bool((value != 0).any()) for value in state.memory.values())
    near(state.shared, other.shared, 1e-9)


def test_controls_are_of_parameters_alone() -> None:
    made = having(Scaffold(0.1))
    state = played(made, begun(made), 1)
    names = {key[2:] for key in under(made.setting.net.initial, "w/")}
    assert {key.removeprefix(SCAFFOLD_CONTROL) for key in state.memory} == names
    assert {key.removeprefix(SCAFFOLD_OWN) for held in made.fleet.kept.values() for key in held} == names
    assert {key for key in made.seen[0].reply.total if key.startswith("opt/")} == {SCAFFOLD_CHANGE + name for name in names}
    assert not under(state.shared, "opt/")


@pytest.mark.parametrize("kind", FLEETS)
def test_at_a_rate_of_0_nothing_is_learned(kind) -> None:
    made = having(Scaffold(0.1), kind)
    state = played(made, begun(made), 1)
    before = {k: clone(tree) for k, tree in made.fleet.kept.items()}
    made.setting = replace(made.setting, train=replace(made.setting.train, lr=0.0))
    after = played(made, state, 1)
    near(under(after.shared, "w/"), under(state.shared, "w/"), 1e-9)
    assert same(after.memory, state.memory)
    assert all(same(made.fleet.kept[k], tree) for k, tree in before.items())


def test_a_broadcast_without_controls_is_reported() -> None:
    made = having(Scaffold(0.1))
    with pytest.raises(ClientFault, match=re.escape("no control variates for SCAFFOLD: send aggregate.shared(memory, shared)")):
        made.fleet.run(Train.at(made.setting, 1), [0], made.setting.net.initial)


# ---- every Work that trains


def controlled(made: World, shared: Tree) -> Tree:
    """Random controls: c in the broadcast that is returned, c_k at client 0."""
    generator = torch.Generator().manual_seed(5)
    drawn_ones = [
        {key: torch.randn(value.shape, generator=generator).to(value) for key, value in under(shared, "w/").items()} for _ in "ck"
    ]
    made.fleet.kept[0] = renamed(drawn_ones[1], "w/", SCAFFOLD_OWN)
    return made.setting.aggregate.shared(renamed(drawn_ones[0], "w/", SCAFFOLD_CONTROL), shared)


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("work", ["plain", "extruding", "gated", "narrow"])
def test_a_step_is_followed_by_the_correction_at_the_rounds_rate(kind, work) -> None:
    """After a single step the weights differ from FedAvg's by lr (c - c_k) of what is kept: at the same point the gradient is the same."""
    lr, ends = 0.01, []
    feed = replace(SGD, steps=1).feed()
    for aggregate in (FedAvg(), Scaffold(lr)):
        if work in ("gated", "narrow"):
            made = gated((9,), kind=kind, dtype=torch.float32 if work == "narrow" else torch.float64)
        else:
            made = having(aggregate, kind, [9], 1)
        made.setting = replace(made.setting, aggregate=aggregate)
        shared = made.setting.net.initial if work in ("gated", "narrow") else masked(made.setting).shared
        sent = controlled(made, shared)
        common = (feed,), lr, 0.9, 1e-3, aggregate
        gate = {"gate/channels": torch.arange(28)[None] % 3 > 0} if work in ("gated", "narrow") else {}
        order: Any = {"plain": Train, "gated": TrainGated, "narrow": TrainGated}.get(work, ExtrudeAndProbe)(*common)
        if work == "extruding":
            order = replace(order, marks={"fc1": 60}, lr0=0.5)
            assert beta(norm_of(shared, marked(shared, order.marks)), 0, 1, 0.5) > 3 * lr  # its own rate
        made.fleet.open(1)
        reply = made.fleet.run(order, [0], sent, gate)
        ends.append({key: value / reply.total[COUNT] for key, value in under(reply.total, "w/", "opt/momentum/").items()})
        own = made.fleet.kept[0]
    drift = {key: (sent[SCAFFOLD_CONTROL + key[2:]] - masked_own(own, reply, key)) for key in under(shared, "w/")}
    for key, hidden in hiding(shared).items():
        expected = ends[0][key] - lr * drift[key].double() * hidden
        assert torch.allclose(ends[1][key], expected, atol=1e-9 if work != "narrow" else 1e-6), key
    for key in under(ends[0], "opt/"):
        assert torch.equal(ends[0][key], ends[1][key])  # outside of the momentum
    assert set(under(reply.total, "opt/")) - set(under(ends[0], "opt/")) == {SCAFFOLD_CHANGE + key[2:] for key in under(shared, "w/")}


def masked_own(later: Tree, reply: Any, key: str) -> Tensor:
    """c_k before the visit: what it is now, less what was reported as its change."""
    return later[SCAFFOLD_OWN + key[2:]] - reply.total[SCAFFOLD_CHANGE + key[2:]]


# ---- masks that move, networks that are cut


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("aggregate", [FedNova(0.9), Scaffold(0.1)])
def test_where_masks_move_pruned_weights_and_their_controls_are_exactly_0(kind, aggregate) -> None:
    made = having(aggregate, kind)
    method = FedTiny(density=0.6, adjust_every=1, stop_round=8, pretrain_epochs=0, selection="none", adjust_fraction=0.4, blocks="all")
    state, found = made.play(method, 6)
    assert all(row["weights_swapped"] > 0 for row in found[1:])
    stale = forgotten = 0
    for seen, later in zip(made.seen, [*made.seen[1:], None], strict=True):
        for key, mask in under(seen.shared, "mask/").items():
            name = key[5:]
            gone = [
                tree[slot + name]
                for tree in (seen.shared, seen.reply.total)
                for slot in ("w/", SCAFFOLD_CONTROL, SCAFFOLD_CHANGE, FEDNOVA_MOVE)
                if slot + name in tree
            ]
            assert len(gone) == (4 if isinstance(aggregate, Scaffold) else 2)
            assert all(bool((value[~mask] == 0).all()) for value in gone)
            if later and isinstance(aggregate, Scaffold):
                grown = later.shared["mask/" + name] & ~mask
                forgotten += int(grown.sum())
                assert (later.shared[SCAFFOLD_CONTROL + name][grown] == 0).all()
    for key, mask in under(made.seen[-1].shared, "mask/").items() if isinstance(aggregate, Scaffold) else ():
        for k, held in made.fleet.kept.items():
            gone = held[SCAFFOLD_OWN + key[5:]][~mask]
            stale += int((gone != 0).sum())
            assert k not in made.seen[-1].clients or bool((gone == 0).all())
    assert (stale > 0) == (forgotten > 0) == isinstance(aggregate, Scaffold)
    for key, mask in under(state.shared, "mask/").items():
        assert (state.shared["w/" + key[5:]][~mask] == 0).all()


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("aggregate", [FedAvg(), FedNova(0.9), Scaffold(0.1)])
def test_what_a_broadcast_holds_at_pruned_positions_counts_for_nothing(kind, aggregate) -> None:
    ends = []
    for full in (False, True):
        made = having(aggregate, kind)
        state = begun(made, hidden=True)
        if full:
            state = replace(state, shared=state.shared | {"w/fc1.weight": state.shared["w/fc1.weight"] + ~state.shared["mask/fc1.weight"]})
        for r in (1, 2):
            state = played(made, state, r)
        ends.append(state.shared | state.memory)
    assert same(*ends)


@pytest.mark.parametrize("kind", FLEETS)
def test_controls_begin_at_0_again_after_a_cut(kind) -> None:
    """The cut ends round 3. Of five clients some come back with controls of the larger network, some come for the first time."""
    made = gated((12, 9, 10, 7, 8), kind=kind, rounds=8, cohort=2)
    made.setting = replace(made.setting, aggregate=Scaffold(9.9))  # the round's rate counts
    method = Structured(flops_share=0.5, cotrain=3)
    state, _ = made.play(method, 3)
    assert all(
        bool((value == 0).all()) and value.shape == state.shared["w/" + key.removeprefix(SCAFFOLD_CONTROL)].shape
        for key, value in state.memory.items()
    )
    old = set(made.fleet.kept)
    for r in (4, 5):
        plain = gated((12, 9, 10, 7, 8), kind=kind, rounds=8, cohort=2)
        plain.fleet.open(r)
        made.fleet.open(r)
        other, _ = method.round(plain.setting, replace(state, memory={}), plain.fleet, r)
        before, (state, found) = state, method.round(made.setting, state, made.fleet, r)
        assert same(other.shared, state.shared) == (r == 4)
        if r == 4:  # two of five clients, averaged alike, took three steps each
            way = {key: 2 / 5 * (value - state.shared[key]) / (3 * found["lr"]) for key, value in under(before.shared, "w/").items()}
            near(renamed(state.memory, SCAFFOLD_CONTROL, "w/"), way, 1e-9)
        assert all(bool((value != 0).any()) for value in state.memory.values())
    after = [k for seen in made.seen[3:] for k in seen.clients]
    assert old & set(after)
    assert set(after) - old
    for k in after:
        assert all(value.shape == state.shared["w/" + key.removeprefix(SCAFFOLD_OWN)].shape for key, value in made.fleet.kept[k].items())
    total = sum(made.fleet.kept[k][SCAFFOLD_OWN + "fc.weight"] for k in set(after)) / 5
    assert torch.allclose(total, state.memory[SCAFFOLD_CONTROL + "fc.weight"], atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        Structured(flops_share=1.0, cotrain=3),
        DWFNP(flops_share=1.0, cotrain=3, warmup=0, hyper_lr=0.0, hyper_interval=1, unseen_clients="accept"),
    ],
)
def test_controls_go_on_where_a_cut_leaves_all_channels(method) -> None:
    made = gated((12, 9, 10, 7, 8), rounds=8, cohort=2)
    made.setting = replace(made.setting, aggregate=Scaffold(9.9))  # the round's rate counts
    state, _ = made.play(method, 6)
    assert all(len(index) == size for index, size in zip(state.kept.values(), made.setting.net.channels.widths, strict=True))
    for key, c in under(state.memory, SCAFFOLD_CONTROL).items():
        own = [held[SCAFFOLD_OWN + key.removeprefix(SCAFFOLD_CONTROL)] for held in made.fleet.kept.values()]
        assert torch.allclose(sum(own) / 5, c, atol=1e-9)


@pytest.mark.full
def test_device_wise_pruning_takes_both() -> None:
    """Clients take equally many steps, so fednova is fedavg; under scaffold fleets agree, gradients narrow or not."""
    ends: dict[Any, Tree] = {}
    for aggregate in (FedAvg(), FedNova(0.9), Scaffold(0.1)):
        for kind in FLEETS:
            made = gated((9, 12, 10), kind=kind, dtype=torch.float32, rounds=6, cohort=2)
            made.setting = replace(made.setting, aggregate=aggregate)
            state, _ = made.play(DWFNP(cotrain=3, warmup=0, hyper_interval=1, unseen_clients="accept"), 5)
            ends[aggregate, kind] = weights(state.shared)
    for kind in FLEETS:
        near(ends[FedNova(0.9), kind], ends[FedAvg(), kind], 1e-4)
        near(ends[Scaffold(0.1), kind], ends[Scaffold(0.1), FLEETS[0]], 1e-4)
        assert not torch.allclose(ends[Scaffold(0.1), kind]["w/fc.weight"], ends[FedAvg(), kind]["w/fc.weight"], atol=1e-3)
