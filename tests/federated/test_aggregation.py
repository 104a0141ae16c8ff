"""FedNova against rounds redone by hand in plain torch; what all aggregations must hold; what they cost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from aggregation_by_hand import begun, having, mean_of, played, shares_of, visit, weights
from gated_federation import near, same
from small_federation import FLEETS, World, kept

from fedsim.config.job import check
from fedsim.config.method_registry import ALIASES, find
from fedsim.core.keys import COUNT, FEDNOVA_PATH, FEDNOVA_WEIGHT, SCAFFOLD_CONTROL, SCAFFOLD_OWN
from fedsim.core.tree import Tree, under
from fedsim.core.types import LocalOptimizer
from fedsim.costs import communication
from fedsim.errors import BadInput
from fedsim.federated.aggregation import NAMES, FedAvg, FedNova, FedProx, Scaffold
from fedsim.federated.protocol import ClientInput
from fedsim.fleet.cuda_graph import fleet
from fedsim.methods.fedavg import FedAvg as Method

# ---- FedNova


def length(steps: int, rho: float) -> float:
    """How far a constant gradient of 1 moves a weight in so many steps at rate 1."""
    momentum = whole = 0.0
    for _ in range(steps):
        momentum = rho * momentum + 1
        whole += momentum
    return whole


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.99])
def test_a_path_is_as_long_as_that_of_a_constant_gradient(rho) -> None:
    for steps in (1, 2, 3, 7, 40):
        assert FedNova(rho).path(torch.tensor(steps)).item() == pytest.approx(length(steps, rho), rel=1e-9)
    assert [round(FedNova(0.9).path(torch.tensor(steps)).item(), 9) for steps in (1, 2)] == [1.0, 2.9]
    assert FedNova(0.0).path(torch.tensor(7)).item() == 7


def nova_by_hand(made: World, shared: Tree, r: int, by: str) -> Tree:
    cohort, rho = made.fleet.pick(made.setting.cohort, r), made.setting.train.momentum
    ends, steps = zip(*(visit(made, shared, k, r) for k in cohort), strict=True)
    shares = shares_of(list(steps) if by == "batches" else [made.population.size(k) for k in cohort])
    lengths, whole = [length(tau, rho) for tau in steps], mean_of(list(ends), shares)
    far = sum(share * a for share, a in zip(shares, lengths, strict=True))
    for key in under(shared, "w/"):
        mean = sum(share * (shared[key] - end[key]) / a for share, a, end in zip(shares, lengths, ends, strict=True))
        whole[key] = shared[key] - far * mean
    return whole


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("by", ["samples", "batches"])
@pytest.mark.parametrize(("rho", "hidden"), [(0.9, False), (0.0, True), (0.9, True)])
def test_fednova_of_unequal_clients_is_the_one_by_hand(kind, by, rho, hidden) -> None:
    made = having(FedNova(0.3, by), kind, momentum=rho, cohort=3)  # the round's momentum counts
    state = begun(made, hidden)
    for r in (1, 2):
        expected = nova_by_hand(made, state.shared, r, by)
        plain = played(having(FedAvg(), kind, momentum=rho, cohort=3), state, r)
        state = played(made, state, r)
        near(weights(state.shared), expected, 1e-9)
        assert not torch.allclose(plain.shared["w/fc1.weight"], state.shared["w/fc1.weight"], atol=1e-4)
        for key, mask in under(state.shared, "mask/").items():
            assert (state.shared["w/" + key[5:]][~mask] == 0).all()


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("by", ["samples", "batches"])
def test_fednova_of_equally_many_steps_is_fedavg(kind, by) -> None:
    """7 and 8 images are two batches of 4 each; by steps the two count alike."""
    sizes = [8, 7] if by == "samples" else [8, 8]
    nova, plain = (having(aggregate, kind, sizes) for aggregate in (FedNova(0.9, by), FedAvg()))
    one, other = begun(nova), begun(plain)
    for r in (1, 2, 3):
        one, other = played(nova, one, r), played(plain, other, r)
    near(one.shared, other.shared, 1e-6)


def test_long_paths_of_large_clients_can_be_summed() -> None:
    """A client of a million images and a hundred thousand steps: the weighted length has 41 bits, and the sum takes 28."""
    sent = ClientInput({"w/a": torch.ones(1)}, {}, {}, torch.tensor(10**6), torch.tensor([10**5]), torch.tensor(0))
    total = FedNova(0.9).report(sent, {"w/a": torch.zeros(1)}).total
    assert all(float(value.abs().max()) < 2**28 for value in total.values())
    after = FedNova(0.9).server({}, sent.shared, total, None)[0]
    assert after["w/a"].item() == pytest.approx(0, abs=1e-6)


# ---- what all of them hold


@pytest.mark.parametrize("aggregate", [FedAvg(), FedProx(0.3), FedNova(0.9), Scaffold(0.1)])
def test_clients_of_30_and_10_images_weigh_three_to_one(aggregate) -> None:
    sent = [
        ClientInput({"w/a": torch.tensor([1.0]), "buf/a": torch.zeros(1)}, {}, {}, torch.tensor(n), torch.tensor([2]), torch.tensor(0))
        for n in (30, 10)
    ]
    memory = aggregate.init_memory(sent[0].shared)
    total: Tree = {}
    for one, value in zip(sent, (5.0, 9.0), strict=True):
        one = replace(one, shared=aggregate.shared(memory, one.shared))
        one = replace(one, kept=aggregate.init_kept(None, one))
        report = aggregate.report(one, {"w/a": torch.tensor([value]), "buf/a": torch.tensor([value + 1])})
        total = {key: total.get(key, 0) + value for key, value in report.total.items()}
    assert total[COUNT] == 40
    made = having(aggregate, cohort=2)
    shared, _ = aggregate.server(memory, sent[0].shared, total, made.setting)
    assert shared["w/a"].item() == pytest.approx(6)  # (3 · 5 + 9) / 4
    assert shared["buf/a"].item() == pytest.approx(7)
    assert shared["w/a"].dtype == torch.float32


@pytest.mark.parametrize("aggregate", [FedAvg(), FedProx(0.3), FedNova(0.9), Scaffold(0.1)])
def test_what_no_client_sends_stays_as_it_is_and_counters_are_averaged(aggregate) -> None:
    shared = {
        "w/a": torch.ones(2),
        "w/local": torch.ones(2),
        "buf/a": torch.zeros(2),
        "buf/local": torch.zeros(2),
        "buf/seen": torch.tensor(7),
    }
    sent = ClientInput(aggregate.shared(aggregate.init_memory(shared), shared), {}, {}, torch.tensor(3), torch.tensor([2]), torch.tensor(0))
    sent = replace(sent, kept=aggregate.init_kept(None, sent))
    state = {key: value + 2 for key, value in shared.items()}
    total = aggregate.report(sent, state).total
    assert all(value.dtype == torch.float64 for value in total.values())
    some = {key: value for key, value in total.items() if not key.endswith("local")}
    setting = having(aggregate).setting
    after, memory = aggregate.server(aggregate.init_memory(shared), shared, some, setting)
    assert after.keys() == shared.keys()
    assert all(after[key] is shared[key] for key in ("w/local", "buf/local"))
    near({key: after[key] for key in ("w/a", "buf/a")}, {key: state[key] for key in ("w/a", "buf/a")})
    assert (after["buf/seen"], after["buf/seen"].dtype) == (9, torch.int64)
    assert memory.keys() == aggregate.init_memory(shared).keys()
    without = {key: value for key, value in shared.items() if not key.endswith("local")}
    assert aggregate.server({}, without, some, setting)[0].keys() == without.keys()
    count = FEDNOVA_WEIGHT if isinstance(aggregate, FedNova) else COUNT
    with pytest.raises(KeyError, match=count):
        aggregate.server({}, shared, {key: value for key, value in some.items() if key != count}, setting)


def test_without_mu_fedprox_is_fedavg() -> None:
    ends = [played(made, begun(made), 1).shared for made in (having(FedProx(0.0)), having(FedAvg()))]
    assert same(*ends)


def test_programs_of_fixed_shapes_serve_rounds_of_other_rates() -> None:
    fleet.forget()
    made, plain = having(Scaffold(0.1), fleet.CudaGraphFleet, cohort=4), having(Scaffold(0.1), cohort=4)
    state, other = begun(made), begun(plain)
    for r in (1, 2, 3):
        state, other = played(made, state, r), played(plain, other, r)
        near(state.shared, other.shared, 1e-9)
    assert len({seen.work.lr for seen in made.seen}) == 3
    assert len(fleet.engine("cpu").graphed) == 1
    fleet.forget()


# ---- the job


def test_jobs_choose_them_with_their_parameters() -> None:
    job = check({"method": {"name": "fednova"}, "train": {"fednova_weights": "batches", "momentum": 0.5}})
    assert job.train.aggregation() == FedNova(0.5, "batches")
    assert check({"method": {"name": "scaffold"}, "train": {"lr": 0.3}}).train.aggregation().lr == 0.3
    tiny = check({"method": {"name": "fedtiny"}, "train": {"aggregate": "scaffold"}})
    assert isinstance(tiny.train.aggregation(), NAMES["scaffold"])
    for name in ("fednova", "scaffold"):
        assert find(name) is Method
        assert "arXiv" in ALIASES[name].about
    assert FedNova(0.5).at(LocalOptimizer(0.1, 0.8, 0.0)).momentum == 0.8
    assert Scaffold(0.5).at(LocalOptimizer(0.1, 0.8, 0.0)).lr == 0.1


@pytest.mark.parametrize("name", ["fednova", "scaffold"])
def test_adam_is_refused(name) -> None:
    with pytest.raises(BadInput, match=re.escape(f'[train] aggregate = "{name}" follows the steps of SGD; leave out optimiser = "adam"')):
        check({"method": {"name": name}, "train": {"optimiser": "adam"}})
    check({"method": {"name": "fedprox"}, "train": {"optimiser": "adam"}})


# ---- what it costs


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("hidden", [False, True])
def test_bytes_and_memory_by_hand(kind, hidden) -> None:
    """FedNova sends a number more; SCAFFOLD a control for each kept weight, both ways, and holds it and its own."""
    bills = {}
    for aggregate in (FedAvg(), FedNova(0.9), Scaffold(0.1)):
        made = having(aggregate, kind, cohort=4)
        played(made, begun(made, hidden), 1)
        bills[type(aggregate)] = list(made.fleet.account.bills.values())
    shared = made.seen[0].shared
    counts = kept(shared)
    ones = sum(counts.get(key[2:].removesuffix(".weight"), value.numel()) for key, value in under(shared, "w/").items())
    assert (ones < sum(value.numel() for value in under(shared, "w/").values())) == hidden
    for plain, nova, scaffold in zip(*bills.values(), strict=True):
        assert (nova.bytes_up - plain.bytes_up, nova.bytes_down - plain.bytes_down) == (4, 0)
        assert (scaffold.bytes_up - plain.bytes_up, scaffold.bytes_down - plain.bytes_down) == (4 * ones, 4 * ones)
        assert nova.memory == plain.memory
        assert scaffold.memory - plain.memory == scaffold.model_memory - plain.model_memory == 2 * 4 * ones
    assert communication.length({FEDNOVA_PATH: torch.zeros(())}) == 4


def test_what_stands_in_the_models_place_is_counted_once() -> None:
    """Kept weights, running statistics, masks and gates are the model's; any other kept tensor is held beside it."""
    from fedsim.fleet.charging.pricing import _personal

    shared = {
        "w/a": torch.zeros(4),
        "mask/a": torch.arange(4) < 3,
        SCAFFOLD_CONTROL + "a": torch.zeros(4),
        "opt/momentum/a": torch.zeros(4),
    }
    held = {
        "w/a": torch.zeros(4),
        "buf/b": torch.zeros(4),
        "mask/c": torch.ones(9, dtype=torch.bool),
        "n/visits": torch.zeros(()),
        "free": torch.zeros(3),
    }
    assert _personal({}, held) == 0
    assert _personal(shared, held) == 12
    assert _personal(shared, held | {SCAFFOLD_OWN + "a": torch.zeros(4), "loss/seen": torch.zeros(5)}) == 12 + 12 + 20
    assert _personal(shared, {"mask/a": torch.arange(4) < 1, SCAFFOLD_OWN + "a": torch.zeros(4)}) == 4 + 4
