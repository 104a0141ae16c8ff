"""What clients are charged, by hand: broadcasts, masks, what was received before, forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from linear_federation import FLEETS, linear, people
from torch import Tensor, nn

from fedsim.core import rng
from fedsim.core.tree import Tree, under
from fedsim.core.types import Batch, Feed
from fedsim.costs import profile
from fedsim.federated.client_work import Loss, Train, TrainAndScore
from fedsim.federated.protocol import ClientInput, Report, Work
from fedsim.fleet.accounting import CostAccount
from fedsim.fleet.messages import WorkerContext
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.pruning.channel_frequency import MeasureChannelFrequency

WEIGHT, BIAS = 4 * 48, 4 * 3  # bytes of the linear layer
TRAIN = Train((Feed("train", epochs=1, batch=4, augment=False),), 0.1)


def charged(kind: type, sizes: list[int], module: nn.Module | None = None):  # type: ignore[no-untyped-def]
    module = (module or linear()).float()
    population = people(sizes)
    account = CostAccount(profiler.profile(module, (1, 4, 4)), population, TRAIN.feeds[0], slots=0)
    made = kind(WorkerContext(Net(module), population, 0), account, 2, lambda: 0.0)
    made.open(1)
    return made, account


def masked(made, seed: int, share: float = 0.25) -> Tree:  # type: ignore[no-untyped-def]
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed)) < share
    return made.site.net.initial | {"w/1.weight": made.site.net.initial["w/1.weight"] * mask, "mask/1.weight": mask}


@pytest.mark.parametrize("kind", FLEETS)
def test_what_was_received_in_this_round_costs_nothing_again(kind) -> None:
    made, account = charged(kind, [4, 6])
    one, other = made.site.net.initial, {key: value + 1 for key, value in made.site.net.initial.items()}
    for shared in (one, other, one, other):
        made.run(TRAIN, [0, 1], shared)
    assert [account.bills[k].bytes_down for k in (0, 1)] == [2 * (WEIGHT + BIAS)] * 2
    assert [account.bills[k].bytes_up for k in (0, 1)] == [4 * (WEIGHT + BIAS)] * 2
    made.open(2)
    made.run(TRAIN, [0], one)
    assert account.bills[0].bytes_down == WEIGHT + BIAS


@pytest.mark.parametrize("kind", FLEETS)
def test_another_mask_shows_weights_that_have_not_travelled(kind) -> None:
    made, account = charged(kind, [4, 6])
    first = masked(made, 0)
    second = first | {"mask/1.weight": torch.ones(3, 16, dtype=torch.bool)}
    made.run(TRAIN, [0], first)
    kept = int(first["mask/1.weight"].sum())
    assert account.bills[0].bytes_down == 4 * kept + BIAS + min(6, 4 * kept)  # 48 positions are 6 bytes
    before = account.bills[0].bytes_down
    made.run(TRAIN, [0], second)
    assert account.bills[0].bytes_down - before == WEIGHT  # the bias is there; a mask of ones costs nothing


@pytest.mark.parametrize("kind", FLEETS)
def test_a_mask_is_charged_against_what_the_client_held(kind) -> None:
    made, account = charged(kind, [4, 6])
    first = masked(made, 0, 0.5)
    second = dict(first)
    second["mask/1.weight"] = first["mask/1.weight"].clone()
    second["mask/1.weight"][0, 0] ^= True
    second["w/1.weight"] = second["w/1.weight"] * second["mask/1.weight"]
    kept = [4 * int(shared["mask/1.weight"].sum()) + BIAS for shared in (first, second)]
    made.run(TRAIN, [0], first)
    made.open(2)
    made.run(TRAIN, [0, 1], second)
    assert account.bills[0].bytes_down == kept[1] + 4  # one position changed
    assert account.bills[1].bytes_down == kept[1] + 6  # the first mask it sees
    made.open(3)
    made.run(TRAIN, [0, 1], second)
    assert [account.bills[k].bytes_down for k in (0, 1)] == [kept[1]] * 2


@dataclass(frozen=True)
class Personal(Train):
    """Keeps half of the layer for itself."""

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return {"mask/1.weight": (torch.arange(48) % 2 == 0).view(3, 16)}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        report = super().finish(net, sent, state)
        return Report(report.total, {"mask/1.weight": sent.kept["mask/1.weight"]}, under(sent.kept, "mask/"))


@pytest.mark.parametrize("kind", FLEETS)
def test_a_clients_own_mask_prices_both_ways(kind) -> None:
    made, account = charged(kind, [4, 6])
    work = Personal(TRAIN.feeds, 0.1)
    made.run(work, [0, 1], made.site.net.initial)
    assert [account.bills[k].bytes_down for k in (0, 1)] == [4 * 24 + BIAS] * 2
    assert [account.bills[k].bytes_up for k in (0, 1)] == [4 * 24 + BIAS] * 2  # its mask has not changed
    assert account.bills[0].density == 0.5
    assert account.bills[0].train_flops == 4 * 3 * 2 * 24


@pytest.mark.parametrize("kind", FLEETS)
def test_a_mask_sent_to_one_client_again_costs_nothing(kind) -> None:
    made, account = charged(kind, [4, 6])
    own = {"mask/1.weight": torch.stack([torch.arange(48).view(3, 16) < k for k in (12, 24)])}
    made.run(TRAIN, [0, 1], made.site.net.initial, own)
    assert [account.bills[k].bytes_down for k in (0, 1)] == [4 * k + BIAS + 6 for k in (12, 24)]
    made.open(2)
    made.run(TRAIN, [0, 1], made.site.net.initial, own)
    assert [account.bills[k].bytes_down for k in (0, 1)] == [4 * k + BIAS for k in (12, 24)]


@pytest.mark.parametrize("kind", FLEETS)
def test_a_forward_pass_is_no_training(kind) -> None:
    made, account = charged(kind, [4, 6])
    made.run(Loss((Feed("train", epochs=2, batch=4, augment=False, cost="forward"),)), [0, 1], made.site.net.initial)
    bill = account.bills[1]
    assert (bill.samples, bill.train_flops) == (0, 12 * 2 * 48)
    assert bill.memory == WEIGHT + BIAS
    trained, _ = charged(kind, [4, 6])
    trained.run(TRAIN, [1], trained.site.net.initial)
    assert trained.account.bills[1].memory > 2 * (WEIGHT + BIAS)


@dataclass(frozen=True)
class Untidy(Work):
    """Breaks one rule of the state, as `how` says."""

    feeds: tuple[Feed, ...]
    how: str

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {"n/a": torch.zeros(()) + 1, "n/b": torch.zeros(()) + 2}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
        new = {
            "swap": {"n/a": state["n/b"], "n/b": state["n/a"]},
            "dtype": {"n/a": state["n/a"].double(), "n/b": state["n/b"]},
            "more": state | {"n/c": state["n/a"]},
        }[self.how]
        return new, batch.x.sum() * 0

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({key: value.double() for key, value in state.items()}, state)


@pytest.mark.parametrize("kind", FLEETS)
def test_a_step_may_exchange_tensors(kind) -> None:
    made, _ = charged(kind, [4, 4])
    each = made.run(Untidy((Feed("train", steps=3, batch=2),), "swap"), [0, 1], made.site.net.initial).each
    assert each["n/a"].tolist() == [2, 2]
    assert each["n/b"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize(
    ("how", "message"),
    [("dtype", "init_state made it .*float32, and so it must stay"), ("more", "ValueError: n/c: init_state fixes the keys")],
)
def test_a_state_keeps_what_start_fixed(kind, how, message) -> None:
    made, _ = charged(kind, [4, 4])
    with pytest.raises(RuntimeError, match=message):
        made.run(Untidy((Feed("train", steps=3, batch=2),), how), [0, 1], made.site.net.initial)


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("mask", [torch.ones(3, 16), torch.ones(3, 1, dtype=torch.bool)])
def test_a_wrong_mask_is_named_with_its_client(kind, mask) -> None:
    made, _ = charged(kind, [4, 4])
    with pytest.raises(RuntimeError, match=r"round 1, Train.*mask '1.weight' is"):
        made.run(TRAIN, [0, 1], made.site.net.initial | {"mask/1.weight": mask})


@dataclass(frozen=True)
class Keeps(Train):
    """Keeps one number under a key of its own."""

    key: str = "n/a"

    def init_kept(self, net: Net, sent: ClientInput) -> Tree:
        return {self.key: torch.zeros(())}

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(super().finish(net, sent, state).total, {"n/seen": sent.kept[self.key]}, {self.key: sent.kept[self.key] + 1})


@pytest.mark.parametrize("kind", FLEETS)
def test_works_keep_beside_each_other_and_packs_mix_new_clients_with_old(kind) -> None:
    made, _ = charged(kind, [4, 4, 4, 4])
    a, b = Keeps(TRAIN.feeds, 0.1), Keeps(TRAIN.feeds, 0.1, key="n/b")
    seen = []
    for work, cohort in ((a, [1, 2]), (b, [0, 1]), (a, [0, 1, 2, 3]), (b, [0, 1, 2, 3]), (Loss(TRAIN.feeds), [0, 1, 2, 3])):
        reply = made.run(work, cohort, made.site.net.initial)
        seen.append(reply.each.get("n/seen", torch.zeros(0)).tolist())
    assert seen == [[0, 0], [0, 0], [0, 1, 1, 0], [1, 1, 0, 0], []]
    assert sorted(made.kept[1]) == ["n/a", "n/b"]
    assert profile.VALUE_BYTES == 4


@dataclass(frozen=True)
class Spending(Train):
    extra_flops: int = 1_000


@pytest.mark.parametrize("kind", FLEETS)
def test_a_client_with_the_mean_number_of_images_and_the_memory_of_the_largest(kind) -> None:
    """Of 2, 3, 4 and 6 images the mean is 3.75: 4. A probe of half of them is of 2 images; a work's own FLOPs come once."""
    made, account = charged(kind, [2, 3, 4, 6])
    made.run(TRAIN, [1, 3], made.site.net.initial)
    assert [account.bills[k].train_flops for k in (1, 3)] == [n * 3 * 96 for n in (3, 6)]
    assert [account.bills[k].flops_at_mean for k in (1, 3)] == [4 * 3 * 96] * 2
    probe = Feed("probe", epochs=2, batch=1, augment=False, share=0.5, cost="forward")
    made.run(Spending((probe,), 0.1), [3], made.site.net.initial)
    assert account.bills[3].flops_at_mean == 4 * 3 * 96 + 2 * 2 * 96 + 1_000
    assert account.bills[3].train_flops == 6 * 3 * 96 + 2 * 3 * 96 + 1_000
    assert account.bills[3].extra_flops == 1_000
    for bill in account.bills.values():
        assert bill.memory == bill.memory_terms.total > 0
    activations = account.model_profile.activations
    assert [account.bills[k].memory_terms["activations"] for k in (1, 3)] == [n * activations for n in (3, 4)]


class Unrelated:
    """It has a Work's feeds, and is none."""

    feeds = (Feed("train", epochs=1, batch=2),)


@pytest.mark.parametrize("kind", FLEETS)
def test_a_work_inherits_from_work(kind) -> None:
    made, _ = charged(kind, [2, 6])
    with pytest.raises(TypeError, match=r"Unrelated does not inherit from fedsim\.Work"):
        made.run(Unrelated(), [0, 1], made.site.net.initial)


def test_a_work_draws_under_its_own_name_or_the_purpose_that_it_states() -> None:
    class Renamed(Train):
        purpose = "Former"

    class Derived(Renamed):
        pass

    assert [work.purpose for work in (Train, TrainAndScore, Renamed, Derived)] == ["Train", "TrainAndProbe", "Former", "Derived"]
    assert MeasureChannelFrequency.purpose == "Frequency"


@dataclass(frozen=True)
class Draws(Work):
    """It hands back the key of its random draws."""

    feeds: tuple[Feed, ...] = ()

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, torch.Tensor]:
        return state, batch.x.mean()

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report({"n/images": sent.n.double()}, {"n/key": sent.key})


@dataclass(frozen=True)
class OtherDraws(Draws):
    purpose = "Other"


@pytest.mark.parametrize("kind", FLEETS)
def test_a_key_is_of_the_purpose_the_round_the_call_and_the_client(kind) -> None:
    made, _ = charged(kind, [2, 3, 4])
    for work, cohort, calls in ((Draws(), [0, 2], [0, 0]), (Draws(), [0, 1], [1, 0]), (OtherDraws(), [0, 1], [0, 0])):
        expected = rng.key(0, work.purpose, 1, torch.tensor(calls), torch.tensor(cohort))
        assert made.run(work, cohort, made.site.net.initial).each["n/key"].equal(expected)
