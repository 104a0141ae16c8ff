"""What ADP leaves with its clients: gates or batch norms of their own, under every aggregation, and a model trained for their own use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adp_federation import GATES, SIZES, first_of, having, mean_of, measured, module_of, near, pixels, seen, states, used, visit, weights
from small_federation import FLEETS, World

from fedsim.core import keys
from fedsim.core.keys import FREQUENCY
from fedsim.core.tree import Tree, under
from fedsim.federated.aggregation import FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.client_work import Evaluate
from fedsim.methods.adp import ADP

NORMS = [f"w/norm{i}.{kind}" for i in "12" for kind in ("weight", "bias")]
NORMS += [f"buf/norm{i}.running_{kind}" for i in "12" for kind in ("mean", "var")]
LOCAL = {"gates": (ADP(gates="local", export="none"), GATES), "bn": (ADP(bn="local", export="none"), NORMS)}
LOCAL["both"] = (ADP(gates="local", bn="local", export="none"), GATES + NORMS)
AGGREGATES = {"fedavg": FedAvg(), "fedprox": FedProx(fedprox_mu=0.7), "fednova": FedNova(0.9), "scaffold": Scaffold(0.1)}


def without(tree: Tree, keys: list[str]) -> Tree:
    return {key: value for key, value in tree.items() if key not in keys}


def only(tree: Tree, keys: list[str]) -> Tree:
    return {key: tree[key] for key in keys}


class People:
    """Clients by hand, each with what is its own, and the server that averages the rest."""

    def __init__(self, made: World, aggregate: Any, mine: list[str]) -> None:
        initial = made.setting.net.initial
        self.made, self.aggregate, self.mine = made, aggregate, mine
        self.shared = without(initial, mine)
        self.own = [only(initial, mine) for _ in range(made.setting.clients)]
        zero = {key: torch.zeros_like(value) for key, value in under(self.shared, "w/").items()}
        self.c, self.ck = zero, [zero for _ in self.own]

    def round(self, r: int) -> None:
        cohort, lr = self.made.fleet.pick(self.made.setting.cohort, r), self.made.setting.train.lr
        mu, control = getattr(self.aggregate, "fedprox_mu", 0.0), isinstance(self.aggregate, Scaffold)
        ends, changes, steps = [], [], [2 * -(-SIZES[k] // 4) for k in cohort]
        for k, tau in zip(cohort, steps, strict=True):
            drift = {key: self.c[key] - self.ck[k][key] for key in self.c} if control else None
            end = visit(self.made, self.shared | self.own[k], k, r, mu, self.shared, drift)
            self.own[k] = only(end, self.mine)
            ends.append(without(end, self.mine))
            later = {key: self.ck[k][key] - self.c[key] + (self.shared[key] - end[key]) / (tau * lr) for key in self.c}
            changes.append({key: later[key] - self.ck[k][key] for key in self.c})
            self.ck[k] = later
        self.c = {key: value + sum(change[key] for change in changes) / len(self.own) for key, value in self.c.items()}
        counts = [SIZES[k] for k in cohort]
        self.shared = self.nova(ends, counts, steps) if isinstance(self.aggregate, FedNova) else mean_of(ends, counts)

    def nova(self, ends: list[Tree], counts: list[int], steps: list[int]) -> Tree:
        p = [count / sum(counts) for count in counts]
        a = [(tau - 0.9 * (1 - 0.9**tau) / 0.1) / 0.1 for tau in steps]
        length, found = sum(share * path for share, path in zip(p, a, strict=True)), mean_of(ends, counts)
        for key, before in under(self.shared, "w/").items():
            moves = sum(share * (before - end[key]) / path for share, end, path in zip(p, ends, a, strict=True))
            found[key] = before - length * moves
        return found


@pytest.mark.parametrize(("local", "kind"), [*((local, FLEETS[0]) for local in LOCAL), ("both", FLEETS[1])])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_what_is_local_never_travels_and_goes_on_from_where_it_was(aggregate, local, kind) -> None:
    """In partial cohorts, whose clients come back after rounds without them."""
    (method, mine), rule, rounds = LOCAL[local], AGGREGATES[aggregate], 3 if kind is FLEETS[0] else 2
    made = having(aggregate=rule, kind=kind, rounds=rounds, cohort=3)
    people, found = People(made, rule, mine), states(made, method)[0]
    for r in range(1, rounds + 1):
        people.round(r)
        near(without(found[r].shared, mine), people.shared, 2e-6)
        near(only(found[r].shared, mine), only(made.setting.net.initial, mine), 0)  # the server's own never move
    for order in made.seen:
        for sent in (order.shared, order.reply.total):
            names = {key.split("/")[-1] for key in mine}
            assert not [key for key in sent if key.split("/")[-1] in names], "travels"
    for k in range(4):
        held = used(made, method, found[-1], k)
        near(weights(held), people.shared | people.own[k], 2e-6)


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_ledger_charges_what_travels_alone(aggregate, local) -> None:
    method, mine = LOCAL[local]
    made = having(aggregate=AGGREGATES[aggregate], rounds=1)
    states(made, method)
    initial = made.setting.net.initial
    entries = 4 * sum(value.numel() for value in without(initial, mine).values())
    control = 4 * sum(value.numel() for value in under(without(initial, mine), "w/").values()) if aggregate == "scaffold" else 0
    steps = 4 if aggregate == "fednova" else 0
    bills = made.fleet.account.bills.values()
    assert {bill.bytes_down for bill in bills} == {entries + control}
    assert {bill.bytes_up for bill in bills} == {entries + control + steps}


@pytest.mark.parametrize("local", LOCAL)
def test_frequencies_are_those_of_the_client_s_own_network(local) -> None:
    method, _ = LOCAL[local]
    method = replace(method, export="client")
    made = having(rounds=2, cohort=3)
    state = states(made, method)[0][-1]
    for k in range(4):
        model = used(made, method, state, k)
        f, g = measured(weights(model), pixels(made, k))
        assert torch.equal(made.fleet.kept[k][FREQUENCY], f.float())
        assert torch.equal(model[keys.GATE], first_of(f, g))


def test_the_shifts_that_stand_for_norms_stay_with_them() -> None:
    """Under gate_place = "affine" a norm's shift is a layer of its own."""
    made = having(module=module_of(gate_place="affine"), rounds=1)
    states(made, ADP(bn="local", export="none"))
    assert not [key for key in made.seen[0].shared if "norm" in key]


# ---- trained for its own use


@pytest.mark.parametrize(("aggregate", "kind"), [*((aggregate, FLEETS[0]) for aggregate in AGGREGATES), ("fedprox", FLEETS[1])])
def test_a_client_s_own_training_is_plain_sgd_from_the_new_model_which_stays_as_it_was(aggregate, kind) -> None:
    """It leaves out what the aggregation adds: nobody averages this."""
    method, rule = ADP(personalise=2), AGGREGATES[aggregate]
    made, other = (having(aggregate=rule, kind=kind, cohort=2) for _ in range(2))
    state, plain = states(made, method)[0][-1], states(other, ADP())[0][-1]
    near(state.shared, plain.shared, 0)
    assert state.memory.keys() == plain.memory.keys()
    trained = made.fleet.pick(2, 2)
    for k in range(4):
        own = visit(made, state.shared, k, 2, epochs=2, call=int(k in trained))
        model = used(made, method, state, k)
        near(weights(model), own)
        f, g = measured(own, pixels(made, k))
        assert torch.equal(made.fleet.kept[k][FREQUENCY], f.float())
        assert torch.equal(model[keys.GATE], first_of(f, g))
        near(weights(used(made, method.variants()["gated"], state, k)), weights(state.shared), 0)
        near(weights(used(made, method.variants()["personal"], state, k)), own)


def test_gates_of_its_own_are_trained_on_for_its_own_use() -> None:
    method = ADP(gates="local", personalise=1)
    made = having(rounds=1)
    state = states(made, method)[0][-1]
    for k in range(4):
        first = visit(made, made.setting.net.initial, k, 1)
        own = visit(made, state.shared | only(first, GATES), k, 1, epochs=1, call=1)
        near(weights(used(made, method, state, k)), own)
        near(only(used(made, method.variants()["gated"], state, k), GATES), only(first, GATES))


@pytest.mark.parametrize("export", ["client", "none"])
def test_accuracy_is_that_of_what_the_client_uses(export) -> None:
    method = ADP(personalise=2, export=export)
    made = having(rounds=2)
    state = states(made, method)[0][-1]
    shared, own, _ = method.deploy(made.setting, state, made.fleet, list(range(4)))
    each = made.fleet.run(Evaluate.of(method, split="global"), range(4), shared, own).each
    test = made.population.test
    x = (test.images(torch.arange(27)).double() / 255 - 0.5) / 0.25
    for k in range(4):
        values = visit(made, state.shared, k, 2, epochs=2, call=1)
        mask = first_of(*measured(values, pixels(made, k))) if export == "client" else None
        right = seen(values, x, mask)[0].argmax(1) == test.labels(torch.arange(27))
        assert int(each["n/correct"][k]) == int(right.sum())


# ---- forms


def test_the_other_forms_of_use_are_those_that_are_not_its_own() -> None:
    assert ADP().variants().keys() == {"gated"}
    assert ADP(export="none").variants() == {}
    assert ADP(export="global").variants().keys() == {"gated"}
    assert ADP(personalise=2).variants().keys() == {"gated", "personal"}
    assert ADP(personalise=2, export="none").variants().keys() == {"gated"}
    folded = ADP(gates="local", align=2, export_gate="folded", personalise=1)
    assert folded.variants() == {
        "gated": replace(folded, export="none", export_gate="live", align=1, personalise=0),
        "personal": replace(folded, export="none", export_gate="live", align=1),
    }
