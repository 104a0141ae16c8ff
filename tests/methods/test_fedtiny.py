"""FedTiny's round 0 against its specification: the public images, the pool and the selection, beside plain torch and plain loops."""

from __future__ import annotations

from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import FLEETS, World, batches, drawn, kept, loaded, small, stored, world
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config.job import check
from fedsim.core.tree import Tree, under
from fedsim.core.types import Feed, LocalTraining
from fedsim.data.image_sets import Stored
from fedsim.errors import BadInput
from fedsim.federated import pretraining
from fedsim.methods.fedtiny import FedTiny
from fedsim.simulation.experiment import build_experiment

# ---- before the clients: public images, pretraining, the pool


def test_check_5_public_images_clients_and_test_are_disjoint_and_five_of_each_class_are_public() -> None:
    parts = build_experiment(
        check({"partition": {"public": 5}, "method": {"name": "fedtiny", "density": 0.1}, "execution": {"device": "cpu"}})
    )
    population = parts.population
    public = population.shards["public"].of(0)
    owned = [population.shards["train"].of(k) for k in range(population.clients)]
    assert np.bincount(population.train.labels(torch.from_numpy(public)).numpy()).tolist() == [5] * 10
    assert len(set(public.tolist()).union(*map(set, owned))) == len(public) + sum(map(len, owned)) == len(population.train)
    held = population.public()
    assert held is not None
    assert torch.equal(held.x, population.train.images(torch.from_numpy(public)))
    tests = {image.numpy().tobytes() for image in population.test.images(torch.arange(len(population.test)))}
    everyones = population.train.images(torch.arange(len(population.train)))
    assert not tests & {image.numpy().tobytes() for image in everyones}


def test_the_server_pretrains_as_torch_would() -> None:
    """One batch holds all public images, so that their order is nothing."""
    x, y, _ = drawn([7])
    made = world(stored(*drawn([5, 5])), training=LocalTraining(batch=100, lr=0.2, momentum=0.9, decay=1e-2))
    found = pretraining.pretrained(made.setting, stored(x, y), 3)
    module = loaded(small(), {})
    optimiser = torch.optim.SGD(module.parameters(), 0.2, 0.9, weight_decay=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(module((x.double() / 255 - 0.5) / 0.25), y).backward()
        optimiser.step()
    expected = module.state_dict()
    assert found.keys() == made.setting.net.initial.keys()
    for key, value in found.items():
        assert torch.allclose(value, expected[key.partition("/")[2]], atol=1e-10), key


def test_the_server_sees_every_public_image_once_an_epoch() -> None:
    x, y, _ = drawn([7])
    made = world(stored(*drawn([5, 5])), training=LocalTraining(batch=3))
    seen = [batch.x for batch in pretraining.batches(made.setting, stored(x, y), 2)]
    assert [len(batch) for batch in seen] == [3, 3, 1, 3, 3, 1]
    every = (x.double() / 255 - 0.5) / 0.25
    orders = [[int((every == image).flatten(1).all(1).nonzero()) for image in torch.cat(part)] for part in (seen[:3], seen[3:])]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert orders[0] != orders[1]


def pool_of(made: World, method: FedTiny, public: Stored | None = None) -> list[Tree]:
    """The candidates as the clients get them."""
    made.play(method, 0, public)
    return [seen.shared for seen in made.seen]


def check_layers(candidate: Tree, sizes: dict[str, int], share: float) -> None:
    for name, count in kept(candidate).items():
        assert max(floor(0.5 * share * sizes[name]), 1) <= count <= max(floor(1.5 * share * sizes[name]), 1)


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_check_4_candidates_are_full_sorts_of_the_pretrained_model_in_the_window(density) -> None:
    public = stored(*drawn([9], seed=5)[:2])
    made = world(stored(*drawn([5, 5])))
    dense = pretraining.pretrained(made.setting, public, 3)
    pool = pool_of(made, FedTiny(density=density, pool=6, selection="vanilla"), public)
    assert len(pool) == 6
    assert len({tuple(kept(candidate).values()) for candidate in pool}) > 1
    sizes = made.setting.net.sizes
    assert sum(sizes.values()) == 522
    for candidate in pool:
        assert 0.98 * density <= (36 + sum(kept(candidate).values())) / 522 <= density
        check_layers(candidate, sizes, (floor(density * 522) - 36) / 486)
        assert list(kept(candidate)) == ["conv2", "fc1", "fc2"]
        for name, count in kept(candidate).items():
            w = dense[f"w/{name}.weight"].flatten().tolist()
            largest = sorted(range(len(w)), key=lambda i: (-abs(w[i]), i))[:count]
            assert candidate[f"mask/{name}.weight"].flatten().nonzero().flatten().tolist() == sorted(largest)
            assert candidate[f"w/{name}.weight"].flatten().tolist() == [w[i] if i in set(largest) else 0 for i in range(len(w))]
        for key, value in dense.items():
            assert torch.equal(value, candidate[key]) or key.removeprefix("w/").removesuffix(".weight") in kept(candidate)


def wide() -> nn.Module:
    """192,032 weights behind which a density of a thousandth is still a choice; 32 in the first layer."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.BatchNorm1d(2), nn.Linear(2, 16_000), nn.Linear(16_000, 10))


@pytest.mark.parametrize(("density", "count"), [(0.5, 1), (0.1, 1), (0.03, 4), (0.01, 10), (0.002, 50), (0.001, 100), (0.0005, 100)])
def test_check_4_the_pool_has_a_tenth_over_the_density(density, count) -> None:
    made = world(stored(*drawn([2])), wide(), training=LocalTraining(batch=2))
    _, found = made.play(FedTiny(density=density, selection="vanilla", pretrain_epochs=0), 0)
    assert found[0]["candidates"] == len(made.seen) == count
    for seen in made.seen:
        whole = (32 + sum(kept(seen.shared).values())) / 192_032
        assert 0.98 * density <= whole <= density
        check_layers(seen.shared, made.setting.net.sizes, (floor(density * 192_032) - 32) / 192_000)


def test_the_pool_may_be_capped_or_given() -> None:
    for method, count in ((FedTiny(density=0.01, pool_cap=3), 3), (FedTiny(density=0.5, pool=5), 5)):
        made = world(stored(*drawn([2])), wide(), training=LocalTraining(batch=2))
        method = FedTiny(**{**method.__dict__, "pretrain_epochs": 0, "selection": "vanilla"})
        assert len(pool_of(made, method)) == count


def test_the_authors_window_counts_the_first_layer_as_pruned_and_lets_it_in_afterwards() -> None:
    made = world(stored(*drawn([4, 4])))
    method = FedTiny(density=0.5, pool=40, tol_two_sided=True, selection="vanilla", pretrain_epochs=0)
    counts = [sum(kept(candidate).values()) for candidate in pool_of(made, method)]
    assert all(0.98 * 0.5 * 522 <= count <= 1.02 * 0.5 * 522 for count in counts)
    assert min(counts) < 0.5 * 522 < max(counts)
    assert min(count + 36 for count in counts) > 0.5 * 522


@pytest.mark.parametrize(("each", "least"), [(0, 0), (1, 1), (3, 3), (99, 10)])
def test_every_output_of_the_classifier_keeps_its_largest_weights(each, least) -> None:
    """fc2 is (3, 10), and a tenth of it would leave an output without a weight; 99 of 10 are all of them."""
    made = world(stored(*drawn([4, 4])))
    initial = made.setting.net.initial["w/fc2.weight"].abs()
    pool = pool_of(made, FedTiny(density=0.3, pool=6, class_weights=each, selection="vanilla", pretrain_epochs=0))
    for candidate in pool:
        assert 0.98 * 0.3 * 522 <= 36 + sum(kept(candidate).values()) <= 0.3 * 522
        mask = candidate["mask/fc2.weight"]
        assert mask.sum(1).min() >= least
        sure = torch.zeros_like(mask).scatter(1, initial.topk(least, dim=1).indices, True)
        assert bool((mask | ~sure).all())
        if bool((mask & ~sure).any()):  # what more there is are the largest of the rest
            assert initial[mask & ~sure].min() >= initial[~mask].max()


def test_a_window_that_no_draw_meets_is_reported_with_the_layers() -> None:
    made = world(stored(*drawn([4, 4])))
    with pytest.raises(BadInput, match=r"none of 10,000 draws .* conv1 36, conv2 216, fc1 240, fc2 30"):
        FedTiny(density=0.4995, tol=0.0, pretrain_epochs=0).init(made.setting, None)


# ---- selection


def constant_norm() -> nn.Module:
    """A norm that sees the images themselves."""
    torch.manual_seed(4)
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def levels(*pairs: tuple[int, int], size: int, mean: int) -> Tensor:
    """`size` whole numbers around `mean`, with so many pairs at each distance: (distance, pairs)."""
    values = torch.full((size,), mean)
    place = 0
    for distance, count in pairs:
        values[place : place + 2 * count] += torch.tensor([distance, -distance]).repeat(count)
        place += 2 * count
    return values


def two_levels() -> tuple[Tensor, Tensor]:
    """30 images of mean 1 and variance 2 (over n - 1), and 10 of mean 5 and variance 6; 100 stands for 0."""
    one = levels((2, 119), (1, 3), size=480, mean=1)  # squares: 952 + 6 = 2 · 479
    other = levels((3, 53), size=160, mean=5)  # squares: 954 = 6 · 159
    assert (one.double().mean(), one.double().var(), other.double().mean(), other.double().var()) == (1, 2, 5, 6)
    return one.view(30, 1, 4, 4), other.view(10, 1, 4, 4)


def agreed(images: list[Tensor], kind: type, **fields: Any) -> tuple[float, float]:
    """Running mean and variance of the norm after the selection."""
    sizes = [len(part) for part in images]
    x = (torch.cat(images) + 100).to(torch.uint8)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    data = stored(x, torch.arange(len(x)) % 3, owners, mean=100 / 255, std=1 / 255)
    made = world(data, constant_norm(), kind, LocalTraining(batch=100))
    state, _ = made.play(FedTiny(density=0.95, pretrain_epochs=0, **fields), 0)
    return float(state.shared["buf/0.running_mean"]), float(state.shared["buf/0.running_var"])


@pytest.mark.parametrize("kind", FLEETS)
def test_check_1_statistics_are_averaged_by_images(kind) -> None:
    one, other = two_levels()
    whole = {"bn_momentum": 1.0, "bn_passes": 1, "probe_share": 1.0}  # so that the running value is the batch's
    assert agreed([one], kind, **whole) == pytest.approx((1, 2), abs=1e-9)
    assert agreed([one, other], kind, **whole) == pytest.approx((2, 3), abs=1e-9)


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("passes", [1, 4, 10])
def test_check_3_a_running_value_moves_by_the_closed_form(kind, passes) -> None:
    """A batch of all images has constant statistics b = (5, 6); the norm starts at s = (0, 1)."""
    mean, var = agreed([two_levels()[1]], kind, bn_passes=passes, probe_share=1.0)
    assert mean == pytest.approx(5 + (0 - 5) * 0.9**passes, abs=1e-9)
    assert var == pytest.approx(6 + (1 - 6) * 0.9**passes, abs=1e-9)


Judged = tuple[Tree, list[float], list[int], list[int]]


def judged_by_hand(made: World, candidate: Tree, passes: int, first_call: int, share: float) -> Judged:
    """The clients' mean statistics of a candidate, its own where there are no passes; each client's mean loss, right answers, images."""
    clients = range(made.setting.clients)
    feed = Feed("probe", epochs=1, batch=made.setting.train.batch, share=share, augment=False)
    walk = Feed("probe", epochs=max(passes, 1), batch=feed.batch, share=share, augment=False)
    images = [sum(len(y) for _, y in batches(made, feed, k, 0, first_call)) for k in clients]
    total = {key: torch.zeros_like(value) for key, value in under(candidate, "buf/").items()}
    for k in clients if passes else ():
        module = loaded(small(), candidate).train()
        for x, _ in batches(made, walk, k, 0, first_call):
            module(x)
        for key in total:
            total[key] += images[k] * module.state_dict()[key[4:]]
    statistics = {key: value / sum(images) for key, value in total.items()} if passes else under(candidate, "buf/")
    module = loaded(small(), candidate | statistics).eval()
    losses, right = [], []
    for k in clients:
        x, y = (torch.cat(part) for part in zip(*batches(made, feed, k, 0, first_call + (passes > 0)), strict=True))
        losses.append(F.cross_entropy(module(x), y).item())
        right.append(int((module(x).argmax(1) == y).sum()))
    return statistics, losses, right, images


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("selection", ["bn", "vanilla"])
def test_check_2_the_choice_is_the_least_weighted_loss_by_hand(kind, selection) -> None:
    """Plain torch modules, batch by batch; clients of 7 and 12 images select on 3 and 6 of them."""
    made = world(stored(*drawn([7, 12])), kind=kind, training=LocalTraining(batch=3))
    method = FedTiny(density=0.4, pool=4, selection=selection, pretrain_epochs=0, probe_share=0.5, bn_passes=3)
    state, (found,) = made.play(method, 0)
    runs = 2 if selection == "bn" else 1
    assert [type(seen.work).__name__ for seen in made.seen] == ["Statistics", "Loss"][-runs:] * 4
    scores, statistics = [], []
    for c in range(4):
        by_hand, losses, _, images = judged_by_hand(made, made.seen[c * runs].shared, 3 if selection == "bn" else 0, c * runs, 0.5)
        assert images == [3, 6]
        statistics.append(by_hand)
        scores.append((3 * losses[0] + 6 * losses[1]) / 9)
        assert float(made.seen[c * runs + runs - 1].reply.total["loss/sum"]) / 9 == pytest.approx(scores[-1], abs=1e-8)
    best = min(range(4), key=lambda c: scores[c])
    assert found["chosen_candidate"] == best + 1
    assert found["candidate_loss"] == pytest.approx(min(scores), abs=1e-8)
    assert found["pool_loss"] == pytest.approx(sum(scores) / 4, abs=1e-8)
    assert kept(state.shared) == kept(made.seen[best * runs].shared)
    for key, value in statistics[best].items():
        assert torch.allclose(state.shared[key], value, atol=1e-8)
    for key, value in under(made.seen[best * runs].shared, "w/").items():
        assert torch.equal(state.shared[key], value)


WHOLE = FedTiny(density=0.4, pool=6, pretrain_epochs=0, probe_share=1.0, bn_passes=2)


def test_check_2_loss_chooses_not_accuracy_and_by_images_not_by_clients() -> None:
    """A case in which all three would choose differently."""
    made = world(stored(*drawn([4, 24], 24)), training=LocalTraining(batch=100))
    _, (found,) = made.play(WHOLE, 0)
    weighted, alike, accuracy = [], [], []
    for c in range(6):
        _, losses, right, images = judged_by_hand(made, made.seen[2 * c].shared, 2, 2 * c, 1.0)
        assert images == [4, 24]
        weighted.append((4 * losses[0] + 24 * losses[1]) / 28)
        alike.append(-sum(losses))
        accuracy.append(sum(right))
    choices = [1 + int(np.argmin(weighted)), 1 + int(np.argmax(alike)), 1 + int(np.argmax(accuracy))]
    assert choices == [5, 2, 1]
    assert accuracy[0] > accuracy[4]
    assert found["chosen_candidate"] == 5


def test_check_2_permuting_clients_changes_nothing() -> None:
    """The same images in the hands of clients of other numbers; a batch holds all of a client's, so that its order is nothing."""
    x, y, owners = drawn([4, 9, 24], 24)
    results = []
    for numbers in ([0, 1, 2], [2, 0, 1]):
        made = world(stored(x, y, torch.tensor(numbers)[owners]), training=LocalTraining(batch=100))
        state, (found,) = made.play(WHOLE, 0)
        results.append((found["chosen_candidate"], found["candidate_loss"], state.shared))
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-10)
    assert all(torch.allclose(value, results[1][2][key], atol=1e-10) for key, value in results[0][2].items())


def test_of_equal_candidates_the_first_is_taken() -> None:
    """A last layer of zeros gives every image the loss log 3, whatever the layers before keep."""
    module = small()
    for value in module.fc2.parameters():
        nn.init.zeros_(value)
    made = world(stored(*drawn([4, 4])), module)
    state, (found,) = made.play(FedTiny(density=0.4, pool=6, selection="vanilla", pretrain_epochs=0), 0)
    assert (found["candidates"], found["chosen_candidate"]) == (6, 1)
    assert found["candidate_loss"] == pytest.approx(np.log(3), abs=1e-6)
    assert kept(state.shared) == kept(made.seen[0].shared)
    assert kept(state.shared) not in [kept(seen.shared) for seen in made.seen[1:]]


def test_vanilla_selection_judges_with_the_servers_statistics_and_none_asks_nobody() -> None:
    public = stored(*drawn([9], seed=5)[:2])
    made = world(stored(*drawn([6, 9])))
    vanilla, _ = made.play(FedTiny(density=0.4, pool=3, selection="vanilla"), 0, public)
    dense = pretraining.pretrained(made.setting, public, 3)
    assert not torch.equal(dense["buf/norm1.running_mean"], made.setting.net.initial["buf/norm1.running_mean"])
    for key, value in under(dense, "buf/").items():
        assert all(torch.equal(value, tree[key]) for tree in (vanilla.shared, *(seen.shared for seen in made.seen)))
    candidates = [kept(seen.shared) for seen in made.seen]
    made.seen.clear()
    first, (found,) = made.play(FedTiny(density=0.4, pool=3, selection="none"), 0, public)
    assert made.seen == []
    assert kept(first.shared) == candidates[0]
    assert found == {"candidates": 1, "chosen_candidate": 1}


def test_a_pool_of_one_still_sets_the_statistics() -> None:
    made = world(stored(*drawn([6, 9])))
    state, (found,) = made.play(FedTiny(density=0.4, pretrain_epochs=0), 0)
    assert found["candidates"] == 1
    assert not torch.equal(state.shared["buf/norm1.running_mean"], made.setting.net.initial["buf/norm1.running_mean"])


def test_all_clients_select_or_some_of_them() -> None:
    made = world(stored(*drawn([5, 5, 5, 5])), cohort=2)
    made.play(FedTiny(density=0.4, pretrain_epochs=0), 0)
    assert [seen.clients for seen in made.seen] == [[0, 1, 2, 3]] * 2
    made.seen.clear()
    made.play(FedTiny(density=0.4, pretrain_epochs=0, selection_clients=3), 0)
    assert len({tuple(seen.clients) for seen in made.seen}) == 1
    assert len(made.seen[0].clients) == 3
