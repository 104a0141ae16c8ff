"""Answers of ranks join on their way, in any tree, to what one rank would have answered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.core.exact_sum import Sum
from fedsim.fleet.messages import PackResult
from fedsim.fleet.mpi.reply import LONG, Reply
from fedsim.fleet.mpi.schedule import children

SHARED = {"w/a": torch.zeros(3)}


def answer_of(client: int, many: bool = False) -> PackResult:
    """One client's; every third has reports of its own, every fourth keeps something, and so on."""
    values = torch.arange(LONG if many else 2) + client
    answer = PackResult(Sum(SHARED, 10), [client], loss={client: client / 2}, up={} if client % 5 == 0 else {client: 100 + client})
    answer.total.add({"w/a": torch.full((1, 3), float(client), dtype=torch.float64) / 100}, [client], [10])
    answer.each = {client: {"n/x": values, "own/y": values.double() / 3}} if client % 3 == 0 else {}
    answer.keep = {client: {"own/z": values.bool()}} if client % 4 == 0 else {}
    if client % 2:
        answer.ones, answer.open = {client: {"a.weight": client}}, {client: [[client, 1]]}
    return answer


def ranks_of(ranks: int, clients: int, many: bool = False) -> list[PackResult]:
    """Of ranks 1 … `ranks`, which have so many clients each."""
    found = []
    for rank in range(ranks):
        answer = PackResult(Sum(SHARED, 10))
        for client in range(rank * clients, (rank + 1) * clients):
            answer.merge(answer_of(client, many))
        found.append(answer)
    return found


def joined(answers: list[PackResult], stopped: int = 0) -> tuple[Reply, dict[int, np.ndarray]]:
    """What rank 0 has of them after every message; and the rows that ranks have sent to it alone."""
    alone: dict[int, np.ndarray] = {}

    def of(rank: int) -> Reply:
        reply, rows = Reply.of(answers[rank - 1], rank, rank == stopped)
        if rows is not None:
            alone[rank] = rows
        for child in children(rank, len(answers)):
            message = of(child).coded()
            reply.join(Reply.read(message), message.nbytes)
        return reply

    first, *others = [Reply.read(of(rank).coded()) for rank in children(0, len(answers))]
    for other in others:
        first.join(other, 0)
    return first, alone


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_what_ranks_answer_reaches_rank_0_as_it_was(ranks: int, many: bool) -> None:
    answers = ranks_of(ranks, 3, many)
    whole, alone = joined(answers)
    assert bool(alone) == many
    found = PackResult(Sum(SHARED, 10))
    whole.put_into(found, alone.__getitem__)
    for answer in answers:
        mine = np.array(answer.clients)
        assert np.array_equal(found.losses(mine), answer.losses(mine))
        assert np.array_equal(found.sent_back(mine), answer.sent_back(mine))
        for name in ("ones", "arrived", "open"):
            assert {client: getattr(found, name).get(client) for client in answer.clients} == {
                client: getattr(answer, name).get(client) for client in answer.clients
            }
        for name in ("each", "keep"):
            for client, held in getattr(answer, name).items():
                got = getattr(found, name)[client]
                assert list(got) == list(held)
                assert all(torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in held.items())
    assert (found.each.keys(), found.keep.keys()) == ({*range(0, 3 * ranks, 3)}, {*range(0, 3 * ranks, 4)})
    assert sorted(found.clients) == list(range(3 * ranks))
    assert whole.complete
    assert whole.totals == answers[0].total.layout()


def test_bytes_that_pass_between_other_ranks_are_counted() -> None:
    """Of five ranks, 3 answers through 2, and 5 through 4."""
    answers = ranks_of(5, 2)
    sizes = [Reply.of(answers[rank - 1], rank, False)[0].coded().nbytes for rank in (3, 5)]
    assert joined(answers)[0].passed == sum(sizes)


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 5])
def test_there_is_no_sum_where_a_rank_has_stopped(stopped: int) -> None:
    whole, _ = joined(ranks_of(5, 2), stopped)
    assert not whole.complete
    assert whole.totals is None
    assert len(whole.clients) == 8


def test_totals_that_cannot_be_added_are_named() -> None:
    answers = ranks_of(4, 1)
    for key, shape in (("w/b", (1, 2)), ("w/a", (1, 4))):
        other = PackResult(Sum(SHARED, 10), [9])
        other.total.add({key: torch.zeros(shape, dtype=torch.float64)}, [9], [10])
        whole, _ = joined([*answers, other])
        assert not whole.complete
        said = "total 'w/a' is (3,) and (4,)" if key == "w/a" else "total 'w/a' is (3,) and nothing"
        assert whole.unlike == f"{said} for two clients; all clients must report the same keys and shapes"
