"""Bills that clients share are the bills that each would have for itself."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from fedsim.core.types import Feed
from fedsim.costs.profile import Breakdown
from fedsim.data.client_indices import Blocks, listed
from fedsim.fleet.charging.bills import Bills
from fedsim.fleet.charging.pricing import ClientCosts, distinct
from fedsim.fleet.client_images import count_of, counts_of, evaluation_shards, many_steps_of, sizes_of, steps_of

FIGURES = ("samples", "train_flops", "extra_flops", "flops_at_mean", "bytes_up", "bytes_down", "memory", "model_memory", "executed")


def run_of(generator: np.random.Generator) -> ClientCosts:
    samples, flops, weights, images = generator.integers(1, 4, 4).tolist()
    found = ClientCosts(samples=samples, density=samples / 4, train_flops=10 * flops, extra_flops=flops, flops_at_mean=9 * flops)
    found.dense_flops, found.executed = 20 * flops, weights + images
    found.hold(Breakdown(weights=weights, activations=images))
    found.model_memory = weights
    return found


def played(seed: int) -> tuple[Bills, dict[int, ClientCosts]]:
    """Runs of works by random cohorts, charged to shared bills and to one for each client."""
    generator, bills, alone = np.random.default_rng(seed), Bills(), dict[int, ClientCosts]()
    for _ in range(6):
        clients = np.sort(generator.choice(9, int(generator.integers(1, 9)), replace=False)).tolist()
        runs = [run_of(generator) for _ in range(2)]
        run, down, up = (generator.integers(0, 2, len(clients)) for _ in range(3))
        loss = generator.random(len(clients)) if generator.random() < 0.5 else None
        bills.add(clients, runs, run, down, up, loss)
        for i, client in enumerate(clients):
            bill = alone.setdefault(client, ClientCosts())
            bill.bytes_down += int(down[i])
            bill.bytes_up += int(up[i])
            bill.add(runs[run[i]])
            bill.loss = bill.loss if loss is None else float(loss[i])
        one = int(generator.integers(0, 9))
        for bill in (bills.apart(one), alone.setdefault(one, ClientCosts())):
            bill.add_unused(3, 2, 50, 5, Breakdown(weights=4))
    return bills, alone


@pytest.mark.parametrize("seed", range(20))
def test_shared_bills_are_those_of_each_client(seed: int) -> None:
    bills, alone = played(seed)
    assert list(bills) == sorted(alone)
    assert len(bills) == len(alone)
    for client, bill in alone.items():
        found = bills[client]
        assert (isnan(found.loss) and isnan(bill.loss)) or found.loss == bill.loss
        assert {**vars(found), "loss": 0} == {**vars(bill), "loss": 0}
    for name in FIGURES:
        values = [getattr(alone[client], name) for client in sorted(alone)]
        assert bills.column(name).tolist() == values
        assert (bills.total(name), bills.most(name)) == (sum(values), max(values))
    first = max(sorted(alone), key=lambda client: alone[client].memory)
    assert bills.largest().memory_terms == alone[first].memory_terms


def test_what_is_read_of_a_client_changes_no_bill() -> None:
    bills = Bills()
    bills.add([1, 2], [ClientCosts(samples=4)], np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64), None)
    bills[1].samples = 9
    assert bills[1].samples == bills[2].samples == 4
    bills.apart(1).samples = 9
    assert (bills[1].samples, bills[2].samples) == (9, 4)
    with pytest.raises(KeyError):
        bills[0]
    assert (bills.total("samples"), Bills().total("samples"), Bills().most("memory"), Bills().largest()) == (13, 0, 0, ClientCosts())


def test_distinct_rows_are_those_of_a_set() -> None:
    close = np.array([[0, 1], [9, -1], [5, 5]])  # rows of one sum, were values put one behind the other
    for columns in (np.random.default_rng(0).integers(-3, 3, (3, 50)) * 10**12, close):
        first, which = distinct(*columns)
        rows = list(zip(*columns.tolist(), strict=True))
        assert [rows[first[i]] for i in which] == rows
        assert len(first) == len(set(rows))


class Someone:
    """Clients with unequal shares, and a test set of 300 images."""

    clients = 5
    test = range(300)  # of which only the number counts
    shards = {"train": listed([[0], [1, 2, 3], [], list(range(4, 14)), [14, 15]]), "held": Blocks(23, 5)}  # noqa: RUF012


@pytest.mark.parametrize(
    "feed", [Feed("train", epochs=2, batch=3), Feed("train", steps=5, batch=4), Feed("probe", epochs=1, batch=2, share=0.3)]
)
def test_many_clients_are_counted_as_each_of_them(feed: Feed) -> None:
    clients = [3, 0, 2, 4, 5, 7, 6]  # the last are shards of the global test set
    counts = counts_of(Someone(), feed, clients)
    assert counts.tolist() == [count_of(Someone(), feed, client) for client in clients]
    assert many_steps_of(feed, counts).tolist() == [steps_of(feed, count) for count in counts.tolist()]


def test_sizes_of_some_clients() -> None:
    blocks = Someone.shards["held"]
    assert sizes_of(Someone(), "held", [4, 0, 3]).tolist() == [blocks.size(client) for client in (4, 0, 3)]
    assert sizes_of(Someone(), "global", [4, 0]).tolist() == [300, 300]


@pytest.mark.parametrize(
    ("images", "shards"), [(1, 1), (2, 2), (100, 2), (360, 3), (1_000, 8), (1_024, 8), (2_049, 9), (10_000, 40), (60_000, 64)]
)
def test_shards_of_the_test_set_are_neither_tiny_nor_few(images: int, shards: int) -> None:
    class Test(Someone):
        test = range(images)

    assert evaluation_shards(Test()) == shards
    assert sizes_of(Test(), "global", range(5, 5 + shards)).sum() == images
